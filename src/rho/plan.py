"""`rho plan`: what a run will cost, from its config alone: FLOPs, tokens a second, hours, money, disk.

    tokens a second    of a device: given, measured in a run that has begun, or peak x MFU / FLOPs a token (`rho.flops`)
    device-hours       tokens / tokens a second
    disk               corpora and scores by the token, models and checkpoints by the parameter

Counted are the disk of the corpora, and training the references, scoring, and training each arm with each seed. Not
counted are tokenizing, which needs no accelerator, evaluation, dynamics, and what is downloaded.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table
from transformers import PreTrainedModel

from rho.config import RunConfig, StageName
from rho.errors import ConfigError
from rho.fit import num_steps
from rho.flops import forward_flops, train_flops
from rho.models import ModelConfig, skeleton
from rho.references.scorer import windows
from rho.runs import load_manifest
from rho.tokenizer import Tokenizer
from rho.train import STEP_LOG, TrainConfig, argument

Device = Literal["a100", "h100", "h200"]
PEAK: dict[Device, float] = {"a100": 312e12, "h100": 989e12, "h200": 989e12}  # FLOP/s in dense bfloat16, by the maker
COUNTED = ("reference", "scores", "train")
# Bytes on disk, as measured (docs/full-scale.md) of a token in a corpus, and in each column of a store,
CORPUS_BYTES = 1.9
SCORE_BYTES = {"float16": {"ref_loss": 1.64, "ref_entropy": 1.48}, "float32": {"ref_loss": 3.48, "ref_entropy": 3.33}}
# and of a parameter: float32, in a checkpoint with the two states of Adam.
MODEL_BYTES, CHECKPOINT_BYTES = 4, 12


class PlanConfig(BaseModel):
    """What is planned with.

    Attributes:
        devices: accelerators that share each stage: the processes of a training, the workers of a scoring.
        device: what they are, for the FLOP/s that they have at most.
        mfu: the share of these that is reached, where no throughput is known.
        throughput: tokens a second of one device, by the kind (`train`) or folder of a stage.
        price: of one device for an hour, in any currency.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    devices: int = Field(1, ge=1)
    device: Device = "h100"
    mfu: float = Field(0.3, gt=0, le=1)
    throughput: dict[str, Annotated[float, Field(gt=0)]] = {}
    price: float | None = Field(None, ge=0)


@dataclass(frozen=True)
class Cost:
    """What one stage costs; None where it does not apply, or can't be known.

    Attributes:
        stage: its folder in the run directory.
        tokens: that are processed, those of each epoch anew.
        steps: optimizer steps.
        flops: of all tokens.
        tokens_per_second: of one device.
        mfu: the share of the device's peak that this is.
        hours: of all devices together at work.
        device_hours, price, bytes: of the whole stage.
    """

    stage: str
    tokens: int | None = None
    steps: int | None = None
    flops: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    hours: float | None = None
    device_hours: float | None = None
    price: float | None = None
    bytes: float | None = None


def plan(
    config: PlanConfig, run: RunConfig, model: ModelConfig | None = None, folder: Path | None = None
) -> list[Cost]:
    """What each stage of `run` costs, in their order. Nothing is built, and no weights are read.

    Args:
        config: what it is planned with.
        run: the run.
        model: what to count instead of the run's model, where that can't be reached: its shape is all that is needed.
        folder: the run's directory, if it has begun: the sizes of corpora that are built there, and the throughput of
            trainings that were begun there, are taken from it.

    Raises:
        ConfigError: no such stage in `throughput`, or it is not known how many tokens or parameters there are.
    """
    for name in config.throughput:
        if any(stage.kind not in COUNTED for stage in run.stages([name])):
            raise ConfigError(f"throughput of {name}: only that of {', '.join(COUNTED)} is counted. Leave it out.")
    planned = _Plan(config, run, model or run.model, folder)
    return [*planned.corpora(), *(planned.cost(stage) for stage in run.stages() if stage.kind in COUNTED)]


def total(costs: list[Cost]) -> Cost:
    """All of them together, one stage after the other."""

    def added(name: str) -> float | None:
        known = [value for cost in costs if (value := getattr(cost, name)) is not None]
        return sum(known) if known else None

    return Cost(
        "total",
        flops=added("flops"),
        hours=added("hours"),
        device_hours=added("device_hours"),
        price=added("price"),
        bytes=added("bytes"),
    )


