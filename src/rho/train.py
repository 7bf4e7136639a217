"""Train on the selected tokens: `SelectiveTrainer` on `transformers.Trainer`, and the stage around it.

Plain causal language modeling is ratio 1.0 of the same code; so is the training of the reference.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import MethodType
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from rho.corpus import Corpus
from rho.errors import ConfigError, DataError, MismatchError
from rho.linear_loss import linear_loss_sum, linear_token_loss
from rho.models import (
    ModelConfig,
    check_head,
    device,
    head,
    hidden_states,
    make_model,
    model_name,
    save_model,
    source_hash,
)
from rho.objective import IGNORE_INDEX, predictors
from rho.progress import say, track
from rho.runs import Manifest, atomic_write, open_stage, sync_folder
from rho.score import check_tokenizer, mean_loss
from rho.selection import Scope, Score, SelectionStats, Selector
from rho.store import ScoreStore

# Ours where they differ from transformers'. Everything else is transformers' own default.
DEFAULT_ARGUMENTS: dict[str, Any] = {
    "logging_steps": 10,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 500,
    "lr_scheduler_type": "cosine",
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


PARTIAL = ".partial"
CLM = Selector(ratio=1.0)


def _check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Each is a field of `TrainingArguments` that rho leaves to the user, with a value of its type."""
    kinds = get_type_hints(TrainingArguments)
    checked = {}
    for name, value in arguments.items():
        if name in ("output_dir", "seed", "data_seed", "remove_unused_columns", "label_names"):
            raise ValueError(f"{name}: set by rho (the folder, and `seed`), leave it out")
        if name not in kinds:
            raise ValueError(f"{name}: no field of transformers.TrainingArguments")
        try:
            checked[name] = TypeAdapter(kinds[name]).validate_python(value)  # YAML reads 1e-3 as a string
        except ValidationError as error:
            raise ValueError(f"{name}: {error.errors()[0]['msg']}, found {value!r}") from None
    return checked


Arguments = Annotated[dict[str, Any], AfterValidator(_check_arguments)]


