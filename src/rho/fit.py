"""Run a trainer to its end, whatever came between: damage, kills, SIGTERM, another number of processes."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import TrainerCallback, TrainingArguments

from rho.checkpoints import newest_good, step_of
from rho.distributed import all_gather, rank
from rho.errors import ConfigError, Stopped
from rho.progress import say, track
from rho.runs import Stage, atomic_write
from rho.trainer import SelectiveTrainer


def keep_rows_a_step(args: TrainingArguments, stage: Stage) -> int:
    """Rows of an optimizer step: as many as when the stage began, on any number of processes.

    So a run that goes on with more or fewer processes takes the same rows in each step; the accumulation makes up for
    the difference.

    Raises:
        ConfigError: these processes can't take just as many rows.
    """
    together = args.train_batch_size * args.world_size
    asked = together * args.gradient_accumulation_steps
    began = stage.manifest.facts.setdefault("rows_a_step", asked)  # right on the first rank, which read the manifest
    rows = int(all_gather(torch.tensor([began], device=args.device))[0])
    if rows % together:
        raise ConfigError(
            f"{stage.folder}: a step began with {rows} rows; {args.world_size} processes of "
            f"{args.train_batch_size} rows each can't take just as many. Start a number of processes that divides it."
        )
    args.gradient_accumulation_steps = rows // together
    stage.manifest.environment["processes"] = args.world_size  # what the tokens a second in the step log are those of
    if rank() == 0:
        stage.checkpoint()
    return rows


def num_steps(max_steps: int, epochs: float, rows: int, rows_a_step: int) -> int:
    """Optimizer steps of a training over `rows`: `max_steps`, or if that is not above 0 those of the epochs."""
    return max_steps if max_steps > 0 else math.ceil(math.ceil(rows / rows_a_step) * epochs)


def fit(trainer: SelectiveTrainer, folder: Path, block_length: int, rows_a_step: int) -> signal.Signals | None:
    """Train to the end, going on from the newest good checkpoint if there is one.

    Args:
        trainer: writes its checkpoints to `checkpoints/` in `folder`.
        folder: the stage's.
        block_length: tokens in a row.
        rows_a_step: rows in an optimizer step.

    Returns:
        A signal that came too late to stop before the end: for `stop`, when the model is saved.

    Raises:
        Stopped: SIGTERM arrived; there is a checkpoint of the last step.
        KeyboardInterrupt: Ctrl-C, likewise.
    """
    last = newest_good(folder / "checkpoints") if rank() == 0 else None
    own = torch.tensor([step_of(last) if last else 0], device=trainer.args.device)
    step = int(all_gather(own)[0])
    if rank() == 0:
        _forget_after(folder / "steps.jsonl", step)
    if step:
        say(f"train {folder.name}: going on from step {step}")
    elif (folder / "steps.jsonl").is_file():
        say(f"train {folder.name}: no checkpoint was made yet, starting from step 0")
    tokens = rows_a_step * block_length
    total = num_steps(trainer.args.max_steps, trainer.args.num_train_epochs, trainer.order.rows, rows_a_step)
    with track(f"train {folder.name}", total * tokens, step * tokens) as advance, Signals() as signals:
        trainer.add_callback(_Progress(trainer, lambda: advance(tokens), signals))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoints" / f"checkpoint-{step}") if step else None)
    if trainer.interrupted:
        assert signals.received is not None
        stop(signals.received, f"{folder}: stopped after step {trainer.state.global_step}, with a checkpoint")
    return signals.received


def stop(received: signal.Signals, where: str) -> NoReturn:
    """End as the signal asks: Ctrl-C as an interruption, SIGTERM in good order."""
    if received == signal.SIGINT:
        say(f"{where}, by Ctrl-C")
        raise KeyboardInterrupt
    raise Stopped(f"{where}, by {received.name}. Run the same command again to go on.")


class Signals:
    """Remembers a SIGTERM or Ctrl-C instead of dying of it: the step is finished and a checkpoint written first.

    A second Ctrl-C is not waited with.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._handle) for kind in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, kind: int, *_: Any) -> None:
        if kind == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.received = signal.Signals(kind)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for kind, handler in self._before.items():
                if kind != self.received or kind == signal.SIGINT:  # a second SIGTERM must not cut the way out short
                    signal.signal(kind, handler)


class _Progress(TrainerCallback):
    """Tells of each step; after a signal to any rank, all of them write a checkpoint and stop after the same one."""

    def __init__(self, trainer: SelectiveTrainer, advance: Callable[[], None], signals: Signals) -> None:
        self.trainer, self.advance, self.signals = trainer, advance, signals

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.advance()
        received = int(max(all_gather(torch.tensor([self.signals.received or 0], device=args.device))))
        epoch_ends = state.epoch == int(state.epoch) and args.eval_strategy == "epoch"
        if received and not epoch_ends:  # else one step later, so that the epoch's evaluation is in the checkpoint
            self.signals.received = signal.Signals(received)
            self.trainer.interrupted = control.should_training_stop = True
            if not control.should_log:  # else the checkpoint must know of that
                self.trainer._save_checkpoint(self.trainer.model, None)  # whatever the save strategy would do
            self._no_more(control)
        return control

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.interrupted:
            self.trainer._save_checkpoint(self.trainer.model, None)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.trainer.interrupted:
            control.should_log = False
            self._no_more(control)
        return control

    @staticmethod
    def _no_more(control: Any) -> None:
        """A minute may be all there is before a SIGKILL."""
        control.should_save = control.should_evaluate = False


def _forget_after(log: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that is resumed from: those steps are done again."""
    if log.is_file():
        kept = [line for line in log.read_text().splitlines() if _step_in(line) <= step]
        with atomic_write(log) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def _step_in(line: str) -> float:
    """A last line cut short by a kill counts as not written."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
