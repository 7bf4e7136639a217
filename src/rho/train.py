"""Train on the selected tokens: `SelectiveTrainer` on `transformers.Trainer`, and the stage around it.

Plain causal language modeling is ratio 1.0 of the same code; so is the training of the reference.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from transformers import PreTrainedModel, TrainingArguments

from rho.backends import Backend
from rho.checkpoints import checkpoints, step_of
from rho.corpus import Corpus
from rho.data import References, TrainingBlocks
from rho.distributed import rank
from rho.durable import OWN_STATE, EarlyStopping
from rho.errors import ConfigError, MismatchError
from rho.fit import fit, keep_rows_a_step, stop
from rho.models import (
    ModelConfig,
    check_isolation,
    device,
    ends_documents,
    make_model,
    model_name,
    save_model,
    source_hash,
    text_config,
    with_lora,
)
from rho.progress import say
from rho.references.model import check_tokenizer, mean_loss, online_scorer
from rho.references.scorer import Scorer, mean_of
from rho.runs import Manifest, atomic_write, environment, open_stage
from rho.selection import Combine, Schedule, Scope, Score, Selector, Weighting
from rho.store import ScoreStore
from rho.trainer import SelectiveTrainer

# Ours where they differ from transformers'. Everything else is transformers' own default.
DEFAULT_ARGUMENTS: dict[str, Any] = {
    "logging_steps": 10,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 500,
    "lr_scheduler_type": "cosine",
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


REFUSED_ARGUMENTS = {
    **dict.fromkeys(
        ("output_dir", "seed", "data_seed", "remove_unused_columns", "label_names"), "set by rho (folder, seed)"
    ),
    **dict.fromkeys(
        ("save_only_model", "ignore_data_skip"), "an interrupted run could not go on as if it had not been"
    ),
    **dict.fromkeys(("auto_find_batch_size", "resume_from_checkpoint"), "a run goes on with the rows a step it began"),
    "enable_jit_checkpoint": "SIGTERM leads to a checkpoint anyway",
    "eval_on_start": "a resumed run would evaluate once more",
    **dict.fromkeys(("label_smoothing_factor", "train_sampling_strategy"), "without effect on loss and order here"),
}
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def _check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Each is a field of `TrainingArguments` that rho leaves to the user, with a value of its type."""
    kinds = get_type_hints(TrainingArguments)
    checked = {}
    for name, value in arguments.items():
        if name not in kinds:
            near = ", ".join(get_close_matches(name, kinds)) or "its documentation lists them"
            raise ValueError(f"{name}: no field of transformers.TrainingArguments; near it: {near}")
        if name in REFUSED_ARGUMENTS:
            raise ValueError(f"{name}: {REFUSED_ARGUMENTS[name]}, leave it out")
        if value is False and name.endswith("_strategy"):
            value = "no"  # as YAML reads a plain `no`
        if name == "fsdp" and value is True:
            checked[name] = value  # which its type does not say yet
            continue
        try:
            value = TypeAdapter(kinds[name]).validate_python(value)  # YAML reads 1e-3 as a string
        except ValidationError as error:
            raise ValueError(f"{name}: {error.errors()[0]['msg']}, found {value!r}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, found {value}")
        if name in AT_LEAST_ONE and value < 1:
            raise ValueError(f"{name}: expected 1 or more, found {value}")
        if (name == "max_steps" and value == 0) or (name == "num_train_epochs" and value <= 0):
            raise ValueError(f"{name}: expected a number above 0, found {value}")
        checked[name] = value
    return checked


Arguments = Annotated[dict[str, Any], AfterValidator(_check_arguments)]


