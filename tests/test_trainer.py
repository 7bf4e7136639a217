"""SelectiveTrainer against explicit, slow formulas, and at real work: LoRA, bf16, checkpointing, torch.compile ..."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import GradientAccumulationPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as trainer_module

from rho import backends, linear_loss
from rho.corpus import Corpus
from rho.data import RowOrder, TrainingBlocks, collate
from rho.durable import HOOKS, DurableTrainer
from rho.errors import ConfigError, DataError, MismatchError, RhoError
from rho.evaluate import EvaluateConfig, checkpoints_of, evaluate
from rho.forward import selective_forward
from rho.models import ModelConfig, check_head, make_model, save_model, with_lora
from rho.objective import excess_loss, select_top, token_loss
from rho.references.model import mean_loss
from rho.score import ScoreConfig, score_corpus
from rho.selection import Cut, RunningThreshold, Schedule, Selector, dataset_cut, random_score
from rho.stats import SelectionStats
from rho.store import ScoreStore
from rho.train import TrainConfig, train
from rho.trainer import SelectiveTrainer

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
# Later versions of Transformers have another name for it, and warn of this one.
KNOWN = TrainingArguments.__dataclass_fields__
CHECKPOINTING = {"activation_checkpointing" if "activation_checkpointing" in KNOWN else "gradient_checkpointing": True}


def make_trainer(model: Any, selector: Selector, data: Any, folder: Path, **arguments: Any) -> SelectiveTrainer:
    named = {name: arguments.pop(name) for name in ("cut", "eval_dataset", "callbacks") if name in arguments}
    args = TrainingArguments(output_dir=str(folder / "checkpoints"), **{**ARGUMENTS, **arguments})
    return SelectiveTrainer(model, selector, args, data, **named)


@pytest.fixture
def model_config(architecture: dict) -> ModelConfig:
    return ModelConfig(architecture=architecture)


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
        self.config = PretrainedConfig(vocab_size=VOCABULARY)
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
        "retrospective": lambda r, t: ref[r][t] - loss[r, t],
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
        ranked = sorted((score[p] for p in group), reverse=True)
        wanted = round(selector.ratio * len(group))
        threshold = ranked[wanted - 1] if wanted else 0.0
        raw = {}
        for p in group:
            softmax = math.exp((score[p] - ranked[0]) / selector.temperature)
            sigmoid = 1 / (1 + math.exp((threshold - score[p]) / selector.temperature))
            exponential = min(math.exp(score[p] / selector.temperature), selector.clip)
            raw[p] = {"softmax": softmax, "sigmoid": sigmoid, "exponential": exponential}[selector.weighting]
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
    trainer.selector, trainer._threshold = selector, RunningThreshold(threshold)
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
    if asked == 0 and (n == 0 or selector.second is None):
        with pytest.raises((DataError, ValueError), match=r"no token to train on|selects none of the corpus's"):
            fast_step(trainer, selector, rows, size, threshold)
        return
    found, fast_loss, gradients = fast_step(trainer, selector, rows, size, threshold)
    assert found == mask
    if selector.scope == "step" and selector.second is None:
        assert len(found) == round(selector.ratio * n)
    if not mask:  # nothing lies above the threshold, or in both selections
        assert selector.retention or all(not gradient.any() for gradient in gradients)
        return
    torch.testing.assert_close(fast_loss, loss.detach(), rtol=1e-6, atol=0)
    for fast, slow in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):  # type: ignore
        assert (fast - slow).norm() <= 1e-6 * slow.norm()


EXAMPLES = {
    "excess-sequence": (Selector("excess", 0.5), None),
    "excess-batch": (Selector("excess", 0.5, "batch"), None),
    "excess-step": (Selector("excess", 0.5, "step"), None),
    "excess-running": (Selector("excess", 0.5, "running"), 1.2),
    "entropy-dataset": (Selector("ref_entropy", 0.5, "dataset"), None),
    "retention": (Selector("excess", 0.5, retention=0.3), None),
    "softmax": (Selector("excess", 0.5, weighting="softmax"), None),
    "sigmoid-batch": (Selector("excess", 0.5, "batch", weighting="sigmoid"), None),
    "union": (Selector("loss", 0.3, "step", second=Selector("ref_loss", 0.3, "step"), combine="union"), None),
}


@pytest.mark.parametrize(("selector", "threshold"), EXAMPLES.values(), ids=EXAMPLES)
def test_a_step_equals_the_formula(fake_trainer: SelectiveTrainer, selector: Selector, threshold: float | None) -> None:
    for seed in range(5):
        compare(fake_trainer, selector, seed, 2, threshold)


@pytest.mark.parametrize("chunk", [7, 2])  # less than a micro-batch; less than a row
@pytest.mark.parametrize(("selector", "threshold"), EXAMPLES.values(), ids=EXAMPLES)
def test_a_step_equals_the_formula_however_few_rows_pass_the_head_at_once(
    fake_trainer: SelectiveTrainer,
    selector: Selector,
    threshold: float | None,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_loss, "CHUNK_CPU", chunk)
    for seed in range(5):
        compare(fake_trainer, selector, seed, 4, threshold)


ratios = st.one_of(st.floats(0.02, 1.0), st.sampled_from([0.1, 0.5, 0.6, 1.0]))
sizes = st.sampled_from([4, 4, 2, 1])
seeds = st.integers(0, 10**6)


@pytest.mark.parametrize("kind", ["excess", "loss", "static", "random"])
@settings(max_examples=1000, deadline=None)
@given(data=st.data(), ratio=ratios, size=sizes, seed=seeds)
def test_mask_loss_and_gradient_of_a_step_equal_the_formula(
    fake_trainer: SelectiveTrainer, kind: Any, data: st.DataObject, ratio: float, size: int, seed: int
) -> None:
    kinds = {"static": ["ref_loss", "ref_entropy"], "excess": ["excess", "retrospective"]}
    score = data.draw(st.sampled_from(kinds.get(kind, [kind])))
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
    scores = st.sampled_from(["excess", "retrospective", "loss", "ref_loss", "ref_entropy", "random"])
    scope: Any = data.draw(st.sampled_from(["sequence", "batch", "step"]))
    second = Selector(data.draw(scores), second_ratio, scope)  # type: ignore[arg-type]
    retention = data.draw(st.sampled_from([0.0, 0.3]))
    first, combine = data.draw(scores), data.draw(st.sampled_from(["intersection", "union"]))
    selector = Selector(first, ratio, scope, second=second, combine=combine, retention=retention)  # type: ignore
    compare(fake_trainer, selector, seed, size, None)


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=100, deadline=None)
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


# --- eligibility -------------------------------------------------------------------------------------------------


def test_padding_first_special_and_scoreless_tokens_are_neither_selected_nor_counted(
    fake_trainer: SelectiveTrainer,
) -> None:
    # Row 0 is plain; row 1 has two tokens without a label and one without a score; rows 2 and 3 are padding.
    rows = step_rows(1, torch.tensor([7, 8, -1, -1]))
    rows["labels"] = rows["input_ids"].clone()
    rows["labels"][:, 0] = rows["labels"][1, 2] = rows["labels"][1, 3] = rows["labels"][2:] = -100
    rows["ref_loss"] = torch.full((ROWS, LENGTH), 0.5)
    rows["ref_loss"][1, 4] = NAN
    possible = {(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 1), (1, 5)}
    for scope in ("batch", "step"):
        everything, _, _ = fast_step(fake_trainer, Selector("excess", 0.99, scope), rows, 4, None)  # type: ignore[arg-type]
        assert everything == possible
        assert fake_trainer._step.asked == 7
    half, _, _ = fast_step(fake_trainer, Selector("excess", 0.5), rows, 2, None)  # round(2.5) and round(1.0)
    assert half < possible and len(half) == 3 == fake_trainer._step.asked
    # A running threshold below every score, and a random draw, reach no other token either.
    below, _, _ = fast_step(fake_trainer, Selector("excess", 0.5, "running"), rows, 4, -1e9)
    assert below == possible
    drawn, _, _ = fast_step(fake_trainer, Selector("random", 1.0, "step"), rows, 2, None)
    assert drawn == possible | {(1, 4)}  # needs no score


def test_a_warm_up_from_one_trains_on_tokens_without_a_score_until_it_selects(fake_trainer: SelectiveTrainer) -> None:
    rows = step_rows(2, torch.arange(ROWS))  # some labelled tokens have no reference loss
    schedule = Schedule(((0, 1.0), (1, 0.5)))
    mask, _, _ = fast_step(fake_trainer, Selector("excess", scope="step", schedule=schedule), rows, 2, None)
    assert len(mask) == (rows["labels"] != -100).sum()


# --- scope running -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [0.0, -0.05, 0.05])
@pytest.mark.parametrize("tokens", [64, 2048])
def test_a_running_threshold_realises_the_asked_ratio_while_scores_drift(drift: float, tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    threshold, realised = RunningThreshold(), []
    for step in range(150):
        score = torch.randn(tokens, generator=draw) + drift * step
        share = 0.6 if threshold.value is None else (score >= threshold.value).double().mean().item()
        realised.append(share)
        threshold.follow(score, 0.6, share)
    assert sum(realised[20:]) / len(realised[20:]) == pytest.approx(0.6, abs=0.01)


def test_a_rank_of_padding_has_no_say_in_the_running_threshold() -> None:
    threshold = RunningThreshold()
    threshold.follow(torch.tensor([]), 0.5, 0.5, lambda own: [own, torch.tensor([3.0], dtype=torch.float64)])
    assert threshold.value == 3.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_running_training_realises_the_asked_ratio_in_one_pass(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path, accumulation: int
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    model = make_model(model_config, Corpus(corpus).vocab_size)
    cut = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(
        model, Selector("excess", 0.6, "running"), data, tmp_path, max_steps=60, learning_rate=5e-3, **cut
    )
    passes: list[bool] = []
    model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "ratio" in entry]
    assert log[0]["ratio"] == pytest.approx(0.6, abs=0.005)  # ranked exactly
    eligible, selected = (sum(entry[name] for entry in log[10:]) for name in ("eligible", "selected"))
    assert selected / eligible == pytest.approx(0.6, abs=0.01)
    assert log[0]["loss_all"] - log[-1]["loss_all"] > 0.5  # the losses did fall
    assert passes.count(False) == (2 if accumulation > 1 else 0)  # only the first step was passed twice


# --- rows, several references, schedules ------------------------------------------------------------------------


def test_rows_come_once_an_epoch_in_an_order_of_the_epochs_own() -> None:
    order = RowOrder(10, 4, seed=3)
    first = list(order)
    assert sorted(first[:10]) == list(range(10)) and first[10:] == [-1, -1] and len(order) == 12
    assert list(RowOrder(10, 8, seed=3))[:10] == first[:10]  # however they are cut
    order.set_epoch(1)
    second = list(order)
    assert sorted(second[:10]) == list(range(10)) and second != first
    order.set_epoch(0)
    assert list(order) == first != list(RowOrder(10, 4, seed=4))


@pytest.fixture(scope="module")
def other_scores(corpus: Path, architecture: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of an untrained reference: the 'unwanted domain'."""
    folder = tmp_path_factory.mktemp("other")
    make_model(ModelConfig(architecture=architecture), Corpus(corpus).vocab_size, seed=9).save_pretrained(folder / "m")
    score_corpus(ScoreConfig(dtype="float32"), Corpus(corpus), ModelConfig(path=str(folder / "m")), folder / "scores")
    return folder / "scores"


