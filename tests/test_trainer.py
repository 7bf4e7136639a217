"""SelectiveTrainer against explicit, slow formulas, and at real work: LoRA, bf16, checkpointing, torch.compile ..."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from rho.corpus import Corpus
from rho.data import TrainingBlocks, collate
from rho.errors import ConfigError, DataError
from rho.models import ModelConfig, check_head, make_model, with_lora
from rho.objective import excess_loss, select_top, token_loss
from rho.score import ScoreConfig, mean_loss, score_corpus
from rho.selection import Schedule, Selector, dataset_cut, random_score
from rho.store import ScoreStore
from rho.train import TrainConfig, train
from rho.step import Step
from rho.trainer import SelectiveTrainer, selective_forward

ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def make_trainer(model: Any, selector: Selector, data: Any, folder: Path, **arguments: Any) -> SelectiveTrainer:
    named = {name: arguments.pop(name) for name in ("cut", "eval_dataset", "callbacks") if name in arguments}
    args = TrainingArguments(output_dir=str(folder / "checkpoints"), **{**ARGUMENTS, **arguments})
    return SelectiveTrainer(model, selector, args, data, **named)


# --- brute force: mask, loss and gradient of an optimizer step ---------------------------------------------------

ROWS, LENGTH, VOCABULARY, WIDTH = 4, 6, 9, 3
NAN = math.nan


class Fake(torch.nn.Module):
    """A float64 'language model' that takes a millisecond: row t of its hidden states depends on tokens 0..t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.device = torch.device("cpu")
        self.selected: list[Tensor] = []
        self.register_forward_hook(lambda *call: self.selected.append(call[2]["selected"]) if self.training else None)

    def base_model(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids).cumsum(1).tanh())

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.base_model(input_ids).last_hidden_state))


@pytest.fixture(scope="module")
def fake_trainer(tmp_path_factory: pytest.TempPathFactory) -> SelectiveTrainer:
    row = {name: value[0] for name, value in step_rows(0, torch.arange(ROWS)).items()}
    trainer = make_trainer(Fake(), Selector(), [row], tmp_path_factory.mktemp("fake"))
    trainer.model.selected.clear()  # type: ignore[union-attr, operator]
    return trainer


