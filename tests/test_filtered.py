"""The filtered backward against the dense one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MambaConfig, Qwen3Config

from rho.errors import ConfigError
from rho.filtered import MAKES_KEYS_OR_VALUES, FilteredBackward
from rho.models import with_lora

SMALL: dict[str, Any] = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16,
}  # fmt: skip
KINDS: dict[str, Callable[..., Any]] = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gpt_neox": GPTNeoXConfig}
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
KEPT = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.float64)  # a row's weight in the loss


def model(kind: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(KINDS[kind](**{**SMALL, "num_key_value_heads": 2, **settings}))
    return made.double().train()


def loss(network: Any, weight_BT: Tensor = KEPT, filtered: Any = None) -> Tensor:
    with filtered or nullcontext():
        hidden = network.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    return (hidden.pow(3).sum(-1) * weight_BT).sum()


def gradients(network: Any, weight_BT: Tensor = KEPT, filtered: Any = None) -> dict[str, Tensor]:
    network.zero_grad()
    loss(network, weight_BT, filtered).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def differing(found: dict[str, Tensor], exact: dict[str, Tensor]) -> set[str]:
    assert found.keys() == exact.keys()
    return {name for name in exact if not torch.allclose(found[name], exact[name], rtol=1e-11, atol=1e-13)}


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_last_block_nothing_is_lost(kind: str) -> None:
    network = model(kind)
    exact = gradients(network)
    filtered = FilteredBackward(network, exact=True)
    assert differing(gradients(network, KEPT, filtered), exact) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_a_gradient_changes_no_weight_but_those_of_keys_and_values(kind: str) -> None:
    """The gradients of weight and bias are sums over the kept rows of what the filtered stream brings there."""
    network = model(kind)
    brought: dict[str, tuple[Tensor, Tensor]] = {}  # gradient of the output, input: a row each

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: Any, output: Tensor) -> None:
            x = given[0].detach().flatten(0, 1)
            output.register_hook(lambda grad: brought.__setitem__(name, (grad.flatten(0, 1), x)))

        return hook

    filtered = FilteredBackward(network)
    for name, layer in network.named_modules():
        if type(layer) is nn.Linear and "layers" in name:
            layer.register_forward_hook(watch(name))
    found = gradients(network, KEPT, filtered)
    kept = KEPT.flatten() != 0
    assert len(brought) >= 3 * 4
    for name, (grad, x) in brought.items():
        keys_or_values = MAKES_KEYS_OR_VALUES.search(name)
        counted = torch.ones_like(kept) if keys_or_values else kept
        expected = {"weight": grad[counted].T @ x[counted], "bias": grad[counted].sum(0)}
        for part in ("weight", "bias"):
            if f"{name}.{part}" in found:
                torch.testing.assert_close(found[f"{name}.{part}"], expected[part], rtol=1e-11, atol=1e-13)
        if keys_or_values:
            assert grad[~kept].abs().max() > 0  # which is what is kept of them


def test_only_blocks_below_the_last_lose_something() -> None:
    network = model()
    exact = gradients(network)
    lost = differing(gradients(network, KEPT, FilteredBackward(network)), exact)
    assert lost and not [name for name in lost if ".layers.2." in name and "norm" not in name]


class Expert(nn.Module):
    """An MLP that gives its layer every other token only, as a router would."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, ::2] = self.inner(x[:, ::2])
        return out


def test_a_layer_that_is_given_other_rows_than_the_stream_has_is_left_as_it_is() -> None:
    network = model()
    network.model.layers[-1].mlp = Expert()
    exact = gradients(network)
    lost = differing(gradients(network, KEPT, FilteredBackward(network)), exact)
    assert lost and not [name for name in lost if ".layers.2.mlp" in name]


def test_with_a_gradient_for_every_token_nothing_is_filtered() -> None:
    network = model()
    exact = gradients(network, KEPT + 0.1)
    assert differing(gradients(network, KEPT + 0.1, FilteredBackward(network)), exact) == set()