def test_several_references_become_one_column_by_their_rule(corpus: Path, scores: Path, other_scores: Path) -> None:
    both = {"wanted": ScoreStore(scores), "unwanted": ScoreStore(other_scores)}
    a, b = (torch.tensor(store.row(3, ("ref_loss",))["ref_loss"]) for store in both.values())
    assert (a[1:] < b[1:]).any() and (a[1:] > b[1:]).any()
    rules: Mapping[Any, Tensor] = {"mean": (a + b) / 2, "min": a.minimum(b), "max": a.maximum(b), "weights": a - b}
    for rule, expected in rules.items():
        weights = {"unwanted": -1.0, "wanted": 1.0} if rule == "weights" else None
        row = TrainingBlocks(Corpus(corpus), both, rule, weights)[3]
        torch.testing.assert_close(row["ref_loss"], expected, equal_nan=True)
    three = TrainingBlocks(Corpus(corpus), {**both, "third": both["wanted"]})[3]
    torch.testing.assert_close(three["ref_loss"], (2 * a + b) / 3, equal_nan=True)


@pytest.mark.parametrize("weights", [None, {"wanted": 1.0}, {"wanted": 1.0, "other": -1.0}])
def test_weights_of_other_references_than_those_given_are_refused(
    corpus: Path, scores: Path, other_scores: Path, weights: dict | None
) -> None:
    both = {"wanted": ScoreStore(scores), "unwanted": ScoreStore(other_scores)}
    with pytest.raises(ConfigError, match=r"the scores given are wanted, unwanted\. Name each of them once"):
        TrainingBlocks(Corpus(corpus), both, "weights", weights)