def step_rows(seed: int, block: Tensor) -> dict[str, Tensor]:
    """All rows of an optimizer step. Reference columns tie often; some tokens have no label, some no score."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=draw)
    ids[:, 0] = torch.arange(ROWS)  # no two rows are alike, so that losses tie in no case
    labels = ids.masked_fill(torch.rand(ROWS, LENGTH, generator=draw) < 0.2, -100)
    labels[:, 0] = -100
    if seed % 3 == 0:
        labels[1] = -100  # as padding has
    columns = torch.randint(4, (2, ROWS, LENGTH), generator=draw) / 2
    columns = columns.masked_fill(torch.rand(2, ROWS, LENGTH, generator=draw) < 0.15, NAN)
    columns[:, :, 0] = NAN
    position_ids = torch.arange(LENGTH).expand(ROWS, LENGTH)
    return {
        "input_ids": ids,
        "position_ids": position_ids,
        "labels": labels,
        "block": block,
        "ref_loss": columns[0],
        "ref_entropy": columns[1],
    }


Place = tuple[int, int]  # row and position in the step


def slow_scores(part: Selector, loss: dict[Place, float], rows: dict[str, Tensor]) -> dict[Place, float]:
    random = random_score(rows["block"], LENGTH, part.seed, 0).tolist()
    ref, entropy = rows["ref_loss"].tolist(), rows["ref_entropy"].tolist()
    rule: dict[str, Callable[[int, int], float]] = {
        "excess": lambda r, t: loss[r, t] - ref[r][t],
        "loss": lambda r, t: loss[r, t],
        "ref_loss": lambda r, t: -ref[r][t],
        "ref_entropy": lambda r, t: -entropy[r][t],
        "random": lambda r, t: random[r][t],
    }
    return {place: rule[part.score](*place) for place in loss}


def slow_groups(places: list[Place], scope: str, size: int) -> list[list[Place]]:
    """The tokens ranked together."""
    rows = {"sequence": 1, "batch": size}.get(scope, ROWS)
    return [[p for p in places if p[0] // rows == group] for group in range(ROWS // rows)]


def slow_mask(
    selector: Selector, loss: dict[Place, float], rows: dict[str, Tensor], size: int, threshold: float | None
) -> set[Place]:
    masks = []
    for part in selector.parts:
        score = slow_scores(part, loss, rows)
        mask: set[Place] = set()
        for group in slow_groups(list(loss), selector.scope, size):
            ranked = sorted(group, key=lambda p: (-score[p], p))
            mask |= set(ranked[: round(part.ratio * len(ranked))])
        if threshold is not None:
            mask = {p for p in loss if score[p] >= threshold}
        masks.append(mask)
    if len(masks) == 1:
        return masks[0]
    return masks[0] & masks[1] if selector.combine == "intersection" else masks[0] | masks[1]


def slow_weights(selector: Selector, loss: dict[Place, float], rows: dict[str, Tensor], size: int) -> dict:
    score, weights = slow_scores(selector, loss, rows), {}
    for group in filter(None, slow_groups(list(loss), selector.scope, size)):
        ranked = sorted(score[p] for p in group)[::-1]
        wanted = round(selector.ratio * len(group))
        lowest = ranked[wanted - 1] if wanted else 0.0
        rule = {
            "softmax": lambda s: math.exp((s - ranked[0]) / selector.temperature),
            "sigmoid": lambda s: 1 / (1 + math.exp((lowest - s) / selector.temperature)),  # noqa: B023
            "exponential": lambda s: min(math.exp(s / selector.temperature), selector.clip),
        }[selector.weighting]
        raw = {p: rule(score[p]) for p in group}
        mean = sum(raw.values()) / len(group)
        weights |= {p: value / mean for p, value in raw.items()}
    return weights


def slow_step(
    model: Fake, selector: Selector, rows: dict[str, Tensor], size: int, threshold: float | None
) -> tuple[set[Place], Tensor]:
    """The mask and loss of a whole optimizer step, token by token, from full logits."""
    log_p = Fake.forward(model, rows["input_ids"]).logits.log_softmax(-1)
    labels = rows["labels"].tolist()
    eligible = [
        (r, t)
        for r in range(ROWS)
        for t in range(1, LENGTH)
        if labels[r][t] != -100 and not any(rows[name][r, t].isnan() for name in selector.columns)
    ]
    loss_N = -log_p[[r for r, _ in eligible], [t - 1 for _, t in eligible], [labels[r][t] for r, t in eligible]]
    loss = dict(zip(eligible, loss_N.tolist(), strict=True))
    mask, share = set(eligible), len(eligible)
    if selector.weighting != "mask":
        weights = slow_weights(selector, loss, rows, size)
    else:
        mask = slow_mask(selector, loss, rows, size, threshold)
        share, rest = len(mask), max(len(eligible) - len(mask), 1)
        weights = {p: 1.0 if p in mask else selector.retention * share / rest for p in eligible}
    return mask, (loss_N * torch.tensor([weights[p] for p in eligible])).sum() / max(share, 1)


def fast_step(
    trainer: SelectiveTrainer, selector: Selector, rows: dict[str, Tensor], size: int, threshold: float | None
) -> tuple[set[Place], Tensor, list[Tensor]]:
    """The same by the trainer, in micro-batches of `size` rows."""
    model: Any = trainer.model
    trainer.selector, trainer._threshold = selector, threshold
    trainer.cut = None
    if selector.scope == "dataset" and selector.selective:
        eligible = selector.eligible(rows["labels"], rows)
        scores = selector.scores(None, rows, None, LENGTH, 0)
        trainer.cut = dataset_cut(lambda: zip(scores, eligible, strict=True), selector.ratio)
    trainer._stats._parts.clear()
    model.forward = MethodType(selective_forward(selector), model)
    model.zero_grad()
    model.selected.clear()
    cut = [{name: value[start : start + size] for name, value in rows.items()} for start in range(0, ROWS, size)]
    batches, count = trainer.get_batch_samples(iter(cut), len(cut), torch.device("cpu"))
    loss = sum(trainer.training_step(model, batch, count) for batch in batches)
    mask = torch.cat(model.selected)
    places = {(int(r), int(t)) for r, t in mask.nonzero()}
    return places, loss, [p.grad.clone() for p in model.parameters()]  # type: ignore[return-value]


def compare(trainer: SelectiveTrainer, selector: Selector, seed: int, size: int, threshold: float | None) -> None:
    rows, model = step_rows(seed, torch.arange(ROWS)), trainer.model
    mask, loss = slow_step(model, selector, rows, size, threshold)  # type: ignore[arg-type]
    n = int(selector.eligible(rows["labels"], rows).sum())
    asked = round(selector.ratio * n) if threshold is not None else len(mask)
    if asked == 0:
        with pytest.raises((DataError, ValueError), match=r"no token to train on|selects none of the corpus's"):
            fast_step(trainer, selector, rows, size, threshold)
        return
    found, fast_loss, gradients = fast_step(trainer, selector, rows, size, threshold)
    assert found == mask
    if selector.scope == "step" and selector.second is None:
        assert len(found) == round(selector.ratio * n)
    if not mask:  # nothing lies above the threshold
        assert all(not gradient.any() for gradient in gradients)
        return
    torch.testing.assert_close(fast_loss, loss.detach(), rtol=1e-6, atol=0)
    for fast, slow in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):  # type: ignore
        assert (fast - slow).norm() <= 1e-6 * slow.norm()


ratios = st.one_of(st.floats(0.02, 1.0), st.sampled_from([0.1, 0.5, 0.6, 1.0]))
sizes = st.sampled_from([4, 4, 2, 1])
seeds = st.integers(0, 10**6)


@pytest.mark.parametrize("kind", ["excess", "loss", "static", "random"])
@settings(max_examples=1000, deadline=None)
@given(data=st.data(), ratio=ratios, size=sizes, seed=seeds)
def test_mask_loss_and_gradient_of_a_step_equal_the_formula(
    fake_trainer: SelectiveTrainer, kind: Any, data: st.DataObject, ratio: float, size: int, seed: int
) -> None:
    score = data.draw(st.sampled_from(["ref_loss", "ref_entropy"])) if kind == "static" else kind
    scopes = ["sequence", "batch", "step", "running", *(["dataset"] if kind == "static" else [])]
    scope: Any = data.draw(st.sampled_from(scopes))
    threshold, retention = None, 0.0
    if scope == "running" and ratio < 1:
        centre = {"excess": 1.0, "loss": 2.0, "random": 0.0}.get(score, -1.0)
        threshold = data.draw(st.one_of(st.none(), st.just(centre), st.floats(centre - 0.5, centre + 0.5, width=32)))
    elif scope != "running":
        retention = data.draw(st.sampled_from([0.0, 0.0, 0.3]))
    selector = Selector(score, ratio, scope, retention=retention, seed=seed % 5)
    compare(fake_trainer, selector, seed, size, threshold)


@settings(max_examples=1000, deadline=None)
@given(data=st.data(), ratio=ratios, second_ratio=ratios, size=sizes, seed=seeds)
def test_mask_loss_and_gradient_of_two_combined_selections_equal_the_formula(
    fake_trainer: SelectiveTrainer,
    data: st.DataObject,
    ratio: float,
    second_ratio: float,
    size: int,
    seed: int,
) -> None:
    scores = st.sampled_from(["excess", "loss", "ref_loss", "ref_entropy", "random"])
    scope: Any = data.draw(st.sampled_from(["sequence", "batch", "step"]))
    second = Selector(data.draw(scores), second_ratio, scope)  # type: ignore[arg-type]
    retention = data.draw(st.sampled_from([0.0, 0.3]))
    first, combine = data.draw(scores), data.draw(st.sampled_from(["intersection", "union"]))
    selector = Selector(first, ratio, scope, second=second, combine=combine, retention=retention)  # type: ignore
    compare(fake_trainer, selector, seed, size, None)


@settings(max_examples=600, deadline=None)
@given(data=st.data(), ratio=ratios, size=sizes, seed=seeds)
def test_loss_and_gradient_with_soft_weights_equal_the_formula(
    fake_trainer: SelectiveTrainer, data: st.DataObject, ratio: float, size: int, seed: int
) -> None:
    weighting: Any = data.draw(st.sampled_from(["softmax", "sigmoid", "exponential"]))
    score: Any = data.draw(st.sampled_from(["excess", "loss", "ref_loss", "ref_entropy"]))
    scope: Any = data.draw(st.sampled_from(["sequence", "batch"]))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    selector = Selector(score, ratio, scope, weighting=weighting, temperature=temperature)
    compare(fake_trainer, selector, seed, size, None)


@settings(max_examples=200, deadline=None)
@given(
    st.permutations(range(ROWS)), st.sampled_from(["sequence", "step"]), st.sampled_from(["excess", "random"]), seeds
)
def test_the_selection_moves_with_the_rows(
    fake_trainer: SelectiveTrainer, order: list[int], scope: Any, score: Any, seed: int
) -> None:
    selector = Selector(score, 0.5, scope)
    rows = step_rows(seed, torch.arange(ROWS))
    moved = {name: value[order] for name, value in rows.items()}
    (mask, loss, gradients), (moved_mask, moved_loss, moved_gradients) = (
        fast_step(fake_trainer, selector, given_rows, 2, None) for given_rows in (rows, moved)
    )
    assert {(order[r], t) for r, t in moved_mask} == mask
    for a, b in zip([loss, *gradients], [moved_loss, *moved_gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