def measured(run: RunConfig, folder: Path) -> dict[str, float]:
    """Tokens a second of a device in the trainings that have begun in a run directory, by folder and by kind."""
    by_kind: dict[str, list[float]] = {}
    found: dict[str, float] = {}
    for stage in run.stages(["reference", "train"]):
        manifest, log = load_manifest(folder / stage.folder), folder / stage.folder / STEP_LOG
        if manifest is None or not log.is_file():
            continue
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]  # none that a kill cut short
        rates = [json.loads(line)["tokens_per_second"] for line in lines][1:]  # without the first step, which is slow
        if rates and "processes" in manifest.environment:
            found[stage.folder] = median(rates) / manifest.environment["processes"]
            by_kind.setdefault(stage.kind, []).append(found[stage.folder])
    return {kind: median(rates) for kind, rates in by_kind.items()} | found


class _Plan:
    """The costs of the stages of one run."""

    def __init__(self, config: PlanConfig, run: RunConfig, model: ModelConfig, folder: Path | None) -> None:
        self.config, self.run, self.model, self.folder = config, run, model, folder
        self.measured = measured(run, folder) if folder is not None else {}

    # Tokens

    def corpora(self) -> list[Cost]:
        """The disk of the corpora whose size is known."""
        known = {name: self.size(name) for name in self.run.corpora}
        return [
            Cost(f"corpus/{name}", tokens=tokens, bytes=tokens * CORPUS_BYTES)
            for name, tokens in known.items()
            if tokens is not None
        ]

    def size(self, name: str, split: str | None = None) -> int | None:
        """Tokens of a corpus, or one split of it: as it was built, or as it may have at most; None if nobody knows.

        One that was built with other settings says nothing: a run of a few steps may have less text.
        """
        corpus = self.run.corpora[name]
        built = load_manifest(self.folder / "corpus" / name) if self.folder else None
        if built is not None and built.status == "complete" and built.config == corpus.settings:
            splits = built.facts["splits"]
            blocks = splits[split]["blocks"] if split else sum(one["blocks"] for one in splits.values())
            return blocks * corpus.block_length
        if (most := corpus.most_tokens) is None:
            return None
        return round(most * (1 - corpus.heldout_fraction)) if split == "train" else most

    def rows(self, name: str) -> int:
        """Blocks of a corpus's train split."""
        if (tokens := self.size(name, "train")) is None:
            where = f", nor is it built in {self.folder}" if self.folder else ""
            raise ConfigError(
                f"corpora.{name}: how many tokens it has is not known: it has no max_tokens{where}. Say it with "
                f"--set corpora.{name}.max_tokens=N, or name the run directory where it is built with --run."
            )
        return tokens // self.run.corpora[name].block_length

    # Models

    def reference_model(self, name: str) -> ModelConfig:
        reference = self.run.references[name]
        return ModelConfig(path=reference.path) if reference.path else reference.model or self.model

    def shape(self, model: ModelConfig, tokenizer: str | None = None) -> PreTrainedModel:
        """The model without weights. A new one has the vocabulary of the run's tokenizer, or of one of its own."""
        if model.architecture is None or "vocab_size" in model.architecture:
            return skeleton(model)
        own = self.run.tokenizer
        if tokenizer is None and own.vocab_size is not None:
            return skeleton(model, own.vocab_size)
        return skeleton(model, Tokenizer.load(tokenizer or str(own.path), None if tokenizer else own.eos).vocab_size)

    # Stages

    def cost(self, stage: StageName) -> Cost:
        """What a stage that computes costs."""
        if stage.kind == "scores":
            return self.scores(stage)
        if stage.kind == "train":
            corpus = self.run.train.arms[stage.name].corpus or self.run.corpus
            return self.train(stage, self.run.train.arm(stage.name, stage.seed), corpus, self.model)
        reference = self.run.references[stage.name]
        config = TrainConfig(arguments=reference.arguments)
        model = self.reference_model(stage.name)
        return self.train(stage, config, str(reference.corpus), model, reference.tokenizer)

    def train(
        self, stage: StageName, config: TrainConfig, corpus: str, model: ModelConfig, tokenizer: str | None = None
    ) -> Cost:
        shape, length = self.shape(model, tokenizer), self.run.corpora[corpus].block_length
        micro_batches = argument(config, "gradient_accumulation_steps")
        rows_a_step = argument(config, "per_device_train_batch_size") * micro_batches * self.config.devices
        max_steps, epochs = argument(config, "max_steps"), argument(config, "num_train_epochs")
        rows = self.rows(corpus) if max_steps <= 0 else 0
        steps = num_steps(max_steps, epochs, rows, rows_a_step)
        tokens = length * (steps * rows_a_step if max_steps > 0 else round(rows * epochs))
        online = None
        for name in self.run.references_of(stage.name) if stage.kind == "train" else ():
            if self.run.references[name].online:  # then it is the arm's only one
                online = forward_flops(self.shape(self.reference_model(name)), length)
        flops = train_flops(forward_flops(shape, length), config, steps, micro_batches, online)
        parameters = shape.num_parameters()
        disk = parameters * (MODEL_BYTES + CHECKPOINT_BYTES * kept_checkpoints(config, steps, epochs))
        return self.spent(stage, tokens, flops, disk, steps)

    def scores(self, stage: StageName) -> Cost:
        corpus, reference = self.run.corpora[self.run.corpus], self.run.references[stage.name]
        length, score = corpus.block_length, self.run.score.of(corpus.block_length)
        assert score.context is not None and score.overlap is not None
        tokens = self.rows(self.run.corpus) * length
        columns = SCORE_BYTES[score.dtype]
        entropy = score.entropy and reference.api is None
        disk = tokens * (columns["ref_loss"] + (columns["ref_entropy"] if entropy else 0))
        if reference.api is not None:  # on somebody else's devices
            price = reference.api.price
            return Cost(stage.folder, tokens, bytes=disk, price=None if price is None else price * tokens / 1e6)
        read = sum(stop - start for start, _, stop in windows(length, score.context, score.overlap))
        shape = self.shape(self.reference_model(stage.name), reference.tokenizer)
        flops = forward_flops(shape, min(score.context, length)).total * read / length
        return self.spent(stage, tokens, flops, disk)

    def spent(self, stage: StageName, tokens: int, flops: float, disk: float, steps: int | None = None) -> Cost:
        """The cost of processing tokens of so many FLOPs each."""
        peak, devices = PEAK[self.config.device], self.config.devices
        keys = (stage.folder, stage.kind)
        known = [of[key] for of in (self.config.throughput, self.measured) for key in keys if key in of]
        rate = known[0] if known else peak * self.config.mfu / flops
        hours = tokens / rate / 3600
        price = None if self.config.price is None else hours * self.config.price
        mfu = rate * flops / peak
        return Cost(stage.folder, tokens, steps, flops * tokens, rate, mfu, hours / devices, hours, price, disk)


