"""A `transformers.Trainer` whose checkpoints can be trusted (`rho.checkpoints`) and whose resumed runs end alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import EarlyStoppingCallback, Trainer

from rho.checkpoints import PARTIAL, check, checkpoints, commit, remove
from rho.errors import ConfigError
from rho.runs import sync, write_json

# Private and late-come methods of `Trainer` that are overridden here: where a version lacks one, ours is never called.
HOOKS = (
    "_finalize_training",
    "_get_eval_sampler",
    "_get_grad_norm",
    "_get_learning_rate",
    "_get_train_sampler",
    "_load_best_model",
    "_load_optimizer_and_scheduler",
    "_run_epoch",
    "_save_checkpoint",
    "get_batch_samples",
)


OWN_STATE = "rho_state.json"


class DurableTrainer(Trainer):
    """`Trainer` that commits its checkpoints whole.

    Attributes:
        step_log: what is logged about steps, made durable with each checkpoint; None for none.

    Raises:
        ConfigError: a version of Transformers whose `Trainer` works otherwise.
    """

    step_log: Path | None = None
    _committed: int | None = None  # the step of the newest checkpoint

    def own_state(self) -> dict[str, Any]:
        """What a subclass wants to find again in `take_up`; JSON values. Called on all ranks."""
        return {}

    def save_own(self, folder: Path) -> None:
        """Write what else a subclass wants to find again, as files of a checkpoint. Called on the first rank."""

    def take_up(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Go on from what `own_state` gave when the checkpoint was made, and from its files."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if missing := [name for name in HOOKS if not hasattr(Trainer, name)]:
            raise ConfigError(
                f"transformers {transformers.__version__}: its Trainer has no {', '.join(missing)}, so steps and "
                "checkpoints would go unchecked. Install transformers 5.3 or later; 5.23 is tested."
            )
        super().__init__(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As `Trainer`, but a checkpoint that is there is whole, and one of this step is not made twice."""
        if self._committed == self.state.global_step:
            return
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(folder / PARTIAL)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(folder)
        # `Trainer` looked for the best checkpoint among the partial ones.
        best = folder / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.name == name or best.exists() else None
        own_state = self.own_state()
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_json(folder / PARTIAL / name / OWN_STATE, own_state)
            self.save_own(folder / PARTIAL / name)
            self.state.save_to_json(str(folder / PARTIAL / name / "trainer_state.json"))
            if self.step_log is not None and self.step_log.exists():
                sync(self.step_log)  # a checkpoint must not outlive the log of its steps
            commit(folder / PARTIAL / name, folder / name)
            self._rotate(folder, best.name)
        self._committed = self.state.global_step
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._committed = self.state.global_step
        self.take_up(json.loads((Path(checkpoint) / OWN_STATE).read_bytes()), Path(checkpoint))
        # `Trainer` looks for the best checkpoint where the run stood when it was made.
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.exists() else None

    def _finalize_training(self, *args: Any) -> Any:
        """As `Trainer`, which with a limit of one checkpoint would remove the last."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def _rotate(self, folder: Path, best: str) -> None:
        """Remove the oldest checkpoints beyond `save_total_limit`, never the best or the newest."""
        found = checkpoints(folder)
        too_many = len(found) - self.args.save_total_limit if self.args.save_total_limit else 0
        for path in [path for path in found[:-1] if path.name != best][: max(too_many, 0)]:
            remove(path)

    def get_train_dataloader(self) -> Any:
        """As `Trainer`, but drawing nothing from the random numbers of the training."""
        return _with_own_generator(super().get_train_dataloader(), self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer`, but drawing nothing from the random numbers of the training."""
        return _with_own_generator(super().get_eval_dataloader(eval_dataset), self.args.seed)

    def _load_best_model(self) -> None:
        check(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _run_epoch(self, **settings: Any) -> None:
        """As `Trainer`, which would take one step more after a checkpoint of the last one."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**settings)


def _with_own_generator(loader: Any, seed: int) -> Any:
    """A data loader draws a seed for its workers whenever it begins, so also where a resumed run does not."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper has another inside
    inner.generator = torch.Generator().manual_seed(seed)
    return loader


class EarlyStopping(EarlyStoppingCallback):
    """Goes on with the patience that a checkpoint had left; `Trainer` starts anew with all of it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Take up the count of evaluations without a better loss."""
        super().on_train_begin(args, state, control)
        attributes = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.early_stopping_patience_counter = attributes["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience
        return control