def test_weights_without_their_rule_are_refused(corpus: Path, scores: Path) -> None:
    with pytest.raises(ConfigError, match="weights are for combine 'weights', found combine 'mean'"):
        TrainingBlocks(Corpus(corpus), ScoreStore(scores), weights={"reference": 1.0})


@pytest.mark.parametrize("scope", ["sequence", "step"])
def test_a_schedule_is_followed_and_logged(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path, scope: Any
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    selector = Selector("excess", scope=scope, schedule=Schedule(((0, 1.0), (4, 0.4)), "linear"))
    trainer = make_trainer(make_model(model_config, 300), selector, data, tmp_path, max_steps=6)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "ratio" in entry]
    assert [entry["ratio_asked"] for entry in log] == pytest.approx([1.0, 0.85, 0.7, 0.55, 0.4, 0.4])
    for entry in log:
        assert entry["ratio"] == pytest.approx(entry["ratio_asked"], abs=0.5 / 15 if scope == "sequence" else 0.01)


def test_what_was_selected_reaches_every_tracker_through_on_log(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    seen: list[dict] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    trainer = make_trainer(
        make_model(model_config, 300), Selector("excess", 0.6), data, tmp_path, max_steps=2, callbacks=[Tracker()]
    )
    trainer.train()
    wanted = {"loss", "ratio", "ratio_asked", "selected", "eligible", "loss_selected", "loss_unselected", "tokens_seen"}
    assert all(wanted <= logs.keys() for logs in seen[:2])
    assert all(isinstance(value, int | float) for logs in seen for value in logs.values())
    # What `Trainer` calls the loss is Eq. 4.
    assert seen[0]["loss"] == pytest.approx(seen[0]["loss_selected"], rel=1e-6)


# --- real work ---------------------------------------------------------------------------------------------------

SELECTORS = [Selector("excess", 0.6), Selector("excess", 0.6, "step"), Selector("excess", 0.6, weighting="softmax")]
EVERY_SELECTOR = pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: f"{s.scope}-{s.weighting}")