class TrainConfig(BaseModel):
    """Settings of the train stage.

    Attributes:
        score, ratio, scope, schedule, second, combine, weighting, temperature, clip, retention: the selection; see
            `rho.selection.Selector`. Ratio 1.0 is plain CLM.
        references: how several references are combined.
        lora: fields of `peft.LoraConfig`: train adapters; the saved model has them merged.
        skip_nonfinite: steps with a loss or gradient that is not finite to leave out before training stops.
        filtered_backward: a faster step with an approximate gradient; see `rho.filtered`.
        backend: whose code makes the loss from hidden states; see `rho.backends`.
        early_stopping: evaluations on the target without a better loss before training stops.
        seed: of the model's new weights, the order of the data and the random score.
        arguments: any field of `transformers.TrainingArguments`, by its own name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: Score = "excess"
    ratio: float = Field(1.0, gt=0, le=1)
    scope: Scope = "sequence"
    schedule: Schedule | None = None
    second: Selector | None = None
    combine: Combine = "intersection"
    weighting: Weighting = "mask"
    temperature: float = 1.0
    clip: float = 5.0
    retention: float = 0.0
    references: References = References()
    lora: dict[str, Any] | None = None
    skip_nonfinite: int = Field(0, ge=0)
    filtered_backward: bool = False
    backend: Backend = "rho"
    early_stopping: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    arguments: Arguments = {}

    @model_validator(mode="after")
    def _selection_is_possible(self) -> TrainConfig:
        _ = self.selector  # raises a ValueError that names the setting
        if self.references.history is not None and {"retrospective"} != {
            part.score for part in self.selector.parts if part.score not in ("loss", "random")
        }:
            raise ValueError(
                f"references.history: the model's own past is the reference of score 'retrospective', found "
                f"'{self.score}'"
            )
        if self.backend != "rho" and (self.retention or self.weighting != "mask"):
            raise ValueError(f"backend {self.backend}: only rho's own knows soft weights and retention")
        return self

    @property
    def selector(self) -> Selector:
        """The selection as an object."""
        return Selector(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Selector)})

    def judged(self, references: Iterable[str]) -> list[str]:
        """Those of the `references` that must be better than the model on the target.

        Not one of an unwanted domain, nor one of the past.
        """
        selector = self.selector
        if not selector.selective or all(part.score not in ("excess", "ref_loss") for part in selector.parts):
            return []
        return [name for name in references if (self.references.weights or {}).get(name, 1.0) >= 0]


def train(
    config: TrainConfig,
    corpus: Corpus,
    model: ModelConfig,
    out: str | os.PathLike[str],
    scores: ScoreStore | Mapping[str, ScoreStore] | None = None,
    target: Corpus | None = None,
    allow_weak_reference: bool = False,
    reference: ModelConfig | None = None,
) -> Manifest:
    """Train `model` on `corpus` into the stage folder `out`: `model/`, `checkpoints/`, `steps.jsonl`.

    Under `torchrun` or `accelerate launch` every process calls it; the first one writes.

    Args:
        config: selection, seed and `TrainingArguments`.
        corpus: its training split is trained on.
        model: what to start from.
        out: the stage folder; an interrupted run goes on from its newest good checkpoint.
        scores: the reference's, or several references' by name; needed by every score but `loss` and `random`.
        target: held-out text of the wanted domain: compared with the reference before training, and evaluated during
            training where the arguments say so (`eval_strategy`).
        allow_weak_reference: go on with a reference that is no better on it than the model.
        reference: a model that scores every batch as it comes, instead of `scores`: nothing is stored, and each epoch
            of each run pays for its forward again (in bfloat16 on an accelerator).

    Raises:
        MismatchError: scores of another corpus or tokenizer, a model with another vocabulary, a weak reference.
    """
    selector = config.selector
    reference = _online(config, scores, reference)
    stores = config.references.chosen(scores) if reference is None else {}
    if selector.columns and not stores and reference is None and config.references.history is None:
        raise ConfigError(f"ratio {config.ratio} with score '{config.score}' needs --scores (--reference), found none.")
    columns = ("ref_loss", *(c for c in selector.columns if c != "ref_loss")) if stores else ()
    data = TrainingBlocks(corpus, stores, config.references.combine, config.references.weights, columns)
    inputs = {"corpus": corpus.fingerprint, "model": source_hash(model, config.seed)}
    inputs |= {f"scores:{name}": store.manifest.fingerprint for name, store in data.stores.items()}
    if reference is not None:
        inputs["reference"] = source_hash(reference)
    if config.lora and model.path is None:
        raise ConfigError("lora: adapters need a finished model to adapt; give one as model.path (--model FOLDER).")
    with open_stage(out, "train", config.model_dump(mode="json"), inputs, follow=rank() > 0) as stage:
        if stage.fresh:
            return stage.manifest
        _check_not_itself(config, inputs, data)
        network = _network(model, corpus, config.seed)
        args = training_arguments(config, stage.folder / "checkpoints", target is not None)
        scorer = None if reference is None else online_scorer(reference, corpus, "ref_entropy" in selector.columns)
        if target is not None:
            _check_references(config, network, data, scorer, target, allow_weak_reference)
        rows_a_step = keep_rows_a_step(args, stage)
        held_out = TrainingBlocks(target) if target is not None else None
        trainer = _trainer(config, network, args, data, held_out, scorer)
        late = fit(trainer, stage.folder, corpus.block_length, rows_a_step)
        # Sharded weights are put together by all ranks.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
        if rank() > 0:
            return stage.manifest
        save_model(trainer.model.merge_and_unload() if config.lora else network, stage.folder / "model", weights)
        corpus.tokenizer.save(stage.folder / "model")
        write_card(stage.folder / "model" / "README.md", config, model_name(model), stage.manifest.inputs)
        stage.add_folder("model")
        stage.add_output(STEP_LOG)
        best = trainer.state.best_global_step if args.load_best_model_at_end else None
        step = best or trainer.state.global_step
        made = stage.finish(step=step, checkpoints=_checkpoints(stage.folder), columns=list(selector.columns))
        if late is not None:
            stop(late, f"{stage.folder}: finished")
        return made


def _online(
    config: TrainConfig, scores: ScoreStore | Mapping[str, ScoreStore] | None, reference: ModelConfig | None
) -> ModelConfig | None:
    """The reference that scores batches as they come, where the selection needs one."""
    if reference is not None and (scores or config.scope == "dataset" or config.references.combine == "weights"):
        raise ConfigError(
            "reference: scores batches as they come, and is the only one, so it goes neither with --scores nor with "
            "weights of several, nor with scope dataset, which ranks the whole corpus at once. Leave these out."
        )
    if config.references.history is not None and (scores or reference is not None):
        raise ConfigError(
            "references.history: the model's own past is the only reference. Leave --scores and --reference out."
        )
    return reference if config.selector.columns else None


def _network(model: ModelConfig, corpus: Corpus, seed: int) -> PreTrainedModel:
    """The model to train, checked against what it is to read."""
    network = make_model(model, corpus.vocab_size, seed)
    if model.path is None:
        ends_documents(network, corpus.tokenizer.eos_id)
    corpus.check_model(text_config(network), model_name(model))
    check_tokenizer(model, corpus)
    check_isolation(network, corpus.isolated)
    return network


def _trainer(
    config: TrainConfig,
    network: PreTrainedModel,
    args: TrainingArguments,
    data: TrainingBlocks,
    target: TrainingBlocks | None,
    reference: Scorer | None,
) -> SelectiveTrainer:
    selector = config.selector
    try:
        return SelectiveTrainer(
            with_lora(network, config.lora, config.seed),
            selector,
            args,
            data,
            label_names=data.corpus.labels,
            step_log=Path(str(args.output_dir)).parent / STEP_LOG,
            cut=data.cut(selector) if selector.scope == "dataset" and selector.selective else None,
            skip_nonfinite=config.skip_nonfinite,
            filtered_backward=config.filtered_backward,
            backend=config.backend,
            reference=reference,
            history=config.references.history if selector.columns else None,
            eval_dataset=target,
            callbacks=[EarlyStopping(config.early_stopping)] if config.early_stopping else [],
        )
    except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is not installed, settings at odds
        raise ConfigError(f"arguments: the trainer can't be set up with these ({error}).") from error


STEP_LOG = "steps.jsonl"
LEAST_MARGIN = 0.01  # nats a token; less is what precision and noise make of equal models
CARD = """---
tags: [selective-language-modeling]
---
# A model trained by Selective Language Modeling

