"""Checkpoints that can be trusted: after kills, damage or SIGTERM a run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from rho import train as stage
from rho.checkpoints import HASHES, check, checkpoints, damage, newest_good
from rho.corpus import Corpus
from rho.data import TrainingBlocks
from rho.errors import ConfigError, DataError, RhoError, Stopped
from rho.evaluate import EvaluateConfig, checkpoints_of, evaluate
from rho.fit import keep_rows_a_step
from rho.models import ModelConfig, make_model
from rho.runs import Manifest, Stage, read_manifest
from rho.selection import Selector
from rho.store import ScoreStore, Shards
from rho.train import TrainConfig, train
from rho.trainer import SelectiveTrainer
from test_train import InterruptAfter, make_trainer, steps

KILL = Path(__file__).parents[1] / "benchmarks" / "kill_training.py"
WORKER = Path(__file__).parent / "distributed_worker.py"
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
STATE = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def run(corpus: Path, scores: Path, architecture: dict) -> Any:
    """Train into a folder, at ratio 0.6, with settings and arguments."""

    def run(out: Path, arguments: dict | None = None, model: dict | None = None, **settings: Any) -> None:
        config = TrainConfig(ratio=0.6, arguments={**ARGUMENTS, **(arguments or {})}, **settings)
        target = Corpus(corpus, "validation") if "eval_strategy" in config.arguments else None
        model_config = ModelConfig(architecture={**architecture, **(model or {})})
        train(config, Corpus(corpus), model_config, out, ScoreStore(scores), target)

    return run


@pytest.fixture(scope="module")
def whole(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any trouble; read-only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


@pytest.fixture(scope="module")
def interrupted(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, ended after step 5 of 6, with checkpoints of steps 2 and 4; read-only."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 5)
        run(out)
    return out


@pytest.fixture
def cut(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted run."""
    return shutil.copytree(interrupted, tmp_path / "cut")


