"""SelectiveTrainer: `transformers.Trainer` that trains on the tokens a `Selector` picks."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from rho.backends import Backend, linear_loss
from rho.data import Padded, RowOrder, collate
from rho.distributed import all_gather, rank
from rho.durable import DurableTrainer
from rho.errors import ConfigError, DataError, MismatchError, RhoError
from rho.filtered import FilteredBackward
from rho.forward import NO_FILTER, selective_forward
from rho.history import History, HistoryConfig
from rho.models import check_head, plain
from rho.objective import num_to_select
from rho.progress import say
from rho.references.scorer import Scorer
from rho.selection import Cut, RunningThreshold, Selector
from rho.stats import SelectionStats
from rho.step import Step
from rho.store import SCORES

COMPARE_EVERY = 100  # optimizer steps between two looks at what a filtered backward loses: each costs two backwards


class SelectiveTrainer(DurableTrainer):
    """`transformers.Trainer` that trains on the tokens a `Selector` picks.

    The loss is Eq. 4: the sum over the selected tokens divided by the number of selected tokens of the whole optimizer
    step, over micro-batches and ranks.

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
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} GPUs in one process: start one process each with `torchrun` or `accelerate`."
            )
        if selector.scope == "dataset" and cut is None:
            raise ConfigError(
                "scope dataset needs the cut of the whole corpus: pass cut=TrainingBlocks(...).cut(selector)"
            )
        if filtered_backward:
            _check_filtered(args, backend)
        args.remove_unused_columns = False
        compiled, args.torch_compile_backend = args.torch_compile_backend, "no"  # done below
        args.logging_first_step = True  # a reference equal to the model shows before the first update only
        check_head(model)
        if args.torch_compile:  # selection has shapes that depend on the data: only the backbone gains from it
            plain(model).base_model.compile(backend=compiled, mode=args.torch_compile_mode)
        self.filtered = FilteredBackward(model) if filtered_backward else None
        self._compared: dict[str, float] | None = None  # filtered gradient and exact one, until logged
        ours = selective_forward(selector, linear_loss(backend), self.filtered or NO_FILTER)
        model.forward = MethodType(_either(ours, model.forward), model)
        kwargs.setdefault("data_collator", collate)
        super().__init__(model=model, args=args, train_dataset=Padded(train_dataset), **kwargs)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # compute_loss divides for the whole step
        self.accelerator.gradient_accumulation_steps = 1  # nor may `backward`, which older versions ask to divide
        self.selector, self.step_log, self.cut, self.reference = selector, step_log, cut, reference
        if history is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError("references.history: not of a model in shards (FSDP, DeepSpeed). Leave one of them out.")
        self.history = None if history is None else History(model, history)
        self.order = RowOrder(len(train_dataset), args.train_batch_size * args.world_size, args.seed)  # type: ignore[arg-type]
        self._stats = SelectionStats(selector, label_names or [])
        self._logged_at = time.monotonic()
        self.skip_nonfinite, self._skipped = skip_nonfinite, 0
        self.interrupted = False  # whether the run stops before its end, to go on another time
        self._seen = {"tokens": 0, "selected": 0}  # until the last log
        self._threshold = RunningThreshold()
        self._step = Step()
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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """The micro-batches of an optimizer step and the number of tokens it selects over all of them and all ranks.

        Where that number or the selection is not known before the gradients, the micro-batches are passed forward once
        without gradients, and go on with their masks.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        active = self.selector.at(self.state.global_step)
        if self.reference is not None:
            batches = [batch | self.reference(batch) for batch in batches]
        if self.history is not None:
            with self.history.in_place():
                batches = [batch | {"ref_loss": self._losses(batch)} for batch in batches]
            self.history.follow(self.state.global_step)
        eligible = [self.eligible(batch) for batch in batches]
        total = self.total(sum((mask.sum() for mask in eligible), torch.zeros((), dtype=torch.int64)))
        masks = self._decide(active, batches, eligible)
        if masks is not None:
            for batch, mask in zip(batches, masks, strict=True):
                batch["selected"] = mask
            asked = self.total(sum(mask.sum() for mask in masks))
        elif active.scope in ("step", "running") and active.selective:
            asked = num_to_select(total, active.ratio)
        else:
            counts = [count for mask in eligible if (count := active.num_selected(mask)) is not None]
            asked = self.total(sum(counts, torch.zeros((), dtype=torch.int64)))
        # A cut through the whole corpus, or two selections, may leave nothing of a step: its gradient is zero then.
        may_be_none = active.scope == "dataset" or active.second is not None
        if batches and asked == 0 and not (may_be_none and total > 0):
            why = (
                f"ratio {active.ratio} of {int(total)} eligible tokens rounds to none. Ask for a larger ratio, a wider "
                "scope or longer blocks"
                if total > 0
                else "no label, or no reference score. Check the corpus and its scores"
            )
            raise DataError(
                f"step {self.state.global_step + 1}: no token to train on in {len(batches)} batches: {why}."
            )
        rest = total - asked
        if active.retention and rest > 0:
            for batch in batches:
                batch["rest_weight"] = active.retention * asked.clamp(min=1).double() / rest
        one_pass_threshold = active.scope == "running" and active.selective and self._threshold.value is not None
        self._step = Step(len(batches), asked, exact=not one_pass_threshold)
        return batches, asked.clamp(min=1)

    def _decide(self, active: Selector, batches: list[dict], eligible: list[Tensor]) -> list[Tensor] | None:
        """The masks, where they must be, or can as well be, known before the forward; None where it decides."""
        if not active.selective or active.weighting != "mask" or not batches:
            return None
        in_forward = active.second is None and (
            active.scope in ("sequence", "batch")
            or (active.scope == "running" and self._threshold.value is not None)
            or (active.scope in ("step", "running") and len(batches) == 1)
        )
        if in_forward:
            return None
        if self.cut is not None and active.scope == "dataset":
            scores = [self._scores(active, batch, None)[0] for batch in batches]
            return [
                self.cut.mask(score, mask, batch["block"])
                for score, mask, batch in zip(scores, eligible, batches, strict=True)
            ]
        losses = [None if active.static else self._losses(batch) for batch in batches]
        scores_of = [self._scores(active, batch, loss) for batch, loss in zip(batches, losses, strict=True)]
        if active.scope in ("sequence", "batch"):
            return [active.select(scores, mask) for scores, mask in zip(scores_of, eligible, strict=True)]
        return active.select_step(scores_of, eligible, all_gather, rank())

    def _scores(self, active: Selector, batch: dict[str, Tensor], loss: Tensor | None) -> list[Tensor]:
        columns = {name: batch[name] for name in SCORES if name in batch}
        length = batch["labels"].shape[1]
        return [p.scores(loss, columns, batch.get("block"), length, self.state.global_step) for p in active.parts]

    @torch.no_grad()
    def _losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Losses of a micro-batch's tokens before any gradient: the first of two forwards."""
        inputs = self._prepare_inputs({k: v for k, v in batch.items() if k != "label"})
        nothing = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()  # no dropout: what is selected depends on no draw, and a resumed run selects the same
        with self.compute_loss_context_manager():
            outputs = self.model_wrapped(**inputs, selected=nothing, selective=True)
        self.model_wrapped.train(was_training)
        return outputs["token_loss"]

    def total(self, count: Tensor | int) -> Tensor:
        """A count summed over ranks."""
        return self.accelerator.reduce(torch.as_tensor(count).to(self.args.device), "sum")

    def eligible(self, batch: dict[str, Tensor]) -> Tensor:
        """Eligible tokens of a batch; an error if the scores that the selection needs are missing."""
        try:
            columns = {name: batch[name] for name in SCORES if name in batch}
            return self.selector.at(self.state.global_step).eligible(batch["labels"], columns)
        except ValueError as error:
            raise MismatchError(f"{error}. The training rows have {', '.join(sorted(batch))}.") from error

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """Eq. 4. In evaluation (no count given): the mean loss of the batch's labelled tokens."""
        inputs = dict(inputs)
        label = inputs.pop("label", None)
        if self._threshold.value is not None:
            inputs["threshold"] = self._threshold.value
        outputs = model(**inputs, step=self.state.global_step, selective=True)
        if num_items_in_batch is None:
            loss = outputs["loss"] / outputs["eligible"].sum()
        else:
            self._count(outputs, inputs, label)
            # Data parallel training averages over ranks; the count is the sum over them.
            loss = outputs["loss"] / num_items_in_batch * self.accelerator.num_processes
            first = self._step.done == 1 and self.state.global_step % COMPARE_EVERY == 0
            if self.filtered is not None and first and not self.is_fsdp_enabled:  # there, a rank has a shard alone
                self._compared = self.filtered.compare(loss)
        return (loss, outputs) if return_outputs else loss

    def _count(self, outputs: dict[str, Tensor], inputs: dict[str, Tensor], label: Tensor | None) -> None:
        selected, step = outputs["selected"], self._step
        step.done += 1
        step.selected = step.selected + selected.sum()
        block = inputs.get("block", torch.full((len(selected),), -1, device=selected.device))
        padding = block < 0 if "block" in inputs else None
        step.blocks.append(block)
        step.bad_blocks.append(block[(outputs["eligible"] & ~outputs["token_loss"].isfinite()).any(-1)])
        if "score" in outputs:
            step.scores.append(outputs["score"][outputs["eligible"]].detach().float())
        # What a whole step was asked for is checked at its end, what a micro-batch was asked for there.
        active = self.selector.at(self.state.global_step)
        asked = active.num_selected(outputs["eligible"])
        scored = inputs.get("ref_loss")
        self._stats.add(outputs["token_loss"], outputs["eligible"], selected, asked, scored, label, padding)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None) -> Tensor:
        """One micro-batch; after the last of a step whose count was not known before, the gradients are put right."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        step = self._step
        step.loss = step.loss + loss
        if step.done == step.micro_batches:
            actual = self.total(step.selected)
            if step.exact and actual != step.asked:
                raise RhoError(
                    f"step {self.state.global_step + 1}: {int(actual)} tokens were selected, {int(step.asked)} were "
                    "to be. Training stopped; please report this."
                )
            if not step.exact and actual > 0:
                correction = step.asked / actual
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(correction)
                loss = loss + (correction - 1) * step.loss  # the step's micro-batches add up to what they should
        return loss

    def _follow(self, step: Step) -> None:
        """Move the threshold of scope running by what this step's scores and its realised ratio were."""
        if step.scores:
            ratio = self.selector.at(self.state.global_step).ratio
            realised = ratio * float(self.total(step.selected) / step.asked)
            self._threshold.follow(torch.cat(step.scores), ratio, realised, all_gather)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what selection did to the trainer's own log, and write the step record."""
        at_the_end = "train_runtime" in logs and bool(self._stats) and not self.interrupted
        if "learning_rate" in logs or at_the_end:
            counted = bool(self._stats)  # not where every step was left out
            record: dict[str, Any] = {"tokens": 0, "selected": 0}
            if counted:
                record = self._stats.record(self.accelerator.reduce(self._stats.sums(), "sum"))
            self._stats = SelectionStats(self.selector, self._stats.label_names)
            now, tokens = time.monotonic(), record.pop("tokens")
            self._seen["tokens"] += tokens
            self._seen["selected"] += record["selected"]
            record["tokens_seen"], record["tokens_selected"] = self._seen["tokens"], self._seen["selected"]
            record["tokens_per_second"] = round(tokens / (now - self._logged_at), 1)
            record["ratio_asked"] = self.selector.at(self.state.global_step - 1).ratio
            if self._threshold.value is not None:
                record["threshold"] = self._threshold.value
            if self._compared is not None:
                record["filtered"], self._compared = self._compared, None
            if self._skipped:
                record["skipped"] = self._skipped
            self._logged_at = now
            record |= {name: logs[name] for name in ("grad_norm", "learning_rate") if name in logs}
            if counted and self.step_log is not None and self.is_world_process_zero():
                with open(self.step_log, "a") as file:
                    file.write(json.dumps({"step": self.state.global_step, **record}) + "\n")
            logs |= {name: value for name, value in record.items() if isinstance(value, int | float)}
        super().log(logs, start_time)

    def own_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the state of `Trainer`: counts, also those not logged yet, and threshold."""
        sums = self.accelerator.reduce(self._stats.sums(), "sum").tolist() if self._stats else []
        tokens, _, selected = sums[:3] if sums else (0, 0, 0)
        return {
            "tokens_seen": int(self._seen["tokens"] + tokens),
            "tokens_selected": int(self._seen["selected"] + selected),
            "logged": self._seen,
            "not_logged": sums,
            "skipped": self._skipped,
            "compared": self._compared,
            "threshold": dataclasses.asdict(self._threshold),
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
        self._threshold, self._compared = RunningThreshold(**state["threshold"]), state["compared"]
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
            self._follow(self._step)
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


def _either(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is `ours` where `selective` is asked for, and `theirs`, the model's own, for everybody else."""

    def forward(model: PreTrainedModel, *args: Any, selective: bool = False, **kwargs: Any) -> Any:
        return ours(model, **kwargs) if selective else theirs(*args, **kwargs)

    return forward
