"""Training: the loss is Eq. 4, CLM is ratio 1.0, and an interrupted run ends as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from conftest import CLOCK
from rho.corpus import Corpus
from rho.data import RowOrder, TrainingBlocks, collate
from rho.errors import ConfigError, DataError, MismatchError, RhoError
from rho.models import ModelConfig, check_isolation, make_model
from rho.objective import excess_loss, select_top, token_loss
from rho.score import ScoreConfig, score_corpus
from rho.selection import Selector
from rho.store import ScoreStore
from rho.train import TrainConfig, train
from rho.trainer import SelectiveTrainer

ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "lr_scheduler_type": "constant",
}


@pytest.fixture
def model_config(architecture: dict) -> ModelConfig:
    return ModelConfig(architecture=architecture)


def config(ratio: float = 0.6, arguments: dict | None = None, **settings: Any) -> TrainConfig:
    return TrainConfig(ratio=ratio, arguments={**ARGUMENTS, **(arguments or {})}, **settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())


def steps(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for record in records:
        for name in CLOCK:
            record.pop(name)
    return records


def assert_same_weights(a: Path, b: Path) -> None:
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name


def test_ratio_one_is_plain_clm_bit_for_bit(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    train(config(ratio=1.0), Corpus(corpus), model_config, tmp_path / "clm")
    train(config(ratio=1.0, score="excess"), Corpus(corpus), model_config, tmp_path / "slm", ScoreStore(scores))
    assert_same_weights(tmp_path / "clm", tmp_path / "slm")
    assert [s["loss_all"] for s in steps(tmp_path / "clm")] == [s["loss_all"] for s in steps(tmp_path / "slm")]


def test_clm_is_the_loss_transformers_computes(corpus: Path, model_config: ModelConfig, tmp_path: Path) -> None:
    model = make_model(model_config, Corpus(corpus).vocab_size).train()
    batch = collate([TrainingBlocks(Corpus(corpus))[i] for i in range(4)])
    theirs = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
    expected = torch.autograd.grad(theirs, model.parameters())
    trainer = make_trainer(model, Selector(), TrainingBlocks(Corpus(corpus)), tmp_path)
    count = (batch["labels"] != -100).sum()
    ours = trainer.compute_loss(model, batch, num_items_in_batch=count)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, model.parameters()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def make_trainer(model: Any, selector: Selector, data: Any, folder: Path, **arguments: Any) -> SelectiveTrainer:
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        **{**ARGUMENTS, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, **arguments},
    )
    return SelectiveTrainer(model, selector, args, data)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_loss_and_gradient_equal_the_formula_on_full_logits(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path, scope: str, ratio: float
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    batch = collate([data[i] for i in range(4)])
    model = make_model(model_config, Corpus(corpus).vocab_size).train()
    loss = token_loss(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"])
    eligible = (batch["labels"] != -100) & batch["ref_loss"].isfinite()
    excess = excess_loss(loss.detach(), batch["ref_loss"])
    rows = (excess, eligible) if scope == "sequence" else (excess.view(1, -1), eligible.view(1, -1))
    mask = select_top(*rows, ratio).view_as(eligible)
    formula = loss[mask].sum() / mask.sum()
    expected = torch.autograd.grad(formula, model.parameters())

    selector = Selector("excess", ratio, scope)  # type: ignore[arg-type]
    trainer = make_trainer(model, selector, data, tmp_path)
    [micro_batch], count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert count == mask.sum()
    ours = trainer.compute_loss(model, micro_batch, num_items_in_batch=count)
    torch.testing.assert_close(ours, formula)
    for a, b in zip(torch.autograd.grad(ours, model.parameters()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", ["excess", "random"])
def test_sequence_scope_gives_the_same_weights_however_a_step_is_cut(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path, score: str
) -> None:
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        cut |= {"optim": "sgd", "learning_rate": 0.5}  # Adam would blow up the last bits of small gradients
        out = tmp_path / str(size)
        train(config(score=score, arguments=cut), Corpus(corpus), model_config, out, ScoreStore(scores))
    for size in (4, 2):
        for name, tensor in weights(tmp_path / "8").items():
            torch.testing.assert_close(weights(tmp_path / str(size))[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_last_partial_accumulation_window_divides_by_its_own_count(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    batches = [collate([data[i]]) for i in range(3)]
    selector = Selector("excess", 0.6)
    trainer = make_trainer(make_model(model_config, Corpus(corpus).vocab_size), selector, data, tmp_path)
    window, count = trainer.get_batch_samples(iter(batches), 4, torch.device("cpu"))
    assert len(window) == 3
    assert count == sum(selector.num_selected(trainer.eligible(batch)) for batch in batches)


class InterruptAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("score", ["excess", "random"])
def test_an_interrupted_run_ends_bit_identical(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: str
) -> None:
    def run(out: Path) -> None:
        train(config(score=score, arguments={"max_steps": 6}), Corpus(corpus), model_config, out, ScoreStore(scores))

    run(tmp_path / "whole")
    original = SelectiveTrainer.__init__

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(InterruptAfter(5))

    with monkeypatch.context() as patch:
        patch.setattr(SelectiveTrainer, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / ".partial" / "checkpoint-99").mkdir(parents=True)  # as a kill would leave it
    run(tmp_path / "cut")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert steps(tmp_path / "whole") == steps(tmp_path / "cut")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config(seed=seed), Corpus(corpus), model_config, tmp_path / name, ScoreStore(scores))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


def test_the_step_log_says_what_was_realised(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    train(config(), Corpus(corpus), model_config, tmp_path / "slm", ScoreStore(scores))
    records = steps(tmp_path / "slm")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert [r["tokens_seen"] for r in records] == [64, 128, 192, 256]
    for record in records:
        assert record["selected"] == pytest.approx(0.6 * record["eligible"], abs=2)  # half a token a sequence
        mixed = record["ratio"] * record["loss_selected"] + (1 - record["ratio"]) * record["loss_unselected"]
        assert record["loss_all"] == pytest.approx(mixed)
        assert set(record["excess"]) == {"p05", "p25", "p50", "p75", "p95"}
        assert record["labels"]["code"]["selected"] <= record["labels"]["code"]["eligible"]


def test_the_random_control_logs_what_it_leaves_out_too(
    corpus: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    train(config(score="random"), Corpus(corpus), model_config, tmp_path / "random")
    assert all(record["loss_unselected"] > 0 for record in steps(tmp_path / "random"))


def test_what_is_saved_is_a_plain_transformers_model_with_its_tokenizer(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    train(config(), Corpus(corpus), model_config, tmp_path / "slm", ScoreStore(scores))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "slm" / "model")
    assert "forward" not in vars(model)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, Corpus(corpus).vocab_size)
    assert "rho" not in (tmp_path / "slm" / "model" / "config.json").read_text()


def test_evaluation_inside_the_trainer_is_the_mean_loss_of_all_labels(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    model = make_model(model_config, Corpus(corpus).vocab_size)
    batch = collate([data[i] for i in range(4)])
    expected = token_loss(model.eval()(input_ids=batch["input_ids"]).logits, batch["labels"]).nanmean()
    trainer = make_trainer(model, Selector("excess", 0.3), data, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(model.eval(), batch), expected)


def test_excess_without_scores_is_refused(corpus: Path, model_config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --scores"):
        train(config(), Corpus(corpus), model_config, tmp_path / "slm")
    data = TrainingBlocks(Corpus(corpus))
    trainer = make_trainer(make_model(model_config, 300), Selector("excess", 0.6), data, tmp_path)
    with pytest.raises(MismatchError, match=r"needs the reference's ref_loss.*block, input_ids, label"):
        trainer.train()


def test_a_reference_that_is_the_model_itself_stops_the_training(
    corpus: Path, reference: Path, scores: Path, tmp_path: Path
) -> None:
    with pytest.raises(RhoError, match="same weights"):
        train(
            config(arguments={"logging_steps": 100}),
            Corpus(corpus),
            ModelConfig(path=str(reference)),
            tmp_path / "slm",
            ScoreStore(scores),
        )


def test_a_weak_reference_is_refused_with_both_losses_and_can_be_allowed(
    corpus: Path, reference: Path, model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # The better-trained model is the one to train, the untrained one the reference.
    weak, target = tmp_path / "weak", Corpus(corpus, "validation")
    untrained = make_model(model_config, Corpus(corpus).vocab_size, seed=3)
    untrained.save_pretrained(weak)
    score_corpus(ScoreConfig(), Corpus(corpus), ModelConfig(path=str(weak)), tmp_path / "scores", target)
    arguments = (Corpus(corpus), ModelConfig(path=str(reference)), tmp_path / "slm", ScoreStore(tmp_path / "scores"))
    with pytest.raises(MismatchError, match=r"reference's loss is 5\.\d+, the model's before training \d\.\d+ nats"):
        train(config(), *arguments, target=target)
    train(config(), *arguments, target=target, allow_weak_reference=True)
    assert "going on as asked" in capsys.readouterr().err


def test_an_unknown_training_argument_is_named() -> None:
    with pytest.raises(ValueError, match="learning_rte: no field of transformers"):
        config(arguments={"learning_rte": 1.0})


def test_a_loss_that_diverges_stops_the_training(corpus: Path, model_config: ModelConfig, tmp_path: Path) -> None:
    wild = {"learning_rate": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(
        RhoError, match=r"step 2: loss or gradient is not finite.*train-0000\d.parquet \(documents doc-"
    ):
        train(config(ratio=1.0, arguments=wild), Corpus(corpus), model_config, tmp_path / "x")


def test_isolated_documents_need_a_model_that_keeps_them_apart(architecture: dict) -> None:
    check_isolation(make_model(ModelConfig(architecture={**architecture, "initializer_range": 0.5}), 50), True)
    settings = {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    leaky = make_model(ModelConfig(architecture={**settings, "word_embed_proj_dim": 16, "init_std": 0.5}), 50)
    check_isolation(leaky, False)
    with pytest.raises(MismatchError, match="see each other"):
        check_isolation(leaky, True)


@pytest.mark.parametrize(
    "saving", [{"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, {"save_steps": 3}]
)
def test_checkpoints_are_listed_with_the_tokens_seen_by_then(
    corpus: Path, model_config: ModelConfig, tmp_path: Path, saving: dict
) -> None:
    text = Corpus(corpus)
    manifest = train(config(1.0, {**saving, "logging_steps": 4}), text, model_config, tmp_path / "clm")
    labelled = [int((TrainingBlocks(text)[block]["labels"] != -100).sum()) for block in range(len(text))]
    order, rows = RowOrder(len(text), 4, 0), []
    for epoch in range(2):
        order.set_epoch(epoch)
        rows += order
    for checkpoint in manifest.facts["checkpoints"]:
        seen = [row for row in rows[: 4 * checkpoint["step"]] if row >= 0]
        assert checkpoint["tokens_seen"] == len(seen) * text.block_length
        assert checkpoint["tokens_selected"] == sum(labelled[row] for row in seen)
    assert len(manifest.facts["checkpoints"]) == 2


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"eval_strategy": "steps"}, r"eval_strategy is 'steps', which needs a target \(--target\)"),
        ({"early_stopping": 2}, {}, "early_stopping: counts evaluations on the target: set eval_strategy"),
        ({}, {"report_to": "codecarbon"}, "the trainer can't be set up with these .*codecarbon"),
        ({}, {"load_best_model_at_end": True}, "arguments: .*load_best_model_at_end"),
    ],
)
def test_arguments_at_odds_are_an_error_and_can_be_corrected(
    corpus: Path, model_config: ModelConfig, tmp_path: Path, settings: dict, arguments: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(1.0, arguments, **settings), Corpus(corpus), model_config, tmp_path / "clm")
    train(config(1.0, {"max_steps": 1}), Corpus(corpus), model_config, tmp_path / "clm")


def test_a_ratio_that_rounds_to_no_token_says_so(
    corpus: Path, scores: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"ratio 0.01 of \d+ eligible tokens rounds to none. Ask for a larger ratio"):
        train(config(0.01), Corpus(corpus), model_config, tmp_path / "slm", ScoreStore(scores))


def test_the_step_log_is_among_the_outputs(corpus: Path, model_config: ModelConfig, tmp_path: Path) -> None:
    manifest = train(config(1.0, {"max_steps": 1}), Corpus(corpus), model_config, tmp_path / "clm")
    assert manifest.outputs["steps.jsonl"]["bytes"] == (tmp_path / "clm" / "steps.jsonl").stat().st_size