def losses(
    corpus: Path, scores: Path, architecture: dict, selector: Selector, folder: Path, **arguments: Any
) -> list[float]:
    """Losses of the selected tokens over a few steps."""
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    model = make_model(ModelConfig(architecture=architecture), Corpus(corpus).vocab_size)
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(model, selector, data, folder, max_steps=5, **cut, **arguments)
    trainer.train()
    found = [entry["loss_selected"] for entry in trainer.state.log_history if "loss_selected" in entry]
    assert len(found) == 5
    return found


@EVERY_SELECTOR
def test_gradient_checkpointing_changes_no_loss(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path, selector: Selector
) -> None:
    plain = losses(corpus, scores, architecture, selector, tmp_path)
    assert losses(corpus, scores, architecture, selector, tmp_path, **CHECKPOINTING) == pytest.approx(plain, rel=1e-6)


@EVERY_SELECTOR
def test_bfloat16_autocast_moves_the_losses_by_less_than_a_hundredth(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path, selector: Selector
) -> None:
    plain = losses(corpus, scores, architecture, selector, tmp_path)
    half = losses(corpus, scores, architecture, selector, tmp_path, bf16=True, use_cpu=True)
    assert half == pytest.approx(plain, rel=1e-2)
    assert half != plain


@EVERY_SELECTOR
def test_torch_compile_changes_no_loss(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path, selector: Selector
) -> None:
    plain = losses(corpus, scores, architecture, selector, tmp_path)
    torch._dynamo.reset()
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = losses(corpus, scores, architecture, selector, tmp_path, **compiling)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled == pytest.approx(plain, rel=1e-5)