class TrainConfig(BaseModel):
    """Settings of the train stage.

    Attributes:
        score, ratio, scope: the selection (`rho.selection.Selector`). Ratio 1.0 is plain CLM.
        seed: of the model's new weights, the order of the data and the random score.
        arguments: any field of `transformers.TrainingArguments`, by its own name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: Score = "excess"
    ratio: float = Field(1.0, gt=0.0, le=1.0)
    scope: Scope = "sequence"
    seed: int = 0
    arguments: Arguments = {}

    @property
    def selector(self) -> Selector:
        """The selection as an object."""
        return Selector(self.score, self.ratio, self.scope, self.seed)


class TrainingBlocks(Dataset):
    """The training split of a corpus, with its scores: input_ids, position_ids, labels, ref_loss, label, block."""

    def __init__(self, corpus: Corpus, scores: ScoreStore | None = None) -> None:
        if scores is not None:
            scores.check_corpus(corpus)
        self.corpus, self.scores = corpus, scores

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, block: int) -> dict[str, Tensor]:
        row = self.corpus.row(block, ("input_ids", "document", "label"))
        example = self.corpus.inputs(row)
        example["label"] = torch.from_numpy(row["label"].astype("int64"))
        example["block"] = torch.tensor(block)
        if self.scores is not None:
            ref_loss = self.scores.row(block, ("ref_loss",))["ref_loss"]
            if len(ref_loss) != len(row["input_ids"]):
                raise MismatchError(
                    f"block {block}: {len(row['input_ids'])} tokens in {self.corpus.folder}, {len(ref_loss)} scores in "
                    f"{self.scores.folder}. Score the corpus again."
                )
            example["ref_loss"] = torch.from_numpy(ref_loss.astype("float32"))
        return example


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows of equal length into a batch."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def selective_forward(selector: Selector) -> Callable[..., dict[str, Tensor]]:
    """A `forward` for a causal language model that returns the numerator of Eq. 4 instead of logits.

    It replaces the model's own, so that the loss is computed inside whatever wraps the model (DDP, FSDP, autocast).
    """

    def forward(
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        draw: int = 0,
        ref_loss: Tensor | None = None,
        block: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        active = selector if model.training else CLM
        hidden_ND = predictors(hidden_states(model, input_ids, position_ids)).flatten(0, 1)
        weight, bias = head(model)
        eligible = active.eligible(labels, ref_loss)

        def losses(where: Tensor) -> Tensor:
            wanted = labels.masked_fill(~where, IGNORE_INDEX).flatten()
            return linear_token_loss(hidden_ND, weight, wanted, bias)[0].view_as(labels)

        loss = losses(eligible) if active.needs_loss else None
        selected = active.select(eligible, loss, ref_loss, block, draw)
        rows = selected.flatten().nonzero().squeeze(-1)
        loss_sum, selected_loss = linear_loss_sum(hidden_ND.index_select(0, rows), weight, labels.flatten()[rows], bias)
        if loss is None:  # for the log alone
            loss = losses(eligible & ~selected)
            loss.view(-1)[rows] = selected_loss
        return {"loss": loss_sum, "token_loss": loss, "eligible": eligible, "selected": selected}

    return forward


class SelectiveTrainer(Trainer):
    """`transformers.Trainer` that trains on the tokens a `Selector` picks.

    The loss is Eq. 4: the sum over the selected tokens divided by the number of selected tokens of the whole optimizer
    step, over micro-batches and ranks. That number is known from labels and scores before the first forward.

    Args:
        model: a causal language model. Its `forward` is replaced as long as the trainer lives; what it saves is plain.
        selector: which tokens to train on.
        train_dataset: rows with input_ids, position_ids, labels, block and, where the score needs it, ref_loss.
        label_names: names of the token labels in the rows' `label`, for the share of each in the log.
        step_log: JSON lines file with one record a logging step; None for none.
        All else is `Trainer`'s.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        selector: Selector,
        args: TrainingArguments,
        train_dataset: Dataset,
        label_names: list[str] | None = None,
        step_log: Path | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} GPUs in one process: start one process a GPU with `torchrun` or `accelerate`."
            )
        args.remove_unused_columns = False
        args.logging_first_step = True  # a reference equal to the model shows before the first update only
        check_head(model)
        model.forward = MethodType(selective_forward(selector), model)
        kwargs.setdefault("data_collator", collate)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # compute_loss divides for the whole step
        self.selector, self.step_log = selector, step_log
        self._stats = SelectionStats(selector, label_names or [])
        self._logged_at = time.monotonic()
        self.add_callback(_LogBeforeSave())
        self.remove_callback(PrinterCallback)  # the step log and the progress bar say it better

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """The micro-batches of an optimizer step and the number of tokens it selects over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.selector.num_selected(self.eligible(batch)) for batch in batches]
        count = torch.stack(counts).sum().to(device) if counts else torch.zeros((), dtype=torch.int64, device=device)
        count = self.accelerator.gather(count).sum()
        if count == 0:
            raise DataError(
                f"step {self.state.global_step + 1}: no token to train on: no label, or no reference loss, in any of "
                f"{len(batches)} batches. Check the corpus and its scores."
            )
        return batches, count

    def eligible(self, batch: dict[str, Tensor]) -> Tensor:
        """Eligible tokens of a batch; an error if the scores that the selection needs are missing."""
        try:
            return self.selector.eligible(batch["labels"], batch.get("ref_loss"))
        except ValueError as error:
            raise MismatchError(f"{error}. The training rows have {', '.join(sorted(batch))}.") from error

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """Eq. 4. In evaluation (no count given): the mean loss of the batch's labelled tokens."""
        inputs = dict(inputs)
        label = inputs.pop("label", None)
        outputs = model(**inputs, draw=self.state.global_step)
        if num_items_in_batch is None:
            loss = outputs["loss"] / outputs["eligible"].sum()
        else:
            o = outputs
            self._stats.add(o["token_loss"], o["eligible"], o["selected"], inputs.get("ref_loss"), label)
            # Data parallel training averages over ranks; the count is the sum over them.
            loss = outputs["loss"] / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what selection did to the trainer's own log, and write the step record."""
        if "learning_rate" in logs and self._stats:
            record = self._stats.record(self.accelerator.reduce(self._stats.sums(), "sum"))
            self._stats = SelectionStats(self.selector, self._stats.label_names)
            before: dict[str, Any] = next((old for old in reversed(self.state.log_history) if "tokens_seen" in old), {})
            now, tokens = time.monotonic(), record.pop("tokens")
            record["tokens_seen"] = before.get("tokens_seen", 0) + tokens
            record["tokens_selected"] = before.get("tokens_selected", 0) + record["selected"]
            record["tokens_per_second"] = round(tokens / (now - self._logged_at), 1)
            self._logged_at = now
            record |= {name: logs[name] for name in ("grad_norm", "learning_rate") if name in logs}
            if self.step_log is not None and self.is_world_process_zero():
                with open(self.step_log, "a") as file:
                    file.write(json.dumps({"step": self.state.global_step, **record}) + "\n")
            logs |= {name: value for name, value in record.items() if isinstance(value, int | float)}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As `Trainer`, but under a temporary name first: a checkpoint that is there is whole."""
        final = Path(self.args.output_dir)
        partial = final / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(final)
        if self.is_world_process_zero():
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(final / name, ignore_errors=True)
            os.replace(partial / name, final / name)
            sync_folder(final)
        self.accelerator.wait_for_everyone()


class _LogBeforeSave(TrainerCallback):
    """A checkpoint carries the token counts in its log history, so what is saved must have been logged."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if control.should_save:
            control.should_log = True
        return control