def assert_same(whole: Path, other: Path) -> None:
    """Weights, optimizer, schedule, random state and step log, bit for bit."""
    last = checkpoints(whole / "checkpoints")[-1].relative_to(whole)
    for name in ("model/model.safetensors", *(last / name for name in STATE)):
        assert (whole / name).read_bytes() == (other / name).read_bytes(), name
    assert steps(whole) == steps(other)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on training ends in a KeyboardInterrupt after that step."""
    original = SelectiveTrainer.__init__

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(InterruptAfter(step))

    monkeypatch.setattr(SelectiveTrainer, "__init__", interrupted)


def test_runs_killed_at_30_random_moments_end_bit_identical(tmp_path: Path) -> None:
    command = [sys.executable, str(KILL), "--kills", "30", "--seed", "3", "--out", str(tmp_path / "result.json")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] == 30 and result["identical"]
    assert result["hit"]["in checkpoint writing or removal"] >= 5
    assert result["hit"]["between checkpoints"] >= 2


def test_200_flipped_bits_and_50_truncations_are_all_detected(cut: Path) -> None:
    draw = random.Random(0)
    folder = checkpoints(cut / "checkpoints")[-1]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {*STATE, HASHES, "trainer_state.json"} <= {path.name for path in files}
    for number in range(250):
        path = draw.choice(files)
        content = path.read_bytes()
        if number < 200:
            flip(path, draw.randrange(8 * len(content)))
        else:
            path.write_bytes(content[: draw.randrange(len(content))])
        [found] = damage(folder)
        assert found.startswith(f"{path.relative_to(folder)}: ")
        path.write_bytes(content)
    assert damage(folder) == []


def test_missing_added_and_unlisted_files_are_damage(cut: Path) -> None:
    older, newer = checkpoints(cut / "checkpoints")
    (newer / "optimizer.pt").rename(newer / "optimizer.bak")
    assert damage(newer) == ["optimizer.bak: not part of the checkpoint", "optimizer.pt: No such file or directory"]
    hashes = json.loads((older / HASHES).read_text())
    del hashes["files"]["optimizer.pt"]
    (older / HASHES).write_text(json.dumps(hashes))
    assert damage(older) == [f"{HASHES}: content changed"]
    (older / HASHES).unlink()
    assert damage(older) == [f"{HASHES}: No such file or directory"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", HASHES])
def test_a_run_goes_on_from_the_last_good_checkpoint_and_says_which_files_were_bad(
    name: str, run: Any, whole: Path, cut: Path, capsys: pytest.CaptureFixture
) -> None:
    flip(cut / "checkpoints" / "checkpoint-4" / name, 999)
    run(cut)
    told = capsys.readouterr().err
    assert f"checkpoint-4: damaged ({name}: content changed), not resumed from, now damaged-checkpoint-4" in told
    assert "going on from step 2" in told
    assert_same(whole, cut)
    assert [path.name for path in checkpoints(cut / "checkpoints")] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_with_every_checkpoint_damaged_a_run_starts_from_scratch_and_says_so(
    run: Any, whole: Path, cut: Path, capsys: pytest.CaptureFixture
) -> None:
    for folder in checkpoints(cut / "checkpoints"):
        (folder / "trainer_state.json").write_text("{}")
    run(cut)
    assert "every checkpoint is damaged, starting from scratch" in capsys.readouterr().err
    assert_same(whole, cut)


def test_a_damaged_checkpoint_is_not_evaluated(whole: Path, corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    flip(copy / "checkpoints" / "checkpoint-2" / "model.safetensors", 4321)
    found = checkpoints_of(copy, "arm")
    assert len(found) == 3
    with pytest.raises(DataError, match=r"checkpoint-2: damaged checkpoint \(model.safetensors: content changed\)"):
        evaluate(EvaluateConfig(), found, {"held-out": Corpus(corpus, "validation")}, tmp_path / "out")


def test_removing_a_checkpoint_leaves_it_whole_or_gone(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []
    rmtree = shutil.rmtree

    def half(path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-" in Path(path).name:
            removed.append(path)
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rho.checkpoints.shutil.rmtree", half)
        run(tmp_path / "cut", {"save_total_limit": 1})
    assert removed
    found = checkpoints(tmp_path / "cut" / "checkpoints")
    assert [path.name for path in found] == ["checkpoint-4"]
    check(found[0])


RESUMED = {
    "dropout": ({}, {"attention_dropout": 0.1}, {}),
    "two passes with dropout": ({"gradient_accumulation_steps": 2}, {"attention_dropout": 0.1}, {"scope": "step"}),
    "running": ({"logging_steps": 3}, {}, {"scope": "running"}),
    "at the end of an epoch": ({"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}, {}, {}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_random_state_threshold_and_data_position_are_restored(
    name: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, model, settings = RESUMED[name]
    if name == "at the end of an epoch":
        arguments = {**arguments, "per_device_train_batch_size": 32}
    run(tmp_path / "whole", arguments, model, **settings)
    last = steps(tmp_path / "whole")[-1]["step"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, last - 1)
        run(tmp_path / "cut", arguments, model, **settings)
    assert checkpoints(tmp_path / "cut" / "checkpoints")
    run(tmp_path / "cut", arguments, model, **settings)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert ("threshold" in steps(tmp_path / "cut")[-1]) == (name == "running")


@pytest.mark.parametrize("early_stopping", [None, 2])
def test_best_model_and_patience_outlive_an_interruption(
    early_stopping: int | None, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "max_steps": 5,
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the first is the best
    }
    settings = {"early_stopping": early_stopping}
    run(tmp_path / "whole", arguments, **settings)
    last = steps(tmp_path / "whole")[-1]["step"]
    assert (last == 5) == (early_stopping is None)
    best, *_ = checkpoints(tmp_path / "whole" / "checkpoints")
    assert best.name == "checkpoint-1"
    assert (best / "model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, last)
        run(tmp_path / "cut", arguments, **settings)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "save_model", killed)
        run(tmp_path / "cut", arguments, **settings)
    run(tmp_path / "cut", arguments, **settings)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_sigterm_leaves_a_good_checkpoint_and_exit_0_and_the_same_command_goes_on(
    corpus: Path, scores: Path, architecture: dict, run: Any, tmp_path: Path
) -> None:
    (tmp_path / "model.json").write_text(json.dumps(architecture))
    length = {"max_steps": 40, "save_steps": 100}
    options = {
        "corpus": corpus,
        "scores": scores,
        "model": tmp_path / "model.json",
        "out": tmp_path / "cut",
        "ratio": 0.6,
    }
    command = [sys.executable, "-c", "from rho.cli import main; main()", "train"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += [f"--set={name}={value}" for name, value in {**ARGUMENTS, **length}.items()]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "cut" / "steps.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert "stopped after step" in told and "by SIGTERM" in told and "Traceback" not in told
    [stopped_at] = checkpoints(tmp_path / "cut" / "checkpoints")
    assert damage(stopped_at) == []
    assert stopped_at.name != "checkpoint-40"
    for out in ("cut", "whole"):
        run(tmp_path / out, length)
    assert_same(tmp_path / "whole", tmp_path / "cut")


class Poison(TrainerCallback):
    """Makes losses, or gradients alone, NaN in some (1-based) steps; notes in which the model or optimizer changed."""

    def __init__(self, trainer: SelectiveTrainer, what: str, at: set[int]) -> None:
        self.step, self.states, self.changed = 0, [], set()
        self.trainer = trainer
        embedding = trainer.model.get_input_embeddings()
        if what == "loss":
            embedding.register_forward_hook(lambda module, args, out: out * torch.nan if self.step in at else out)
        else:
            embedding.weight.register_hook(lambda grad: grad * torch.nan if self.step in at else grad)
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step + 1
        self.states.append(self.state())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before, after = self.states[-1], self.state()
        if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
            self.changed.add(self.step)

    def state(self) -> dict[str, torch.Tensor]:
        found = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        for number, state in enumerate(self.trainer.optimizer.state.values()):
            found |= {f"{number} {name}": torch.as_tensor(value).clone() for name, value in state.items()}
        return found


@pytest.fixture
def poisoned(corpus: Path, scores: Path, architecture: dict, tmp_path: Path) -> Any:
    def poisoned(what: str, at: set[int], budget: int, scope: str = "sequence", **arguments: Any) -> SelectiveTrainer:
        data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
        model = make_model(ModelConfig(architecture=architecture), Corpus(corpus).vocab_size)
        selector = Selector("excess", 0.6, scope)  # type: ignore[arg-type]
        trainer = make_trainer(model, selector, data, tmp_path, **arguments)
        trainer.skip_nonfinite, trainer.step_log = budget, tmp_path / "steps.jsonl"
        trainer.poison = Poison(trainer, what, at)
        return trainer

    return poisoned


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("scope", ["sequence", "running"])
def test_steps_that_are_not_finite_are_left_out_within_the_budget(
    what: str, scope: str, poisoned: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cut = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = poisoned(what, {2, 3}, 2, scope, max_steps=5, **cut)
    trainer.train()
    assert trainer.poison.changed == {1, 4, 5}
    text = (tmp_path / "steps.jsonl").read_text()
    assert "NaN" not in text
    assert [(r["step"], r.get("skipped"), r["tokens_seen"]) for r in steps(tmp_path)] == [
        (1, None, 64), (4, 2, 128), (5, 2, 192),
    ]  # fmt: skip
    told = capsys.readouterr().err
    assert "step 2: loss or gradient is not finite" in told and "left out, 1 of at most 2" in told
    assert "step 3: loss or gradient is not finite" in told and "left out, 2 of at most 2" in told


def test_the_first_step_beyond_the_budget_stops_training_and_the_budget_outlives_a_resume(
    poisoned: Any, tmp_path: Path
) -> None:
    poisoned("loss", {2}, 1, max_steps=3, save_steps=3).train()
    trainer = poisoned("loss", {5}, 1, max_steps=6)
    with pytest.raises(RhoError, match=r"step 5: .* \(documents doc-.*Training stopped before the update"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-3"))


@pytest.mark.parametrize(("what", "stops_at"), [("loss", 2), ("gradient", 3)])
def test_with_a_loss_scaler_gradients_may_overflow_but_losses_may_not(what: str, stops_at: int, poisoned: Any) -> None:
    trainer = poisoned(what, {2}, 0, max_steps=3, save_strategy="no")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)  # lets the bad update through
    with pytest.raises(RhoError, match=f"step {stops_at}: loss or gradient is not finite"):
        trainer.train()


def test_an_infinite_score_is_an_error_that_names_block_and_store(
    corpus: Path, scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    assert data[3]["ref_loss"].isnan().any()  # no score: not an error
    row = Shards.row

    def infinite(self: Any, number: int, columns: Any) -> Any:
        found = row(self, number, columns)
        if "ref_loss" in found:
            found["ref_loss"] = found["ref_loss"].copy()
            found["ref_loss"][5] = float("-inf")
        return found

    monkeypatch.setattr(Shards, "row", infinite)
    with pytest.raises(DataError, match=rf"block 3: token 5 has an infinite ref_loss in {scores}/.*documents doc-"):
        data[3]


def test_a_run_resumed_with_other_micro_batches_takes_the_same_rows(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path
) -> None:
    def train_on(cut: tuple[int, int], folder: Path, steps: int, checkpoint: Path | None = None) -> list[list[int]]:
        seen: list[list[int]] = []
        data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
        model = make_model(ModelConfig(architecture=architecture), Corpus(corpus).vocab_size)
        trainer = make_trainer(
            model, Selector("excess", 0.6), data, folder, max_steps=steps, save_steps=3,
            per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1],
        )  # fmt: skip
        batches_of = trainer.get_batch_samples

        def noted(*args: Any) -> Any:
            batches, count = batches_of(*args)
            seen.append([block for batch in batches for block in batch["block"].tolist() if block >= 0])
            return batches, count

        trainer.get_batch_samples = noted  # type: ignore[method-assign]
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return seen

    rows = len(Corpus(corpus))
    length = rows // 16 + 3  # into the second epoch
    whole = train_on((16, 1), tmp_path / "whole", length)
    train_on((16, 1), tmp_path / "cut", 3)
    resumed = train_on((4, 4), tmp_path / "cut", length, tmp_path / "cut" / "checkpoints" / "checkpoint-3")
    assert resumed == whole[3:]
    assert sorted(row for step in whole[: -(-rows // 16)] for row in step) == list(range(rows))


def test_a_step_keeps_its_rows_on_another_number_of_processes(tmp_path: Path) -> None:
    def arguments(processes: int) -> Any:
        return SimpleNamespace(
            train_batch_size=4, gradient_accumulation_steps=1, world_size=processes, device=torch.device("cpu")
        )

    stage = Stage(tmp_path, Manifest("train", {}, {}), fresh=False)
    assert keep_rows_a_step(arguments(2), stage) == 8
    fewer = arguments(1)
    assert keep_rows_a_step(fewer, stage) == 8
    assert fewer.gradient_accumulation_steps == 2
    with pytest.raises(ConfigError, match="began with 8 rows; 3 processes of 4 rows each"):
        keep_rows_a_step(arguments(3), stage)


def test_a_run_of_two_processes_goes_on_with_one(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path
) -> None:
    arguments = {**ARGUMENTS, "max_steps": 4, "optim": "sgd", "learning_rate": 0.5, "use_cpu": True}
    job = {
        "how": "trainer", "corpus": str(corpus), "scores": str(scores), "architecture": architecture,
        "config": {"ratio": 0.6, "arguments": arguments}, "out": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**ENV, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launcher, str(WORKER), str(tmp_path / "jobs.json")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    by_two = load_file(tmp_path / "run" / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "model")  # as if it had been killed after step 3
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    config = TrainConfig.model_validate(job["config"])
    train(config, Corpus(corpus), ModelConfig(architecture=architecture), tmp_path / "run", ScoreStore(scores))
    assert [record["tokens_seen"] for record in steps(tmp_path / "run")] == [128, 256, 384, 512]
    for name, tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, by_two[name], rtol=1e-6, atol=1e-6)


def test_newest_good_of_nothing_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert newest_good(tmp_path / "checkpoints") is None
    assert capsys.readouterr().err == ""


SAVING = {
    "epoch": {"save_strategy": "epoch"},
    "best": {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"},
    "one": {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"},
}


@pytest.mark.parametrize(
    ("saving", "kind"), [*((saving, signal.SIGTERM) for saving in SAVING), ("epoch", signal.SIGINT)]
)
def test_a_signal_leaves_a_checkpoint_whatever_is_saved_otherwise_and_the_run_ends_alike(
    kind: signal.Signals, saving: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"max_steps": 8, "logging_steps": 3, **SAVING[saving]}
    run(tmp_path / "whole", arguments)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Stopped if kind == signal.SIGTERM else KeyboardInterrupt):
        before_step(patch, 5, lambda: signal.raise_signal(kind))
        run(tmp_path / "cut", arguments)
    signal.signal(signal.SIGTERM, before)
    last = checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    assert last.name == "checkpoint-5" and damage(last) == []
    run(tmp_path / "cut", arguments)
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "cut" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")


def test_a_checkpoint_under_another_ones_name_is_damage(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    (copy / "checkpoint-4").rename(copy / "checkpoint-40")
    assert damage(copy / "checkpoint-40") == ["made after step 4"]


def test_a_moved_run_still_ends_with_the_best_model(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    rising = {"learning_rate": 2.0, "warmup_steps": 12, "max_steps": 12, "metric_for_best_model": "eval_loss"}
    run(tmp_path / "whole", best | rising)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SelectiveTrainer, "_load_best_model", Mock(side_effect=KeyboardInterrupt))
        run(tmp_path / "cut", best | rising)
    (tmp_path / "cut").rename(tmp_path / "moved")
    run(tmp_path / "moved", best | rising)
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "moved" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    assert read_manifest(tmp_path / "moved").facts["step"] < 12


def test_workers_that_stay_draw_nothing_from_the_random_numbers_of_the_training(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    arguments = {**workers, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    dropout = {"attention_dropout": 0.3}
    run(tmp_path / "whole", arguments, dropout)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        run(tmp_path / "cut", arguments, dropout)
    run(tmp_path / "cut", arguments, dropout)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[], None]) -> None:
    """From now on something happens in that step of a training."""
    original, done = SelectiveTrainer.training_step, []

    def training_step(self: Any, *args: Any) -> Any:
        done.append(1)
        if len(done) == step:
            what()
        return original(self, *args)

    monkeypatch.setattr(SelectiveTrainer, "training_step", training_step)


def test_a_signal_after_the_last_step_is_heeded_when_the_model_is_saved(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, before = SelectiveTrainer._finalize_training, signal.getsignal(signal.SIGTERM)

    def late(self: Any, *args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(SelectiveTrainer, "_finalize_training", late)
    with pytest.raises(Stopped, match=r"cut: finished, by SIGTERM"):
        run(tmp_path / "cut", {"max_steps": 2, "save_strategy": "no"})
    signal.signal(signal.SIGTERM, before)
    assert read_manifest(tmp_path / "cut").facts["step"] == 2