def kept_checkpoints(config: TrainConfig, steps: int, epochs: float) -> int:
    """How many checkpoints a training leaves on disk."""
    strategy, every = argument(config, "save_strategy"), argument(config, "save_steps")
    interval = every if every >= 1 else math.ceil(every * steps)  # below 1: a share of the steps
    made = {"steps": math.ceil(steps / interval), "epoch": math.ceil(epochs), "no": 0}.get(str(strategy), 1)
    return min(made, argument(config, "save_total_limit") or made)


COLUMNS = ("stage", "tokens", "steps", "FLOPs", "tokens/s", "MFU", "hours", "device-hours", "price", "GB on disk")


def table(config: PlanConfig, run: RunConfig, costs: list[Cost]) -> Table:
    """The costs and their sum for the terminal, a row a stage."""
    title = f"{run.name}, on {config.devices} x {config.device}; tokens/s are those of one"
    made = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="")
    for name in COLUMNS:
        made.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for cost in (*costs, total(costs)):
        steps, flops = (None if n is None else f"{n:{form}}" for n, form in ((cost.steps, ","), (cost.flops, ".1e")))
        mfu = None if cost.mfu is None else f"{cost.mfu:.0%}"
        disk = None if cost.bytes is None else cost.bytes / 1e9
        spent = [_short(number) for number in (cost.hours, cost.device_hours, cost.price, disk)]
        made.add_row(cost.stage, _short(cost.tokens), steps, flops, _short(cost.tokens_per_second), mfu, *spent)
    return made


def _short(number: float | None) -> str | None:
    """Three digits of it, or all before the point: 0.0123, 15.0, 37,202; 15.0 B."""
    if number is None:
        return None
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def as_json(config: PlanConfig, run: RunConfig, costs: list[Cost]) -> str:
    """The same for a program: what was planned with, each stage, and their sum."""
    tree = {
        "run": run.name,
        "config": config.model_dump(),
        "stages": [asdict(cost) for cost in costs],
        "total": asdict(total(costs)),
    }
    return json.dumps(tree, indent=1)
