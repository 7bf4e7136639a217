"""A `transformers.Trainer` whose checkpoints can be trusted (`rho.checkpoints`) and whose resumed runs end alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import EarlyStoppingCallback, Trainer

from rho.checkpoints import PARTIAL, check, checkpoints, commit, remove
from rho.errors import ConfigError
from rho.runs import sync

# Private and late-come methods of `Trainer` that are overridden here: where a version lacks one, ours is never called.
HOOKS = (
    "_get_eval_sampler",
    "_get_grad_norm",
    "_get_learning_rate",
    "_get_train_sampler",
    "_load_best_model",
    "_run_epoch",
    "_save_checkpoint",
    "get_batch_samples",
)


class DurableTrainer(Trainer):
    """`Trainer` that commits its checkpoints whole.

    Attributes:
        step_log: what is logged about steps, made durable with each checkpoint; None for none.

    Raises:
        ConfigError: a version of Transformers whose `Trainer` works otherwise.
    """

    step_log: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if missing := [name for name in HOOKS if not hasattr(Trainer, name)]:
            raise ConfigError(
                f"transformers {transformers.__version__}: its Trainer has no {', '.join(missing)}, so steps and "
                "checkpoints would go unchecked. Install transformers 5.3 or later; 5.23 is tested."
            )
        super().__init__(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As `Trainer`, but a checkpoint that is there is whole."""
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
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / PARTIAL / name / "trainer_state.json"))
            if self.step_log is not None and self.step_log.exists():
                sync(self.step_log)  # a checkpoint must not outlive the log of its steps
            commit(folder / PARTIAL / name, folder / name)
            self._rotate(folder, best.name)
        self.accelerator.wait_for_everyone()

    def _rotate(self, folder: Path, best: str) -> None:
        """Remove the oldest checkpoints beyond `save_total_limit`, never the best."""
        limit = self.args.save_total_limit
        old = [path for path in checkpoints(folder) if path.name != best]
        for path in old[: max(len(old) - limit, 0)] if limit else []:
            remove(path)

    def _load_best_model(self) -> None:
        check(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _run_epoch(self, **settings: Any) -> None:
        """As `Trainer`, which would take one step more after a checkpoint of the last one."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**settings)


class EarlyStopping(EarlyStoppingCallback):
    """Goes on with the patience that a checkpoint had left; `Trainer` starts anew with all of it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Take up the count of evaluations without a better loss."""
        super().on_train_begin(args, state, control)
        attributes = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.early_stopping_patience_counter = attributes["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience
        return control