Trained with rho on the tokens that a selection picked (Rho-1, arXiv 2404.07965). A plain Transformers model.

| | |
|---|---|
{rows}
"""


def write_card(path: Path, config: TrainConfig, base: str, inputs: dict[str, str]) -> None:
    """A model card that says what the model was made from and how."""
    selector = config.selector
    facts = {
        "base model": base,
        "score, ratio, scope": f"{selector.score}, {selector.ratio}, {selector.scope}",
        "weighting, retention": f"{selector.weighting}, {selector.retention}",
        "seed": config.seed,
        **{f"{name} (SHA-256)": value for name, value in inputs.items()},
        **environment(),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    with atomic_write(path) as file:
        file.write(CARD.format(rows=rows).encode())


def _check_not_itself(config: TrainConfig, inputs: Mapping[str, str], data: TrainingBlocks) -> None:
    """Refuse to rank by excess loss over a reference that is the model itself: the excess would be zero."""
    selector = config.selector
    if not selector.selective or all(part.score != "excess" for part in selector.parts):
        return
    references = {str(store.folder): store.manifest.inputs["reference"] for store in data.stores.values()}
    for name, reference in {**references, "reference": inputs.get("reference")}.items():
        if reference == inputs["model"]:
            raise MismatchError(
                f"{name}: the reference and the model to train are the same weights, so the excess loss is "
                "zero. Give another reference or another model."
            )


def argument(config: TrainConfig, name: str) -> Any:
    """What `training_arguments` would have under this name: the user's, ours, or transformers' own default."""
    default = TrainingArguments.__dataclass_fields__[name].default
    return {**DEFAULT_ARGUMENTS, **config.arguments}.get(name, default)


def training_arguments(config: TrainConfig, folder: Path, evaluates: bool = False) -> TrainingArguments:
    """`TrainingArguments` from a config: ours, then the user's.

    Raises:
        ConfigError: arguments that are at odds with each other, or ask for evaluations where it `evaluates` nothing.
    """
    arguments = {**DEFAULT_ARGUMENTS, **config.arguments}
    if config.early_stopping:
        arguments = {"metric_for_best_model": "eval_loss", **arguments}
    try:
        made = TrainingArguments(**{"disable_tqdm": True, **arguments}, output_dir=str(folder), seed=config.seed)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"arguments: {error}. They are fields of transformers.TrainingArguments.") from error
    if made.eval_strategy == "epoch" and made.save_strategy == "steps":
        raise ConfigError(
            "arguments: a checkpoint of an epoch's last step would come before that epoch's evaluation, which a "
            "resumed run leaves out: set eval_strategy and save_strategy both to 'epoch', or both to 'steps'."
        )
    if made.eval_strategy != "no" and not evaluates:
        raise ConfigError(f"arguments: eval_strategy is '{made.eval_strategy.value}', which needs a target (--target).")
    if config.early_stopping and made.eval_strategy == "no":
        raise ConfigError("early_stopping: counts evaluations on the target: set eval_strategy and eval_steps as well.")
    return made


def _check_references(
    config: TrainConfig,
    network: PreTrainedModel,
    data: TrainingBlocks,
    online: Scorer | None,
    target: Corpus,
    allow_weak: bool,
) -> None:
    for name in config.judged(data.stores):
        check_reference(network, data.stores[name], target, allow_weak)
    if online is not None and config.judged(["reference"]):
        compare_reference(network, mean_of(online, target, batch_size=8).nats_per_token, target, allow_weak)


def check_reference(model: PreTrainedModel, scores: ScoreStore, target: Corpus, allow_weak: bool) -> None:
    """Refuse scores of a reference that predicts held-out target text no better than the untrained model does."""
    ref = scores.manifest.facts.get("target_loss")
    if ref is None or scores.manifest.inputs.get("target") != target.fingerprint:
        raise MismatchError(
            f"{scores.folder}: the reference's loss on {target.folder} is not recorded. Score again with --target "
            f"{target.folder}, or leave --target away to train without comparing reference and model."
        )
    compare_reference(model, ref, target, allow_weak)


def compare_reference(model: PreTrainedModel, ref: float, target: Corpus, allow_weak: bool) -> None:
    """Refuse a reference whose loss (nats a token) on held-out target text is not below the untrained model's."""
    own = mean_loss(model.to(device()), target).nats_per_token
    message = (
        f"on {target.folder} the reference's loss is {ref:.4f}, the model's before training {own:.4f} nats a token"
    )
    if ref < own - LEAST_MARGIN:
        say(message)
    elif allow_weak:
        say(f"{message}: the reference is no better; going on as asked")
    else:
        raise MismatchError(
            f"{message}: a reference that is no better than the model selects noise. Train the reference longer or on "
            "better text; --allow-weak-reference goes on all the same."
        )


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Every checkpoint with its content hash and the tokens it had seen, in order of steps."""
    found = []
    for path in checkpoints(folder / "checkpoints"):
        counts = json.loads((path / OWN_STATE).read_bytes())
        found.append(
            {
                "folder": path.relative_to(folder).as_posix(),
                "content": source_hash(ModelConfig(path=str(path))),
                "step": step_of(path),
                "tokens_seen": counts["tokens_seen"],
                "tokens_selected": counts["tokens_selected"],
            }
        )
    return found
