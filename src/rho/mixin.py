"""SelectiveMixin: selection for `transformers.Trainer` and for what is built on it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rho.backends import Backend, linear_loss
from rho.distributed import all_gather, rank
from rho.errors import ConfigError, DataError, MismatchError, RhoError
from rho.filtered import FilteredBackward
from rho.forward import NO_FILTER, make_selective
from rho.history import History
from rho.integrations.labels import is_packed, split_labels
from rho.objective import IGNORE_INDEX, num_to_select, predicted
from rho.references.scorer import Scorer
from rho.selection import COLUMNS, Cut, RunningThreshold, Selector
from rho.stats import SelectionStats
from rho.step import Step


class SelectiveMixin:
    """Makes any `transformers.Trainer` train on the tokens a `Selector` picks: `class Mine(SelectiveMixin, Trainer)`.

    The loss is Eq. 4: the sum over the selected tokens divided by the number of selected tokens of the whole optimizer
    step, over micro-batches and ranks, whatever `Trainer` itself would divide by. It is made inside the model's
    forward, from hidden states.

    Rows have `input_ids` and `labels` (`labels[t]` is token t, -100 where a token takes no part). The columns of the
    score come beside them, or inside the labels (`rho.integrations.labels`), which survives every collator and packing.
    In a padding-free batch, one row with `cu_seq_lens_q` (as TRL packs), a sequence is one of its documents. In
    evaluation every label counts, and the scores are not needed.

    Args:
        selector: which tokens to train on.
        backend: whose code makes the loss from hidden states; see `rho.backends`.
        All else is the trainer's.

    Raises:
        ConfigError: the trainer makes a loss of its own, or runs several GPUs in one process.
    """

    # Of the trainer:
    accelerator: Any
    args: Any
    model: Any
    model_wrapped: Any
    state: Any
    _signature_columns: list[str] | None
    # Of a subclass that has them: the cut of scope dataset, an online reference or history, a filtered backward.
    cut: Cut | None = None
    reference: Scorer | None = None
    history: History | None = None
    filtered: FilteredBackward | None = None

    def __init__(self, *args: Any, selector: Selector, backend: Backend = "rho", **kwargs: Any) -> None:
        if selector.scope == "dataset" and self.cut is None:
            raise ConfigError(
                "scope dataset needs the cut of the whole corpus: pass cut=TrainingBlocks(...).cut(selector)"
            )
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs in one process: start one process each with `torchrun` or `accelerate`."
            )
        for setting, made in (("compute_loss_func", "compute_loss_func"), ("label_smoothing_factor", "label_smoother")):
            if getattr(self, made, None) is not None:
                raise ConfigError(f"{setting}: the selection makes the loss here. Leave it out.")
        make_selective(self.model, selector, linear_loss(backend), self.filtered or NO_FILTER)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # compute_loss divides for the whole step
        self.accelerator.gradient_accumulation_steps = 1  # nor may `backward`, which older versions ask to divide
        self.selector = selector
        self._stats = SelectionStats(selector, [])
        self._threshold = RunningThreshold()
        self._step = Step()

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that are not dropped from a data set."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]
            self._signature_columns = [*(self._signature_columns or []), *COLUMNS, "block"]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """The micro-batches of an optimizer step and the number of tokens it selects over all of them and all ranks.

        Where that number or the selection is not known before the gradients, the micro-batches are passed forward once
        without gradients, and go on with their masks.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        kept = self.state.stateful_callbacks.get(SelectiveMixin.__name__)
        if self._threshold.value is None and kept is not None:  # of the checkpoint that this run goes on from
            self._threshold = RunningThreshold(**kept)
        active = self.selector.at(self.state.global_step)
        batches = [self._unpacked(batch) for batch in batches]
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

    def _unpacked(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as `selective_forward` takes it: scores out of the labels, one sequence a row."""
        batch = dict(batch)
        # Of rows without any label `attach_scores` makes what they were: they have no scores, but no need of them.
        if is_packed(batch["labels"]) or bool((batch["labels"] == IGNORE_INDEX).all()):
            batch["labels"], score = split_labels(batch["labels"])
            if len(self.selector.columns) == 1:
                batch.setdefault(self.selector.columns[0], score)
        bounds = batch.get("cu_seq_lens_q")
        if bounds is not None and "rows" not in batch and len(batch["labels"]) == 1:
            batch |= _one_sequence_a_row(batch, bounds.long())
        batch["labels"] = predicted(batch["labels"])
        return batch

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
        columns = {name: batch[name] for name in COLUMNS if name in batch}
        length = batch["labels"].shape[1]
        return [p.scores(loss, columns, batch.get("block"), length, self.state.global_step) for p in active.parts]

    @torch.no_grad()
    def _losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Losses of a micro-batch's tokens before any gradient: the first of two forwards."""
        inputs = self._prepare_inputs({k: v for k, v in batch.items() if k != "label"})  # type: ignore[attr-defined]
        nothing = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()  # no dropout: what is selected depends on no draw, and a resumed run selects the same
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            outputs = self.model_wrapped(**inputs, selected=nothing, selective=True)
        self.model_wrapped.train(was_training)
        return outputs["token_loss"]

    def total(self, count: Tensor | int) -> Tensor:
        """A count summed over ranks."""
        return self.accelerator.reduce(torch.as_tensor(count).to(self.args.device), "sum")

    def eligible(self, batch: dict[str, Tensor]) -> Tensor:
        """Eligible tokens of a batch; an error if the scores that the selection needs are missing."""
        try:
            columns = {name: batch[name] for name in COLUMNS if name in batch}
            return self.selector.at(self.state.global_step).eligible(batch["labels"], columns)
        except ValueError as error:
            raise MismatchError(f"{error}. The training rows have {', '.join(sorted(batch))}.") from error

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """Eq. 4. In evaluation: the mean loss of the batch's labelled tokens."""
        inputs = dict(inputs)
        label = inputs.pop("label", None)
        if not self.model.training:
            outputs = model(**self._unpacked(inputs), selective=True)
            loss = outputs["loss"] / outputs["eligible"].sum().clamp(min=1)
            return (loss, outputs) if return_outputs else loss
        if self._threshold.value is not None:
            inputs["threshold"] = self._threshold.value
        outputs = model(**inputs, step=self.state.global_step, selective=True)
        self._count(outputs, inputs, label)
        # Data parallel training averages over ranks; the count is the sum over them.
        loss = outputs["loss"] / num_items_in_batch * self.accelerator.num_processes
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
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
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
            self.step_ended()
        return loss

    def step_ended(self) -> None:
        """Called after the gradients of a step are complete."""
        self.follow(self._step)

    def follow(self, step: Step) -> None:
        """Move the threshold of scope running by what this step's scores and its realised ratio were."""
        if step.scores:
            ratio = self.selector.at(self.state.global_step).ratio
            realised = ratio * float(self.total(step.selected) / step.asked)
            self._threshold.follow(torch.cat(step.scores), ratio, realised, all_gather)
            # What stands there is saved in the trainer's checkpoints, and read back with them.
            self.state.stateful_callbacks[SelectiveMixin.__name__] = asdict(self._threshold)

    def selection_record(self) -> dict[str, Any]:
        """What selection did since the last record, over all ranks; empty if nothing was trained on since."""
        record = {}
        if self._stats:
            record = self._stats.record(self.accelerator.reduce(self._stats.sums(), "sum"))
        self._stats = SelectionStats(self.selector, self._stats.label_names)
        return record

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what selection did to the trainer's own log."""
        if "learning_rate" in logs:
            logs |= {name: value for name, value in self.selection_record().items() if isinstance(value, int | float)}
        super().log(logs, start_time)  # type: ignore[misc]


def _one_sequence_a_row(batch: dict[str, Tensor], bounds: Tensor) -> dict[str, Tensor]:
    """Labels and columns of a flat batch with one sequence a row, and `rows`: which flat token stands there.

    Args:
        batch: one row of N tokens.
        bounds: where each sequence begins, and N.
    """
    lengths_B = bounds.diff()
    position_T = torch.arange(int(lengths_B.max()), device=bounds.device)
    inside_BT = position_T < lengths_B[:, None]
    rows_BT = torch.where(inside_BT, bounds[:-1].unsqueeze(-1) + position_T, 0)
    flat = {name: batch[name] for name in ("labels", *COLUMNS) if name in batch}
    moved = {name: values[0][rows_BT] for name, values in flat.items()}
    moved["labels"] = moved["labels"].masked_fill(~inside_BT, IGNORE_INDEX)
    return {**moved, "rows": rows_BT}
