"""SelectiveTrainer: selection on a `transformers.Trainer` whose rows, checkpoints and log are rho's own."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from rho.backends import Backend
from rho.data import Padded, RowOrder, collate
from rho.distributed import all_gather
from rho.durable import DurableTrainer
from rho.errors import ConfigError, RhoError
from rho.filtered import FilteredBackward
from rho.history import History, HistoryConfig
from rho.mixin import SelectiveMixin
from rho.models import plain
from rho.progress import say
from rho.references.scorer import Scorer
from rho.selection import Cut, Selector
from rho.stats import SelectionStats

COMPARE_EVERY = 100  # optimizer steps between two looks at what a filtered backward loses: each costs two backwards


class SelectiveTrainer(SelectiveMixin, DurableTrainer):
    """`SelectiveMixin` on a `transformers.Trainer` with rho's rows, checkpoints, evaluation and step log.

    Args:
        model: a causal language model, or one with LoRA. Called by anyone but this trainer it does what it always did;
            what it saves is plain.
        selector: which tokens to train on.
        train_dataset: rows with input_ids, position_ids, labels, block, and the reference's columns of the score.
        label_names: names of the token labels in the rows' `label`, for the share of each in the log.
        step_log: JSON lines file with one record a logging step; None for none.
        cut: of scope dataset (`TrainingBlocks.cut`).
        skip_nonfinite: how many steps with a loss or gradient that is not finite are left out before training stops.
        backend: whose code makes the loss from hidden states; see `rho.backends`.
        reference: what gives the batches columns that the rows don't have, each time they come (an online reference).
        history: which weights of its own past are the reference, instead; not of a model in shards.
        filtered_backward: leave tokens that were not selected out of the blocks' backward, an approximation; how near
            it comes to the exact gradient is logged every `COMPARE_EVERY` steps.
        All else is `Trainer`'s.
    """

    control: Any

    def __init__(
        self,
        model: PreTrainedModel,
        selector: Selector,
        args: TrainingArguments,
        train_dataset: Dataset,
        label_names: list[str] | None = None,
        step_log: Path | None = None,
        cut: Cut | None = None,
        skip_nonfinite: int = 0,
        backend: Backend = "rho",
        reference: Scorer | None = None,
        history: HistoryConfig | None = None,
        filtered_backward: bool = False,
        **kwargs: Any,
    ) -> None:
        if filtered_backward:
            _check_filtered(args, backend)
        args.remove_unused_columns = False
        compiled, args.torch_compile_backend = args.torch_compile_backend, "no"  # done below
        args.logging_first_step = True  # a reference equal to the model shows before the first update only
        if args.torch_compile:  # selection has shapes that depend on the data: only the backbone gains from it
            plain(model).base_model.compile(backend=compiled, mode=args.torch_compile_mode)
        self.filtered = FilteredBackward(model) if filtered_backward else None
        self._compared: dict[str, float] | None = None  # filtered gradient and exact one, until logged
        kwargs.setdefault("data_collator", collate)
        self.cut, self.reference = cut, reference
        super().__init__(
            model=model, args=args, train_dataset=Padded(train_dataset), selector=selector, backend=backend, **kwargs
        )
        self.step_log = step_log
        if history is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError("references.history: not of a model in shards (FSDP, DeepSpeed). Leave one of them out.")
        self.history = None if history is None else History(model, history)
        self.order = RowOrder(len(train_dataset), args.train_batch_size * args.world_size, args.seed)  # type: ignore[arg-type]
        self._stats = SelectionStats(selector, label_names or [])
        self._logged_at = time.monotonic(), time.process_time()
        self.skip_nonfinite, self._skipped = skip_nonfinite, 0
        self.interrupted = False  # whether the run stops before its end, to go on another time
        self._seen = {"tokens": 0, "selected": 0}  # until the last log
        self.add_callback(_Housekeeping(self))
        self.remove_callback(PrinterCallback)  # the step log and the progress bar say it better

    def _get_train_sampler(self, *_: Any) -> RowOrder:
        return self.order

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Rows to evaluate: padded, where `Trainer` would read some again, to make the ranks even."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        return super().get_eval_dataloader(None if rows is None else Padded(rows))

    def _get_eval_sampler(self, eval_dataset: Any) -> list[int]:
        rows, batch = len(eval_dataset), self.args.eval_batch_size * self.args.world_size
        return [*range(rows), *[-1] * (-rows % batch)]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """As in `SelectiveMixin`; the gradient of a filtered backward is compared with the exact one now and then."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        first = self._step.done == 1 and self.state.global_step % COMPARE_EVERY == 0
        if self.filtered is not None and self.model.training and first and not self.is_fsdp_enabled:
            self._compared = self.filtered.compare(loss)  # under FSDP a rank has a shard alone
        return (loss, outputs) if return_outputs else loss

    def step_ended(self) -> None:
        """The threshold waits for `_get_grad_norm`, which says whether the step counts."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what selection did to the trainer's own log, and write the step record."""
        at_the_end = "train_runtime" in logs and bool(self._stats) and not self.interrupted
        if "learning_rate" in logs or at_the_end:
            found = self.selection_record()
            record: dict[str, Any] = found or {"tokens": 0, "selected": 0}  # not where every step was left out
            now, tokens = (time.monotonic(), time.process_time()), record.pop("tokens")
            seconds, cpu_seconds = (end - start for start, end in zip(self._logged_at, now, strict=True))
            self._seen["tokens"] += tokens
            self._seen["selected"] += record["selected"]
            record["tokens_seen"], record["tokens_selected"] = self._seen["tokens"], self._seen["selected"]
            record["tokens_per_second"] = round(tokens / seconds, 1)
            record["seconds"], record["cpu_seconds"] = round(seconds, 3), round(cpu_seconds, 3)  # since the last record
            record["ratio_asked"] = self.selector.at(self.state.global_step - 1).ratio
            if self._threshold.value is not None:
                record["threshold"] = self._threshold.value
            if self._compared is not None:
                record["filtered"], self._compared = self._compared, None
            if self._skipped:
                record["skipped"] = self._skipped
            self._logged_at = now
            record |= {name: logs[name] for name in ("grad_norm", "learning_rate") if name in logs}
            if found and self.step_log is not None and self.is_world_process_zero():
                with open(self.step_log, "a") as file:
                    file.write(json.dumps({"step": self.state.global_step, **record}) + "\n")
            logs |= {name: value for name, value in record.items() if isinstance(value, int | float)}
        super().log(logs, start_time)

    def own_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the state of `Trainer`: counts, also those not logged yet."""
        sums = self.accelerator.reduce(self._stats.sums(), "sum").tolist() if self._stats else []
        tokens, _, selected = sums[:3] if sums else (0, 0, 0)
        return {
            "tokens_seen": int(self._seen["tokens"] + tokens),
            "tokens_selected": int(self._seen["selected"] + selected),
            "logged": self._seen,
            "not_logged": sums,
            "skipped": self._skipped,
            "compared": self._compared,
        }

    def save_own(self, folder: Path) -> None:
        """The history's weights."""
        if self.history is not None:
            self.history.save(folder)

    def take_up(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Go on from what `own_state` and `save_own` gave."""
        if self.history is not None:
            self.history.load(checkpoint)
        self._seen, self._skipped = dict(state["logged"]), state["skipped"]
        self._compared = state["compared"]
        if state["not_logged"]:
            sums = torch.tensor(state["not_logged"], dtype=torch.float64, device=self.args.device)
            self._stats.go_on(sums if self.is_world_process_zero() else torch.zeros_like(sums))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Mean loss over all labelled tokens of the evaluation set: one sum over one count, over batches and ranks."""
        model, was_training = self.model_wrapped, self.model_wrapped.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in self.get_eval_dataloader(eval_dataset):
                with self.compute_loss_context_manager():
                    inputs = {k: v for k, v in self._prepare_inputs(batch).items() if k != "label"}
                    outputs = model(**inputs, selective=True)
                sums += torch.stack([outputs["loss"].double(), outputs["eligible"].sum().double()])
        model.train(was_training)
        nats, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": nats / max(tokens, 1.0), f"{metric_key_prefix}_tokens": tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called before every update: losses and gradients must be finite on every rank, or there is none."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # A gradient that overflows in float16 is the loss scaler's business.
        finite = self._step.finite and (self.accelerator.scaler is not None or math.isfinite(norm))
        if self.total(int(finite)) == self.args.world_size:
            self.follow(self._step)
            return norm
        self._leave_out(model, norm)
        return None

    def _leave_out(self, model: Any, norm: Any) -> None:
        """Drop the step's gradients, so that the update changes nothing, and its counts; an error beyond the budget."""
        message = (
            f"step {self.state.global_step + 1}: loss or gradient is not finite (gradient norm {float(norm)}), in "
            f"{self._step.suspects(self.train_dataset.rows, all_gather)}"
        )
        if self._skipped >= self.skip_nonfinite:
            raise RhoError(
                f"{message}. Training stopped before the update; what was saved before is good. Look at these "
                "documents, lower the learning rate, or allow N such steps to be left out (--on-nonfinite skip=N; "
                "skip_nonfinite: N in a config)."
            )
        self._skipped += 1
        say(f"{message}: left out, {self._skipped} of at most {self.skip_nonfinite}")
        self._stats.forget(self._step.done)
        model.zero_grad()


class _Housekeeping(TrainerCallback):
    """Keeps what is outside the trainer's own state in step with it."""

    def __init__(self, trainer: SelectiveTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.order.set_epoch(int(state.epoch))


def _check_filtered(args: TrainingArguments, backend: Backend) -> None:
    """Refuse what would make a filtered backward, or its comparison with the exact one, wrong."""
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    for wrong, what in (
        (args.torch_compile, "torch_compile, which makes its own backward"),
        (reentrant, "reentrant gradient checkpointing (use_reentrant: true)"),
        (backend != "rho", f"backend {backend}, whose loss can be passed backward only once"),
    ):
        if wrong:
            raise ConfigError(f"filtered_backward: not with {what}. Choose one.")
