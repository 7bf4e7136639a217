"""A backward that leaves out the rows of tokens that were not selected (after Collider, arXiv 2502.00340).

Such a token gives its row no gradient at the top of the backbone, so the last block's MLP, query and output projections
have nothing to do for it. Further down the row gets a gradient again, through the keys and values by which it served
the selected ones. The filtered backward drops that too: the matrix products of every block then see the kept rows
alone. It is an approximation. The weights of key and value projections still get the gradient of all rows, which
costs little and is most of what would be lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rho.errors import ConfigError
from rho.linear_loss import compute_dtype
from rho.models import plain

# Names of projections that make keys or values, alone or together with the queries.
MAKES_KEYS_OR_VALUES = re.compile(
    r"(^|_|\.)(k|v|kv|qkv|key|value|key_value|wk|wv|wqkv|c_attn|kv_a|kv_b)(_|\.|$)", re.IGNORECASE
)
# Of two layers in a row (an adapter's, DeepSeek's), the first gets its gradient through the second.
SECOND_OF_TWO = ("lora_B", "kv_b_proj")


class FilteredBackward:
    """Makes the backward of a model's blocks skip the rows whose gradient at the top is exactly zero.

    A context: only what is passed forward inside of it is filtered, each by what its own loss leaves out. Where all
    tokens have a gradient (plain training, retention, soft weights) nothing changes.

    Args:
        model: its blocks' `nn.Linear` layers are given another backward, those inside LoRA adapters too.
        exact: only where nothing is lost by it: the last block, but for what makes keys and values.

    Raises:
        ConfigError: a model whose tokens meet elsewhere than in keys and values, or whose blocks' layers are no
            `nn.Linear`.
    """

    def __init__(self, model: PreTrainedModel, exact: bool = False) -> None:
        backbone = plain(model).base_model
        found = [one for one in backbone.modules() if isinstance(one, nn.ModuleList) and len(one)]
        self.blocks = max(found, key=lambda one: sum(p.numel() for p in one.parameters()), default=nn.ModuleList())
        linear = [
            {name: layer for name, layer in block.named_modules() if type(layer) is nn.Linear} for block in self.blocks
        ]
        if plain(model)._is_stateful or not linear or not all(any(map(_of_keys, names)) for names in linear):
            raise ConfigError(
                f"filtered backward: expected blocks with torch.nn.Linear layers for keys and values, found others in "
                f"{type(plain(model)).__name__}. Leave filtered_backward out for this model."
            )
        self.rows: _Rows | None = None  # of the backbone's last forward
        self._inside = False
        backbone.register_forward_pre_hook(self._begin)
        backbone.register_forward_hook(self._end)
        for name, layer in [pair for names in (linear[-1:] if exact else linear) for pair in names.items()]:
            if not _of_keys(name) or not (exact or any(part in name for part in SECOND_OF_TWO)):
                forward = self._forward(layer.forward, _of_keys(name))
                setattr(layer, "forward", MethodType(forward, layer))  # noqa: B010  a method, to type checkers

    def __enter__(self) -> None:
        self._inside = True

    def __exit__(self, *_: Any) -> None:
        self._inside = False

    def _begin(self, *_: Any) -> None:
        # Kept until the next forward, as checkpointed blocks are passed once more in the backward.
        self.rows = _Rows() if self._inside else None

    def _end(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.rows is not None and output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(self.rows.find)

    def _forward(self, theirs: Callable[..., Tensor], all_rows_count: bool) -> Callable[[nn.Linear, Tensor], Tensor]:
        def forward(layer: nn.Linear, x: Tensor) -> Tensor:
            if self.rows is None:
                return theirs(x)
            dtype = compute_dtype(x)
            bias = None if layer.bias is None else layer.bias.to(dtype)
            return _Linear.apply(x.to(dtype), layer.weight.to(dtype), bias, self.rows, all_rows_count)

        return forward

    def compare(self, loss: Tensor) -> dict[str, float]:
        """How the filtered gradient of a loss lies to the exact one, over the blocks' parameters.

        Args:
            loss: of the model's last forward; it can still be passed backward afterwards.

        Returns:
            `cosine` of the two, and `norm_ratio`, filtered by exact.
        """
        assert self.rows is not None, "the loss was not made inside this context"
        parameters = [p for p in self.blocks.parameters() if p.requires_grad]
        filtered = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        self.rows.off = True
        exact = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        self.rows.off = False
        dot = of_filtered = of_exact = 0.0
        for one, other in zip(filtered, exact, strict=True):  # one at a time: float64 of all takes much memory
            if one is not None and other is not None:
                a, b = one.double().flatten(), other.double().flatten()
                dot, of_filtered, of_exact = dot + float(a @ b), of_filtered + float(a @ a), of_exact + float(b @ b)
        tiny = torch.finfo(torch.float64).tiny
        return {
            "cosine": dot / max((of_filtered * of_exact) ** 0.5, tiny),
            "norm_ratio": (of_filtered / max(of_exact, tiny)) ** 0.5,
        }


def _of_keys(name: str) -> bool:
    """Whether a layer makes keys or values, by its name in the block."""
    return MAKES_KEYS_OR_VALUES.search(name) is not None


class _Rows:
    """The rows that have a gradient in the backward of one forward; None: all of them, or not known yet."""

    def __init__(self) -> None:
        self.kept_K: Tensor | None = None
        self.count = 0
        self.off = False

    def of(self, x_ND: Tensor) -> Tensor | None:
        """The kept of a layer's rows; all of those of a layer that is given others (an expert its own tokens)."""
        return self.kept_K if len(x_ND) == self.count else None

    def find(self, grad_BTD: Tensor) -> None:
        """From the gradient of the backbone's output."""
        kept_K = (grad_BTD != 0).any(-1).flatten().nonzero().squeeze(-1)
        self.count = grad_BTD.shape[:-1].numel()
        everything = self.off or len(kept_K) == self.count
        self.kept_K = None if everything else kept_K


class _Linear(torch.autograd.Function):
    """`F.linear` whose backward sees the kept rows alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, all_rows_count: bool) -> Tensor:
        for_x, for_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.rows, ctx.all_rows_count, ctx.shape = rows, all_rows_count, x.shape
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_NO = grad.flatten(0, -2)
        kept_K = ctx.rows.of(grad_NO)
        grad_KO = grad_NO if kept_K is None else grad_NO.index_select(0, kept_K)
        grad_x = grad_weight = None
        if for_x:
            grad_x = grad_KO @ weight
            if kept_K is not None:
                grad_x = grad_x.new_zeros(len(grad_NO), ctx.shape[-1]).index_copy_(0, kept_K, grad_x)
            grad_x = grad_x.view(ctx.shape)
        counted_KO = grad_NO if ctx.all_rows_count else grad_KO
        if for_weight:
            x_ND, whole = x.flatten(0, -2), kept_K is None or ctx.all_rows_count
            grad_weight = counted_KO.T @ (x_ND if whole else x_ND.index_select(0, kept_K))
        return grad_x, grad_weight, counted_KO.sum(0) if for_bias else None, None, None
