"""The configuration of a whole run: one typed tree, read from YAML, written back resolved."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from rho.corpus import CorpusConfig
from rho.dynamics import DynamicsConfig
from rho.engines import Engine
from rho.errors import ConfigError
from rho.evaluate import EvaluateConfig
from rho.models import ModelConfig
from rho.references.api import ApiConfig
from rho.report.data import REFERENCE, is_reference, reference_folder
from rho.runs import atomic_write
from rho.score import ScoreConfig
from rho.settings import assign, validated
from rho.train import Arguments, References, TrainConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # becomes part of a folder's name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSection(_Section):
    """Either the `path` of a tokenizer, or the `vocab_size` of a byte-level BPE to train.

    It is trained on up to `max_characters` of the text of the named `corpora`, an equal share of each source.
    """

    path: str | None = None
    eos: str | None = None
    vocab_size: int | None = Field(None, ge=257)
    corpora: list[str] = []
    max_characters: int = Field(20_000_000, ge=1)

    @model_validator(mode="after")
    def _one_of(self) -> TokenizerSection:
        if (self.path is None) == (self.vocab_size is None):
            raise ValueError("give either 'path' (a tokenizer to load) or 'vocab_size' and 'corpora' (one to train)")
        if self.vocab_size is not None and not self.corpora:
            raise ValueError("'corpora': name the corpora whose text the tokenizer is trained on")
        return self


class ReferenceSection(_Section):
    """A reference: trained at ratio 1.0 on the curated `corpus`, a finished model at `path`, or one behind an `api`.

    Its training starts from the run's model, from another `model`, or from the one that the arm `after` has trained
    (with the first seed). It may have a `tokenizer` of its own: its losses are mapped onto the run's tokens. One
    that is `online` scores the batches of each arm as they come; nothing is stored.
    """

    corpus: str | None = None
    path: str | None = None
    api: ApiConfig | None = None
    tokenizer: str | None = None
    model: ModelConfig | None = None
    after: str | None = None
    online: bool = False
    seed: int = 0
    arguments: Arguments = {}

    @model_validator(mode="after")
    def _one_of(self) -> ReferenceSection:
        if [self.corpus, self.path, self.api].count(None) != 2:
            raise ValueError(
                "give one of 'corpus' (train the reference on it), 'path' (a finished model) and 'api' (a served one)"
            )
        if self.corpus is None and (self.model or self.after):
            raise ValueError("'model' and 'after' are what a training starts from: give a 'corpus', or leave them out")
        if self.model and self.after:
            raise ValueError("give either 'model' or 'after' (what its training starts from)")
        if self.after and self.tokenizer:
            raise ValueError(
                "'after' starts from a model of the run's tokenizer: leave 'tokenizer' out, or give a 'model'"
            )
        if self.online and (self.api or self.tokenizer):
            raise ValueError("'online' is for a model that is here and reads the run's tokens: leave it out")
        return self


class ScoreSection(ScoreConfig):
    """Settings of scoring, and who does it: see `rho.engines`."""

    engine: Engine = "local"
    workers: int = Field(1, ge=1)


class ArmSection(TrainConfig):
    """An arm: how it trains, and where it departs from the run.

    `corpus`: another corpus than the run's to train on; nothing scores it, so its selection must need no reference.
    `after`: it starts from the model that this arm has trained (with the same seed), not from the run's model.
    """

    corpus: str | None = None
    after: str | None = None


class TrainSection(_Section):
    """The arms: each trains `model` on the same corpus with its own selection, once for each seed.

    `arguments` holds for every arm; an arm's own `arguments` go on top.
    """

    arms: dict[Name, ArmSection] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1)
    arguments: Arguments = {}
    allow_weak_reference: bool = False

    def arm(self, name: str, seed: int) -> TrainConfig:
        """The complete settings of one training."""
        arm = self.arms[name]
        settings = {field: getattr(arm, field) for field in TrainConfig.model_fields}
        return TrainConfig(**{**settings, "seed": seed, "arguments": {**self.arguments, **arm.arguments}})


class EvaluateSection(EvaluateConfig):
    """`sets`: corpora whose `validation` split is evaluated; `explore`: the one written out token by token."""

    sets: list[str] = Field(min_length=1)
    explore: str | None = None


class DynamicsSection(DynamicsConfig):
    """`set`: the corpus whose `validation` split is followed; `arms`: those followed, all unless given."""

    set: str
    arms: list[str] | None = Field(None, min_length=1)


class StageName(NamedTuple):
    """One stage of a run: what it does, for which reference or arm, and with which seed."""

    kind: Literal["corpus", "reference", "scores", "train", "evaluate", "dynamics", "report"]
    name: str = ""
    seed: int = 0

    @property
    def folder(self) -> str:
        """Where it stands in the run directory; of a kind that has several folders and no name, what holds them."""
        named = {"scores": f"scores/{self.name}", "train": f"train/{self.name}-seed{self.seed}"}
        return reference_folder(self.name) if self.kind == "reference" else named.get(self.kind, self.kind)


class RunConfig(_Section):
    """A run: corpora -> references -> scores -> train -> evaluate, dynamics -> report.

    Attributes:
        name: of the run; its folder is `runs/<name>` unless another is asked for.
        tokenizer: shared by all corpora.
        corpora: every text there is, by name: curated, noisy, held-out.
        model: what every arm, and a reference unless it says otherwise, starts from.
        references: by name, made in this order; `reference: ...` is short for one of that name. An arm uses all of them
            unless its `references.names` says which.
        corpus: the noisy corpus that is scored and trained on (by an arm that names no other).
        target: the corpus whose `validation` split is the wanted domain: it judges reference and arms.
        score, train, evaluate: settings of the stages.
        dynamics: of following single tokens over the checkpoints; left out unless given.
    """

    name: Name
    tokenizer: TokenizerSection
    corpora: dict[Name, CorpusConfig] = Field(min_length=1)
    model: ModelConfig
    references: dict[Name, ReferenceSection] = Field(
        min_length=1, validation_alias=AliasChoices("references", "reference")
    )
    corpus: str
    target: str
    score: ScoreSection = ScoreSection()
    train: TrainSection
    evaluate: EvaluateSection
    dynamics: DynamicsSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_reference(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and "reference" in tree:
            if "references" in tree:
                raise ValueError("give either 'reference' (one) or 'references' (several by name)")
            tree = {"references" if key == "reference" else key: value for key, value in tree.items()}
            tree["references"] = {REFERENCE: tree["references"]}
        return tree

    @model_validator(mode="after")
    def _seeds_are_the_runs(self) -> RunConfig:
        for name, arm in self.train.arms.items():
            if "seed" in arm.model_fields_set:
                raise ValueError(f"train.arms.{name}.seed: every arm trains with each of train.seeds, leave it out")
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> RunConfig:
        references = self.references.items()
        named = {
            "corpus": [self.corpus],
            "target": [self.target],
            **{f"references.{name}.corpus": [one.corpus] for name, one in references if one.corpus},
            "tokenizer.corpora": self.tokenizer.corpora,
            "evaluate.sets": self.evaluate.sets,
            "evaluate.explore": [self.evaluate.explore] if self.evaluate.explore else [],
            "dynamics.set": [self.dynamics.set] if self.dynamics else [],
            **{f"train.arms.{name}.corpus": [arm.corpus] for name, arm in self.train.arms.items() if arm.corpus},
        }
        for key, names in named.items():
            _check_known(key, "corpus", names, self.corpora)
        for name, arm in self.train.arms.items():
            _check_known(f"train.arms.{name}.after", "arm", [arm.after] if arm.after else [], self.train.arms)
        if self.dynamics and self.dynamics.arms:
            _check_known("dynamics.arms", "arm", self.dynamics.arms, self.train.arms)
        if self.target not in self.evaluate.sets:
            raise ValueError(f"evaluate.sets: the target '{self.target}' must be among them")
        for name in self.train.arms:
            self._check_arm(name)
        for number, (name, reference) in enumerate(references):
            if reference.after is not None:
                _check_known(f"references.{name}.after", "arm", [reference.after], self.train.arms)
                earlier = list(self.references)[:number]
                for before in self.lineage(reference.after):
                    _check_known(f"references.{name}.after", "earlier reference", self.references_of(before), earlier)
        return self

    def _check_arm(self, arm: str) -> None:
        """Its name, its references, and where it departs from the run."""
        if is_reference(arm):
            raise ValueError(f"train.arms.{arm}: such a name is that of a reference in the report")
        section, names = self.train.arms[arm], self.references_of(arm)
        if not self.is_scored(arm) and (section.selector.columns or section.references != References()):
            raise ValueError(
                f"train.arms.{arm}: only '{self.corpus}' is scored, so nothing can be selected by a reference on "
                f"'{section.corpus}'; found ratio {section.ratio} with score {section.score}. Give ratio 1.0, or a "
                "score that needs no reference, and no 'references'"
            )
        self.lineage(arm)
        _check_known(f"train.arms.{arm}.references.names", "reference", names, self.references)
        if any(self.references[name].online for name in names):
            if len(names) > 1:
                raise ValueError(f"train.arms.{arm}: one that is online must be its only reference (references.names)")
            if section.scope == "dataset":
                raise ValueError(f"train.arms.{arm}.scope: dataset needs stored scores, '{names[0]}' is online")
        if "ref_entropy" in section.selector.columns:
            for name in names:
                reference = self.references[name]
                if reference.api or reference.tokenizer or not (self.score.entropy or reference.online):
                    raise ValueError(
                        f"train.arms.{arm}: it needs entropies, and those of '{name}' will not be known: a served "
                        "reference and one with a tokenizer of its own have none, and score.entropy may be off"
                    )
        weights = section.references.weights
        if weights is not None and set(weights) != set(names):
            raise ValueError(f"train.arms.{arm}.references.weights: name each of {', '.join(names)} once")

    def is_scored(self, arm: str) -> bool:
        """Whether an arm trains on the corpus that the references score."""
        return self.train.arms[arm].corpus in (None, self.corpus)

    def lineage(self, arm: str) -> list[str]:
        """The arms that an arm goes on after, from the first to itself; a `ValueError` if they go in a circle."""
        found = [arm]
        while (after := self.train.arms[found[0]].after) is not None:
            if after in found:
                raise ValueError(f"train.arms.{arm}.after: goes in a circle, {' after '.join([*found[::-1], after])}")
            found.insert(0, after)
        return found

    def references_of(self, arm: str) -> list[str]:
        """Names of the references that an arm uses; none where nothing scores its corpus, or its history is its own."""
        references = self.train.arms[arm].references
        if references.history is not None or not self.is_scored(arm):
            return []
        return references.names or list(self.references)

    def stages(self, only: Sequence[str] = ()) -> list[StageName]:
        """The stages in their order, each once: all of them, or those whose kind or folder is among `only`.

        Raises:
            ConfigError: there is no such stage.
        """
        found = [StageName("corpus")]
        for name, reference in self.references.items():
            if reference.after is not None:
                found.append(StageName("train", reference.after, self.train.seeds[0]))
            if reference.corpus is not None:
                found.append(StageName("reference", name))
            if not reference.online:
                found.append(StageName("scores", name))
        found += [StageName("train", arm, seed) for seed in self.train.seeds for arm in self.train.arms]
        found += [StageName("evaluate"), StageName("dynamics"), StageName("report")]
        known = {name: None for stage in found for name in (stage.kind, stage.folder)}
        for name in only:
            if name not in known:
                raise ConfigError(f"no stage '{name}' in this run; found {', '.join(known)}.")
        return [stage for stage in dict.fromkeys(found) if not only or {stage.kind, stage.folder} & {*only}]


def _check_known(key: str, what: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{key}: no {what} '{name}'; found {', '.join(known) or 'none'}")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, with `key.of.it=value` overrides (values are YAML too).

    Raises:
        ConfigError: no such file, not YAML, or a key that is unknown, missing or out of range; the key is named.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder; expected a config file, for instance recipes/demo.yaml.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # not text, or a date that is none
        raise ConfigError(f"{path}: not readable as YAML ({error}).") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(tree).__name__}.")
    for override in overrides:
        assign(tree, override)
    return validated(RunConfig, tree, str(path))


def save_config(config: RunConfig, path: Path) -> None:
    """Atomically write a config as YAML that `load_config` reads back the same."""
    tree = config.model_dump(exclude_defaults=True)
    with atomic_write(path) as file:
        file.write(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())
