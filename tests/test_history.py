"""A model's own past as the reference: which weights it is, what they select, and that it outlives an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rho.corpus import Corpus
from rho.data import TrainingBlocks
from rho.errors import ConfigError, DataError
from rho.history import FILE, History, HistoryConfig
from rho.models import ModelConfig, make_model
from rho.objective import IGNORE_INDEX, select_top, token_loss
from rho.selection import Selector
from rho.store import ScoreStore
from rho.train import TrainConfig, train
from rho.trainer import SelectiveTrainer
from test_train import ARGUMENTS, InterruptAfter, assert_same_weights, make_trainer, steps

PAST = {"score": "retrospective", "ratio": 0.5}


class Weight(nn.Module):
    """One weight that is trained, one that is not."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([value]))
        self.frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)


def compared_with(config: HistoryConfig, steps: int) -> list[float]:
    """The weight that each step is scored with, where the weight at step n is n."""
    model = Weight(0.0)
    history, found = History(model, config), []
    for step in range(steps):
        model.trained.data.fill_(float(step))
        with history.in_place():
            found.append(model.trained.item())
            assert model.frozen.item() == 7.0
        assert model.trained.item() == step
        history.follow(step)
    return found


def test_the_history_is_one_to_so_many_steps_old() -> None:
    assert compared_with(HistoryConfig(every=3), 8) == [0, 0, 0, 0, 3, 3, 3, 6]
    assert compared_with(HistoryConfig(every=1), 4) == [0, 0, 1, 2]


def test_the_moving_average_follows_the_weights() -> None:
    # a1 = w0; a2 = a1 / 2 + w1 / 2; a3 = a2 / 2 + w2 / 2 ...
    assert compared_with(HistoryConfig(ema=0.5), 5) == [0, 0, 0.5, 1.25, 2.125]


def test_the_models_own_weights_come_back_as_the_same_tensors_even_after_an_error() -> None:
    model = Weight(1.0)
    history, own = History(model, HistoryConfig(every=1)), model.trained
    model.trained.data.fill_(2.0)
    storage = model.trained.data_ptr()
    with pytest.raises(KeyboardInterrupt), history.in_place():
        raise KeyboardInterrupt
    assert model.trained is own and model.trained.data_ptr() == storage and own.item() == 2.0


def test_what_is_saved_is_taken_up(tmp_path: Path) -> None:
    model = Weight(1.0)
    History(model, HistoryConfig(every=1)).save(tmp_path)
    model.trained.data.fill_(5.0)
    other = History(model, HistoryConfig(every=1))
    other.load(tmp_path)
    with other.in_place():
        assert model.trained.item() == 1.0


@pytest.mark.parametrize("settings", [{}, {"every": 2, "ema": 0.9}, {"every": 0}, {"ema": 1.0}, {"ema": 0.0}])
def test_settings_that_say_nothing_or_too_much_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"every|ema"):
        HistoryConfig(**settings)


# In training