# peft still asks transformers by a name that is going away.
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = {
    "frozen head": {"target_modules": ["q_proj", "v_proj"]},
    "tuned head": {"target_modules": ["q_proj", "lm_head"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(architecture: dict, lora: dict) -> Any:
    """A model with adapters that do something."""
    config = ModelConfig(architecture={**architecture, "tie_word_embeddings": False})
    model = with_lora(make_model(config, 300), {"r": 4, "lora_alpha": 8, **lora})
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


@peft_warns
@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
def test_loss_and_gradient_with_lora_equal_the_formula_on_the_adapted_models_own_logits(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path, lora: dict
) -> None:
    pytest.importorskip("peft")
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    batch = collate([data[i] for i in range(4)])
    model = adapted(architecture, lora)
    check_head(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained) == (lora != LORA["frozen head"])
    loss = token_loss(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"])
    eligible = (batch["labels"] != -100) & batch["ref_loss"].isfinite()
    mask = select_top(excess_loss(loss.detach(), batch["ref_loss"]), eligible, 0.6)
    formula = loss[mask].sum() / mask.sum()
    expected = torch.autograd.grad(formula, list(trained.values()))

    trainer = make_trainer(model, Selector("excess", 0.6), data, tmp_path)
    [micro_batch], count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    ours = trainer.compute_loss(model, micro_batch, num_items_in_batch=count)
    torch.testing.assert_close(ours, formula)
    for name, a, b in zip(trained, torch.autograd.grad(ours, list(trained.values())), expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm(), name


@peft_warns
@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
def test_a_lora_training_ends_in_a_plain_model_with_the_adapted_models_logits(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path, lora: dict
) -> None:
    pytest.importorskip("peft")
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    model = adapted(architecture, lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model, Selector("excess", 0.6, "step"), data, tmp_path, **CHECKPOINTING, learning_rate=1e-2)
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, f"{name}: adapters alone are trained"
    del model.forward
    ids = data[0]["input_ids"][None]
    expected = model.eval()(input_ids=ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@peft_warns
def test_the_train_stage_with_lora_writes_a_plain_model(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    config = TrainConfig(
        ratio=0.6, lora={"r": 2, "target_modules": ["q_proj"]}, arguments={"max_steps": 2, "save_steps": 1}
    )
    with pytest.raises(ConfigError, match="adapters need a finished model to adapt"):
        train(config, Corpus(corpus), model_config, tmp_path / "new", ScoreStore(scores))
    save_model(make_model(model_config, 300), tmp_path / "base")
    base = ModelConfig(path=str(tmp_path / "base"))
    manifests = [train(config, Corpus(corpus), base, tmp_path / name, ScoreStore(scores)) for name in ("slm", "again")]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "slm" / "model").config.model_type == "llama"
    contents = [[checkpoint["content"] for checkpoint in made.facts["checkpoints"]] for made in manifests]
    assert contents[0] == contents[1], "new adapters are those of the seed"
    sets = {"held-out": Corpus(corpus, "validation")}
    evaluate(EvaluateConfig(), checkpoints_of(tmp_path / "slm", "slm"), sets, tmp_path / "losses")
    last = json.loads((tmp_path / "losses" / "losses.jsonl").read_text().splitlines()[-1])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "slm" / "model")
    assert last["loss"] == pytest.approx(mean_loss(merged, sets["held-out"]).nats_per_token, rel=1e-6)


@peft_warns
@pytest.mark.parametrize(
    ("lora", "tied", "message"),
    [
        ({"ranks": 2}, False, r"lora: .*ranks"),
        ({"target_modules": ["lm_head"]}, True, "name the embeddings or the head, which are one weight"),
        ({"target_modules": ["embed_tokens"]}, True, "name the embeddings or the head, which are one weight"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True, "which are one weight"),
        ({"target_modules": ["lm_head"], "use_dora": True}, False, "lora.use_dora: not with an adapted head"),
        ({"target_modules": ["lm_head"], "lora_dropout": 0.1}, False, "lora.lora_dropout: not with an adapted head"),
        (
            {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
            False,
            "'pissa' changes the weights of the model",
        ),
    ],
)
def test_lora_that_would_train_or_merge_wrongly_is_refused(
    architecture: dict, lora: dict, tied: bool, message: str
) -> None:
    pytest.importorskip("peft")
    model = make_model(ModelConfig(architecture={**architecture, "tie_word_embeddings": tied}), 300)
    with pytest.raises(ConfigError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_lora(model, lora)


def test_a_model_can_be_called_by_others_during_and_after_the_training(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    model = make_model(ModelConfig(architecture=architecture), 300)
    trainer = make_trainer(model, Selector(ratio=0.6), data, tmp_path, max_steps=1)
    ids = data[0]["input_ids"][None]
    assert model(input_ids=ids).logits.shape == (1, 16, 300)
    trainer.train()
    assert model.eval().generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 18)


@pytest.mark.parametrize("second", [None, Selector("ref_entropy", 0.1)])
def test_a_step_without_a_selected_token_has_a_zero_gradient(fake_trainer: SelectiveTrainer, second: Any) -> None:
    rows = step_rows(1, torch.arange(ROWS))
    rows["ref_entropy"] = -rows["ref_loss"]  # what the one selects the other does not
    selector = Selector("ref_loss", 0.1, second=second)
    if second is None:
        selector = Selector("ref_loss", 0.1, "dataset")
    rows = {name: value[:1] for name, value in rows.items()}
    fake_trainer.cut = Cut(math.inf, 0, 0) if second is None else None
    fake_trainer.selector = selector
    model = fake_trainer.model
    model.forward = MethodType(selective_forward(selector), model)
    model.zero_grad()
    batches, count = fake_trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    loss = fake_trainer.training_step(model, batches[0], count)
    assert count == 1 and loss == 0
    assert all(not p.grad.any() for p in model.parameters())  # type: ignore[union-attr]


def test_what_is_left_at_the_end_is_logged_as_well(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    model = make_model(ModelConfig(architecture=architecture), 300)
    trainer = make_trainer(model, Selector(ratio=0.6), data, tmp_path, max_steps=5, logging_steps=3)
    trainer.train()
    records = [entry for entry in trainer.state.log_history if "tokens_seen" in entry]
    assert [record["step"] for record in records] == [1, 3, 5]
    assert records[-1]["tokens_seen"] == 5 * trainer.args.train_batch_size * 16


# --- the target: evaluation, early stopping, the best model ------------------------------------------------------


def test_the_evaluation_loss_is_that_of_mean_loss(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    target = Corpus(corpus, "validation")
    model = make_model(model_config, target.vocab_size)
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    trainer = make_trainer(
        model,
        Selector("excess", 0.6),
        data,
        tmp_path,
        eval_dataset=TrainingBlocks(target),
        per_device_eval_batch_size=3,
    )
    metrics, expected = trainer.evaluate(), mean_loss(model, target)
    assert metrics["eval_loss"] == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert metrics["eval_tokens"] == expected.tokens


EVALUATING = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


def test_training_stops_early_where_the_target_loss_no_longer_falls(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    still = {**EVALUATING, "learning_rate": 1e-30, "max_steps": 20, "metric_for_best_model": "eval_loss"}
    config = TrainConfig(ratio=0.6, early_stopping=2, arguments=still)
    target = Corpus(corpus, "validation")
    train(config, Corpus(corpus), model_config, tmp_path / "slm", ScoreStore(scores), target, allow_weak_reference=True)
    assert len((tmp_path / "slm" / "steps.jsonl").read_text().splitlines()) == 3  # the first, and two no better


def test_the_best_model_on_the_target_is_the_one_kept(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    # Ever larger steps: the loss falls, then rises.
    worse = {**EVALUATING, "learning_rate": 2.0, "warmup_steps": 12, "max_steps": 12, "load_best_model_at_end": True}
    target, out = Corpus(corpus, "validation"), tmp_path / "slm"
    config = TrainConfig(ratio=0.6, arguments=worse)
    train(config, Corpus(corpus), model_config, out, ScoreStore(scores), target, allow_weak_reference=True)
    found = {}
    for folder in [*out.glob("checkpoints/checkpoint-*"), out / "model"]:
        found[folder.name] = mean_loss(AutoModelForCausalLM.from_pretrained(folder), target).nats_per_token
    final = found.pop("model")
    assert final == min(found.values()) < found["checkpoint-12"]


def test_the_model_card_says_what_the_model_was_made_of(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    config = TrainConfig(ratio=0.6, scope="step", seed=4, arguments={"max_steps": 1})
    train(config, Corpus(corpus), model_config, tmp_path / "slm", ScoreStore(scores))
    card = (tmp_path / "slm" / "model" / "README.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.*?) \|$", card, re.M))
    assert rows["base model"] == "new llama"
    assert rows["score, ratio, scope"] == "excess, 0.6, step" and rows["seed"] == "4"
    assert rows["corpus (SHA-256)"] == Corpus(corpus).fingerprint
    assert rows["scores:reference (SHA-256)"] == ScoreStore(scores).manifest.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", rows["model (SHA-256)"])
    assert rows["torch"] == torch.__version__ and rows["transformers"]


def test_a_trainer_that_lacks_what_is_overridden_is_refused(fake_trainer: SelectiveTrainer, monkeypatch: Any) -> None:
    for ours in (DurableTrainer, SelectiveTrainer):
        private = {name for name in vars(ours) if name.startswith("_") and not name.startswith("__")}
        assert {name for name in private if hasattr(Trainer, name)} <= set(HOOKS)
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    with pytest.raises(ConfigError, match=r"its Trainer has no _get_grad_norm, .* Install transformers 5.3"):
        DurableTrainer(fake_trainer.model, fake_trainer.args)


def test_accelerate_is_not_left_to_divide_the_loss_by_the_accumulation(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Transformers up to 5.17 told it to; this one no longer does by itself."""
    asked = partial(GradientAccumulationPlugin, num_steps=2)
    monkeypatch.setattr(trainer_module, "GradientAccumulationPlugin", lambda **_: asked())
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    model = make_model(ModelConfig(architecture=architecture), 300)
    trainer = make_trainer(model, Selector(ratio=0.6), data, tmp_path, gradient_accumulation_steps=2)
    assert trainer.accelerator.gradient_accumulation_steps == 1


def test_a_threshold_that_selects_nothing_for_a_while_is_no_error(fake_trainer: SelectiveTrainer) -> None:
    stats = SelectionStats(Selector("loss", 0.5, "running"), [])
    loss, eligible = torch.tensor([[NAN, 1.0, 3.0]]), torch.tensor([[False, True, True]])
    stats.add(loss, eligible, torch.zeros_like(eligible))
    record = stats.record(stats.sums())
    assert (record["selected"], record["loss_selected"], record["loss_unselected"]) == (0, None, 2.0)


def test_excess_that_nothing_was_compared_for_is_not_called_zero() -> None:
    stats = SelectionStats(Selector("excess", schedule=Schedule(((0, 1.0), (2, 0.5)))), [])
    loss, eligible = torch.tensor([[NAN, 1.0, 3.0]]), torch.tensor([[False, True, True]])
    stats.add(loss, eligible, eligible, ref_loss_BT=torch.full((1, 3), NAN))
    assert stats.record(stats.sums())["loss_all"] == 2.0
    stats.add(loss, eligible, eligible, ref_loss_BT=loss)
    with pytest.raises(RhoError, match="the excess loss is zero for every token"):
        stats.record(stats.sums())


# --- the fast step -----------------------------------------------------------------------------------------------


def weights_after(config: TrainConfig, corpus: Path, model: ModelConfig, out: Path, scores: Path) -> dict[str, Tensor]:
    train(config, Corpus(corpus), model, out, ScoreStore(scores))
    return dict(make_model(ModelConfig(path=str(out)), Corpus(corpus).vocab_size).named_parameters())


@pytest.mark.parametrize("scope", ["sequence", "step"])
def test_another_librarys_loss_trains_the_same_model(
    scope: Any, tmp_path: Path, corpus: Path, model_config: ModelConfig, scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, torch_sum = [], backends.torch_sum
    monkeypatch.setattr(backends, "torch_sum", lambda *rows: calls.append(1) or torch_sum(*rows))
    arguments = {**ARGUMENTS, "gradient_accumulation_steps": 2}
    runs = [
        weights_after(
            TrainConfig(ratio=0.5, scope=scope, backend=backend, arguments=arguments),  # type: ignore[arg-type]
            corpus, model_config, tmp_path / backend, scores,
        )
        for backend in ("rho", "torch")
    ]  # fmt: skip
    assert len(calls) == 2 * ARGUMENTS["max_steps"]  # type: ignore[operator]
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_filtered_backward_trains_another_model_and_logs_how_near_its_gradient_is(
    tmp_path: Path, corpus: Path, architecture: dict, scores: Path
) -> None:
    model = ModelConfig(architecture={**architecture, "num_hidden_layers": 2})
    configs = [TrainConfig(ratio=0.5, filtered_backward=on, arguments=ARGUMENTS) for on in (False, True)]
    exact, filtered = (
        weights_after(config, corpus, model, tmp_path / str(n), scores) for n, config in enumerate(configs)
    )
    assert any((exact[name] - filtered[name]).abs().max() > 1e-5 for name in exact if ".layers." in name)
    records = [json.loads(line) for line in (tmp_path / "1" / "steps.jsonl").read_text().splitlines()]
    first, *later = [record.get("filtered") for record in records]
    assert 0.3 < first["cosine"] < 1.0 and 0.3 < first["norm_ratio"] < 1.5
    assert later == [None] * 3  # until COMPARE_EVERY steps have passed


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"torch_compile": True}, "not with torch_compile"),
        ({"backend": "torch"}, {}, "not with backend torch"),
        ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # its names until Transformers 5.20
def test_what_a_filtered_backward_would_be_wrong_with_is_refused(
    settings: dict, arguments: dict, message: str, tmp_path: Path, corpus: Path, model_config: ModelConfig, scores: Path
) -> None:
    config = TrainConfig(ratio=0.5, filtered_backward=True, arguments={**ARGUMENTS, **arguments}, **settings)
    with pytest.raises(ConfigError, match=message):
        train(config, Corpus(corpus), model_config, tmp_path / "out", ScoreStore(scores))


@pytest.mark.parametrize("scope", ["sequence", "step"])
def test_an_online_reference_trains_the_model_that_its_stored_scores_train(
    scope: Any, tmp_path: Path, corpus: Path, model_config: ModelConfig, reference: Path, scores: Path
) -> None:
    config = TrainConfig(ratio=0.5, scope=scope, arguments={**ARGUMENTS, "gradient_accumulation_steps": 2})
    stored = weights_after(config, corpus, model_config, tmp_path / "stored", scores)
    online, target = ModelConfig(path=str(reference)), Corpus(corpus, "validation")
    train(config, Corpus(corpus), model_config, tmp_path / "online", target=target, reference=online)
    found = make_model(ModelConfig(path=str(tmp_path / "online")), target.vocab_size)
    for name, weight in found.named_parameters():
        torch.testing.assert_close(weight, stored[name], rtol=1e-3, atol=1e-4, msg=name)


def test_an_online_reference_is_checked_as_a_stored_one(
    tmp_path: Path, corpus: Path, model_config: ModelConfig, reference: Path, scores: Path
) -> None:
    config, out = TrainConfig(ratio=0.5, arguments=ARGUMENTS), tmp_path / "out"
    text, target, online = Corpus(corpus), Corpus(corpus, "validation"), ModelConfig(path=str(reference))
    with pytest.raises(ConfigError, match="neither with --scores nor"):
        train(config, text, model_config, out, ScoreStore(scores), reference=online)
    with pytest.raises(MismatchError, match="the same weights"):
        train(config, text, online, out, reference=online)
    untrained = tmp_path / "untrained"
    save_model(make_model(model_config, text.vocab_size, seed=1), untrained)
    with pytest.raises(MismatchError, match="no better than the model"):
        train(config, text, model_config, out, target=target, reference=ModelConfig(path=str(untrained)))
    train(config, text, model_config, out, None, target, True, ModelConfig(path=str(untrained)))