def test_only_what_is_passed_inside_the_context_is_filtered() -> None:
    network = model()
    exact = gradients(network)
    filtered = FilteredBackward(network)
    assert differing(gradients(network), exact) == set()
    assert differing(gradients(network, KEPT, filtered), exact)
    assert differing(gradients(network), exact) == set()
    assert network.model(IDS, return_dict=False)[0].shape == (2, 6, 8)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # its name until 5.20
def test_it_holds_with_gradient_checkpointing_and_biases() -> None:
    plain, checkpointed = model(attention_bias=True, mlp_bias=True), model(attention_bias=True, mlp_bias=True)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    one, other = (gradients(network, KEPT, FilteredBackward(network)) for network in (plain, checkpointed))
    assert differing(one, other) == set()
    assert differing(one, gradients(plain))


def test_under_autocast_the_products_are_those_of_low_precision() -> None:
    network, patched = model().float(), model().float()
    filtered = FilteredBackward(patched)
    everything = (KEPT + 0.1).float()
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss(network, everything), loss(patched, everything, filtered)
    for one in losses:
        one.backward()
    assert losses[0] == losses[1]  # in float32 they would differ
    for (name, p), q in zip(network.model.named_parameters(), patched.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=3e-2, atol=3e-2 * float(q.grad.abs().max()) + 1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_adapters_are_filtered_too() -> None:
    def adapted() -> Any:
        return with_lora(model().float(), {"target_modules": "all-linear", "init_lora_weights": False}).double().train()

    exact, filtered = adapted(), adapted()
    context = FilteredBackward(filtered)
    whole = {n: p for n, p in gradients(exact.get_base_model()).items() if "lora" in n}
    lost = differing(
        {n: p for n, p in gradients(filtered.get_base_model(), KEPT, context).items() if "lora" in n}, whole
    )
    assert lost and not [name for name in lost if ".layers.2." in name and "norm" not in name]


def test_compare_tells_how_near_it_comes_and_leaves_the_backward_possible() -> None:
    network = model()
    exact, other = gradients(network), gradients(model(), KEPT)
    assert differing(exact, other) == set()
    filtered_backward = FilteredBackward(network)
    filtered = gradients(network, KEPT, filtered_backward)
    blocks = [name for name in exact if ".layers." in name]
    a, b = (torch.cat([grads[name].flatten() for name in blocks]) for grads in (filtered, exact))
    total = loss(network, KEPT, filtered_backward)
    found = filtered_backward.compare(total)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-9)
    assert found["norm_ratio"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-9)
    assert 0.0 < found["cosine"] < 1.0
    network.zero_grad()
    total.backward()
    assert differing({n: p.grad for n, p in network.named_parameters() if p.grad is not None}, filtered) == set()


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=2, n_positions=16),  # its layers are no nn.Linear
        MambaConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1),  # its tokens meet in a state
    ],
    ids=["gpt2", "mamba"],
)
def test_a_model_whose_backward_can_not_be_filtered_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="found others in"):
        FilteredBackward(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("self_attn.k_proj", True), ("self_attn.v_proj.lora_A.default", True), ("attn.c_attn", True), ("attn.Wv", True),
        ("attention.query_key_value", True), ("self_attn.qkv_proj", True), ("self_attn.kv_a_proj_with_mqa", True),
        ("self_attn.kv_b_proj", True), ("attn.attention.value", True), ("attn.Wqkv", True),
        ("self_attn.q_proj", False), ("self_attn.o_proj", False), ("mlp.gate_proj", False), ("mlp.down_proj", False),
        ("mlp.dense_4h_to_h", False), ("attention.dense", False), ("mlp.c_fc", False),
    ],
)  # fmt: skip
def test_what_makes_keys_or_values_is_known_by_its_name(name: str, found: bool) -> None:
    assert bool(MAKES_KEYS_OR_VALUES.search(name)) is found