def train(
    config: TrainConfig,
    corpus: Corpus,
    model: ModelConfig,
    out: str | os.PathLike[str],
    scores: ScoreStore | None = None,
    target: Corpus | None = None,
    allow_weak_reference: bool = False,
) -> Manifest:
    """Train `model` on `corpus` into the stage folder `out`: `model/`, `checkpoints/`, `steps.jsonl`.

    Args:
        config: selection, seed and `TrainingArguments`.
        corpus: its training split is trained on.
        model: what to start from.
        out: the stage folder; an interrupted run goes on from its last checkpoint.
        scores: the reference's; needed if the selection scores by excess loss.
        target: held-out text of the wanted domain, to compare the reference with the model before training.
        allow_weak_reference: go on with a reference that is no better on it than the model.

    Raises:
        MismatchError: scores of another corpus or tokenizer, a model with another vocabulary, a weak reference.
    """
    selector = config.selector
    if selector.needs_reference and scores is None:
        raise ConfigError(f"ratio {config.ratio} with score '{config.score}' needs --scores, found none.")
    data = TrainingBlocks(corpus, scores)
    inputs = {"corpus": corpus.fingerprint, "model": source_hash(model, config.seed)}
    if scores is not None:
        inputs["scores"] = scores.manifest.fingerprint
    with open_stage(out, "train", config.model_dump(), inputs) as stage:
        if stage.fresh:
            return stage.manifest
        network = make_model(model, corpus.vocab_size, config.seed)
        corpus.check_vocabulary(network.config.vocab_size, model_name(model))
        check_tokenizer(model, corpus)
        if selector.needs_reference and scores is not None and target is not None:
            check_reference(network, scores, target, allow_weak_reference)
        trainer = SelectiveTrainer(
            network,
            selector,
            training_arguments(config, stage.folder / "checkpoints"),
            data,
            label_names=corpus.labels,
            step_log=stage.folder / "steps.jsonl",
        )
        _fit(trainer, stage.folder, tokens_a_step(trainer, corpus))
        save_model(network, stage.folder / "model")
        corpus.tokenizer.save(stage.folder / "model")
        stage.add_folder("model")
        return stage.finish(checkpoints=_checkpoints(stage.folder))


