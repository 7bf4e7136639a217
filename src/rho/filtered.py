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
MAKES_KEYS_OR_VALUES = re.compile(r"(^|_|\.)(k|v|kv|qkv|key|value|wqkv)(_|\.|$)", re.IGNORECASE)


class FilteredBackward:
    """Makes the backward of a model's blocks skip the rows whose gradient at the top is exactly zero.

    Only backwards of a forward in training mode are filtered, each by what its own loss left out; where all tokens
    have a gradient (plain training, retention, soft weights) nothing changes.

    Args:
        model: its blocks' `nn.Linear` layers are given another backward, those inside LoRA adapters too.
        exact: only where nothing is lost by it: the last block, but for what makes keys and values.

    Raises:
        ConfigError: a model in whose blocks no such layers are found.
    """

    def __init__(self, model: PreTrainedModel, exact: bool = False) -> None:
        backbone = plain(model).base_model
        found = [one for one in backbone.modules() if isinstance(one, nn.ModuleList) and len(one)]
        self.blocks = max(found, key=lambda one: sum(p.numel() for p in one.parameters()), default=nn.ModuleList())
        layers = [
            (name, layer)
            for block in (self.blocks[-1:] if exact else self.blocks)
            for name, layer in block.named_modules()
            # Of an adapter's two layers, the first gets its gradient through the second.
            if type(layer) is nn.Linear and not (MAKES_KEYS_OR_VALUES.search(name) and (exact or "lora_B" in name))
        ]
        if not layers:
            raise ConfigError(
                f"filtered backward: the blocks of {type(plain(model)).__name__} hold no torch.nn.Linear layers whose "
                "backward could be filtered. Leave filtered_backward out for this model."
            )
        self.rows = _Rows()
        backbone.register_forward_pre_hook(self._begin)
        backbone.register_forward_hook(self._end)
        for name, layer in layers:
            forward = self._forward(bool(MAKES_KEYS_OR_VALUES.search(name)))
            setattr(layer, "forward", MethodType(forward, layer))  # noqa: B010  a method, to type checkers

    def _begin(self, *_: Any) -> None:
        self.rows = _Rows()

    def _end(self, backbone: nn.Module, _: Any, output: Any) -> None:
        hidden_BTD = output.last_hidden_state
        if backbone.training and hidden_BTD.requires_grad:
            hidden_BTD.register_hook(self.rows.find)

    def _forward(self, all_rows_count: bool) -> Callable[[nn.Linear, Tensor], Tensor]:
        def forward(layer: nn.Linear, x: Tensor) -> Tensor:
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
        parameters = [p for p in self.blocks.parameters() if p.requires_grad]
        filtered = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        self.rows.off = True
        exact = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        self.rows.off = False
        pairs = [(a.double(), b.double()) for a, b in zip(filtered, exact, strict=True) if a is not None]
        dot, of_filtered, of_exact = (
            sum(float(x.flatten() @ y.flatten()) for x, y in one)
            for one in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
        )
        tiny = torch.finfo(torch.float64).tiny
        return {
            "cosine": dot / max((of_filtered * of_exact) ** 0.5, tiny),
            "norm_ratio": (of_filtered / max(of_exact, tiny)) ** 0.5,
        }


class _Rows:
    """The rows that have a gradient in the backward of one forward; None: all of them, or not known yet."""

    def __init__(self) -> None:
        self.kept_K: Tensor | None = None
        self.off = False

    def find(self, grad_BTD: Tensor) -> None:
        """From the gradient of the backbone's output."""
        kept_K = (grad_BTD != 0).any(-1).flatten().nonzero().squeeze(-1)
        everything = self.off or len(kept_K) == grad_BTD.shape[:-1].numel()
        self.kept_K = None if everything else kept_K


class _Linear(torch.autograd.Function):
    """`F.linear` whose backward sees the kept rows alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, all_rows_count: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.all_rows_count = rows, all_rows_count
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        x_ND, grad_NO, kept_K = x.flatten(0, -2), grad.flatten(0, -2), ctx.rows.kept_K
        grad_KO = grad_NO if kept_K is None else grad_NO.index_select(0, kept_K)
        grad_x = grad_weight = None
        if for_x:
            grad_x = grad_KO @ weight
            if kept_K is not None:
                grad_x = torch.zeros_like(x_ND).index_copy_(0, kept_K, grad_x)
            grad_x = grad_x.view_as(x)
        counted_KO = grad_NO if ctx.all_rows_count else grad_KO
        if for_weight:
            whole = kept_K is None or ctx.all_rows_count
            grad_weight = counted_KO.T @ (x_ND if whole else x_ND.index_select(0, kept_K))
        return grad_x, grad_weight, counted_KO.sum(0) if for_bias else None, None, None