@pytest.fixture
def model_config(architecture: dict) -> ModelConfig:
    return ModelConfig(architecture=architecture)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_tokens_that_gained_most_since_then_are_selected(
    corpus: Path, model_config: ModelConfig, tmp_path: Path, accumulation: int
) -> None:
    data = TrainingBlocks(Corpus(corpus))
    before = make_model(model_config, Corpus(corpus).vocab_size, seed=1).eval()
    model = make_model(model_config, Corpus(corpus).vocab_size, seed=1)
    args = {"gradient_accumulation_steps": accumulation, "max_steps": 2}
    seen: list[tuple[dict, torch.Tensor]] = []

    class Noting(SelectiveTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            seen.append(({**inputs, "loss": outputs["token_loss"]}, outputs["selected"]))
            return loss

    plain = make_trainer(model, Selector(), data, tmp_path, **args)
    history = HistoryConfig(every=1)
    Noting(make_model(model_config, 300, seed=1), Selector(**PAST), plain.args, data, history=history).train()  # type: ignore[arg-type]
    assert len(seen) == 2 * accumulation
    for inputs, selected in seen[accumulation:]:  # in the first step both are the same
        then = token_loss(before(input_ids=inputs["input_ids"]).logits, inputs["labels"])
        labelled = inputs["labels"] != IGNORE_INDEX
        torch.testing.assert_close(inputs["ref_loss"][labelled], then[labelled])
        assert torch.equal(selected, select_top(inputs["ref_loss"] - inputs["loss"], labelled, 0.5))


def test_in_the_first_step_nothing_was_learned_and_the_earlier_tokens_win(
    corpus: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    data = TrainingBlocks(Corpus(corpus))
    plain = make_trainer(make_model(model_config, 300), Selector(), data, tmp_path)
    model = make_model(model_config, 300)
    trainer = SelectiveTrainer(model, Selector(**PAST), plain.args, data, history=HistoryConfig(ema=0.9))  # type: ignore[arg-type]
    [batch], _ = trainer.get_batch_samples(iter([{k: v[None] for k, v in data[0].items()}]), 1, torch.device("cpu"))
    loss = trainer._losses(batch)
    labelled = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["ref_loss"][labelled], loss[labelled])


@pytest.mark.parametrize("history", [{"every": 3}, {"ema": 0.6}])
@pytest.mark.parametrize("scope", ["sequence", "step"])
def test_an_interrupted_run_ends_bit_identical(
    corpus: Path,
    model_config: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    history: dict,
    scope: str,
) -> None:
    config = TrainConfig(
        **PAST, scope=scope, references={"history": history}, arguments={**ARGUMENTS, "max_steps": 7, "save_steps": 5}
    )

    def run(out: Path) -> None:
        train(config, Corpus(corpus), model_config, out)

    run(tmp_path / "whole")
    original = SelectiveTrainer.__init__

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(InterruptAfter(6))

    with monkeypatch.context() as patch:
        patch.setattr(SelectiveTrainer, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    run(tmp_path / "cut")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert steps(tmp_path / "whole") == steps(tmp_path / "cut")
    last = f"checkpoints/checkpoint-7/{FILE}"
    assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "cut" / last).read_bytes()
    assert FILE not in {path.name for path in (tmp_path / "cut" / "model").iterdir()}


def test_a_checkpoint_without_its_history_is_not_gone_on_from(
    corpus: Path, model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from rho.checkpoints import check

    config = TrainConfig(**PAST, references={"history": {"every": 2}}, arguments=ARGUMENTS)
    train(config, Corpus(corpus), model_config, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    (checkpoint / FILE).unlink()
    with pytest.raises(DataError, match=FILE):
        check(checkpoint)


def test_a_stored_reference_can_be_the_past_too_and_need_not_be_better(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    config = TrainConfig(**PAST, arguments=ARGUMENTS)
    assert config.judged(["reference"]) == []
    train(config, Corpus(corpus), model_config, tmp_path / "run", ScoreStore(scores))
    assert all(step["ratio"] == pytest.approx(0.5, abs=0.05) for step in steps(tmp_path / "run"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "excess"}, "own past is the reference of score 'retrospective', found 'excess'"),
        ({"score": "random"}, "found 'random'"),
        ({**PAST, "references": {"history": {"every": 1}, "names": ["a"]}}, "leave names, combine and weights out"),
        ({**PAST, "references": {"history": {"every": 1}, "combine": "min"}}, "leave names, combine and weights out"),
        ({**PAST, "scope": "dataset"}, "needs a score that does not change"),
    ],
)
def test_settings_that_a_history_does_not_go_with_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"ratio": 0.5, "references": {"history": {"every": 1}}, **settings})


def test_stored_scores_beside_a_history_and_no_reference_at_all_are_refused(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    config = TrainConfig(**PAST, references={"history": {"every": 2}}, arguments=ARGUMENTS)
    with pytest.raises(ConfigError, match=r"references.history: .*Leave --scores and --reference out"):
        train(config, Corpus(corpus), model_config, tmp_path / "run", ScoreStore(scores))
    with pytest.raises(ConfigError, match="score 'retrospective' needs --scores"):
        train(TrainConfig(**PAST), Corpus(corpus), model_config, tmp_path / "run")