def training_arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    """`TrainingArguments` from a config: ours, then the user's; an unknown name is an error."""
    try:
        arguments = {**DEFAULT_ARGUMENTS, **config.arguments}
        return TrainingArguments(**arguments, output_dir=str(folder), seed=config.seed, disable_tqdm=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"arguments: {error}. They are fields of transformers.TrainingArguments.") from error


def check_reference(model: PreTrainedModel, scores: ScoreStore, target: Corpus, allow_weak: bool) -> None:
    """Refuse a reference that predicts held-out target text no better than the untrained model does."""
    ref = scores.manifest.facts.get("target_loss")
    if ref is None or scores.manifest.inputs.get("target") != target.fingerprint:
        raise MismatchError(
            f"{scores.folder}: the reference's loss on {target.folder} is not recorded. Score again with --target "
            f"{target.folder}, or leave --target away to train without comparing reference and model."
        )
    own = mean_loss(model.to(device()), target).nats_per_token
    message = (
        f"on {target.folder} the reference's loss is {ref:.4f}, the model's before training {own:.4f} nats a token"
    )
    if ref < own:
        say(message)
    elif allow_weak:
        say(f"{message}: the reference is no better; going on as asked")
    else:
        raise MismatchError(
            f"{message}: a reference that is no better than the model selects noise. Train the reference longer or on "
            "better text; --allow-weak-reference goes on all the same."
        )


def tokens_a_step(trainer: SelectiveTrainer, corpus: Corpus) -> int:
    """Tokens that all ranks process in a whole optimizer step."""
    args = trainer.args
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size * corpus.block_length


def _fit(trainer: SelectiveTrainer, folder: Path, step_tokens: int) -> None:
    """Train to the end, going on from the last checkpoint if there is one."""
    checkpoints = folder / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    step = int(last.rsplit("-", 1)[1]) if last else 0
    steps = folder / "steps.jsonl"
    if steps.is_file():  # what was logged after that checkpoint is done again
        kept = [line for line in steps.read_text().splitlines() if _step_of(line) <= step]
        with atomic_write(steps) as file:
            file.writelines(f"{line}\n".encode() for line in kept)
    if last:
        say(f"train {folder.name}: going on from step {step}")
    args = trainer.args
    total = args.max_steps if args.max_steps > 0 else None
    if total is None:
        per_epoch = math.ceil(len(trainer.train_dataset) * trainer.train_dataset.corpus.block_length / step_tokens)
        total = math.ceil(per_epoch * args.num_train_epochs)
    with track(f"train {folder.name}", total * step_tokens, step * step_tokens) as advance:
        trainer.add_callback(_Progress(advance, step_tokens))
        with suppress(_AlreadyFinished):
            trainer.train(resume_from_checkpoint=last)


class _AlreadyFinished(Exception):
    """The checkpoint that was loaded is that of the last step: `Trainer` would take one step more."""


class _Progress(TrainerCallback):
    def __init__(self, advance: Callable[[int], None], step_tokens: int) -> None:
        self.advance, self.step_tokens = advance, step_tokens

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _AlreadyFinished

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.advance(self.step_tokens)


def _step_of(line: str) -> float:
    """A last line cut short by a kill counts as not written."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Every checkpoint with the tokens it had seen, in order of steps."""
    found = []
    for path in (folder / "checkpoints").glob("checkpoint-*"):
        history = json.loads((path / "trainer_state.json").read_bytes())["log_history"]
        last = next(entry for entry in reversed(history) if "tokens_seen" in entry)
        found.append(
            {
                "folder": path.relative_to(folder).as_posix(),
                "step": last["step"],
                "tokens_seen": last["tokens_seen"],
                "tokens_selected": last["tokens_selected"],
            }
        )
    return sorted(found, key=lambda checkpoint: checkpoint["step"])
