"""The configuration of a whole run: one typed tree, read from YAML, written back resolved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rho.corpus import CorpusConfig
from rho.errors import ConfigError
from rho.evaluate import EvaluateConfig
from rho.models import ModelConfig
from rho.score import ScoreConfig
from rho.train import Arguments, TrainConfig


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
    """The reference: `model` trained at ratio 1.0 on the curated corpus, or a finished model at `path`."""

    corpus: str | None = None
    path: str | None = None
    seed: int = 0
    arguments: Arguments = {}

    @model_validator(mode="after")
    def _one_of(self) -> ReferenceSection:
        if (self.path is None) == (self.corpus is None):
            raise ValueError("give either 'corpus' (train the reference on it) or 'path' (a finished model)")
        return self


class TrainSection(_Section):
    """The arms: each trains `model` on the same corpus with its own selection, once for each seed.

    `arguments` holds for every arm; an arm's own `arguments` go on top.
    """

    arms: dict[str, TrainConfig] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    arguments: Arguments = {}
    allow_weak_reference: bool = False

    def arm(self, name: str, seed: int) -> TrainConfig:
        """The complete settings of one run."""
        arm = self.arms[name]
        return arm.model_copy(update={"seed": seed, "arguments": {**self.arguments, **arm.arguments}})


class EvaluateSection(EvaluateConfig):
    """`sets`: corpora whose `validation` split is evaluated; `explore`: the one written out token by token."""

    sets: list[str] = Field(min_length=1)
    explore: str | None = None


class RunConfig(_Section):
    """A run: corpora -> reference -> score -> train -> evaluate -> report.

    Attributes:
        name: of the run; its folder is `runs/<name>` unless another is asked for.
        tokenizer: shared by all corpora.
        corpora: every text there is, by name: curated, noisy, held-out.
        model: what every arm, and the reference, starts from.
        reference: which corpus it is trained on, and how.
        corpus: the noisy corpus that is scored and trained on.
        target: the corpus whose `validation` split is the wanted domain: it judges reference and arms.
        score, train, evaluate: settings of the stages.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    tokenizer: TokenizerSection
    corpora: dict[str, CorpusConfig] = Field(min_length=1)
    model: ModelConfig
    reference: ReferenceSection
    corpus: str
    target: str
    score: ScoreConfig = ScoreConfig()
    train: TrainSection
    evaluate: EvaluateSection

    @model_validator(mode="after")
    def _names_exist(self) -> RunConfig:
        named = {
            "corpus": [self.corpus],
            "target": [self.target],
            "reference.corpus": [self.reference.corpus] if self.reference.corpus else [],
            "tokenizer.corpora": self.tokenizer.corpora,
            "evaluate.sets": self.evaluate.sets,
            "evaluate.explore": [self.evaluate.explore] if self.evaluate.explore else [],
        }
        for key, names in named.items():
            for name in names:
                if name not in self.corpora:
                    raise ValueError(f"{key}: no corpus '{name}'; corpora: {', '.join(self.corpora)}")
        if self.target not in self.evaluate.sets:
            raise ValueError(f"evaluate.sets: the target '{self.target}' must be among them")
        return self


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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({error}).") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(tree).__name__}.")
    for override in overrides:
        _set(tree, override)
    return validated(RunConfig, tree, str(path))


def validated(kind: type[Any], tree: dict[str, Any], where: str) -> Any:
    """`kind(**tree)`, with every problem named by its key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, e['loc'])) or '(whole)'}: {e['msg']}"
            + (f", found {e['input']!r}" if not isinstance(e["input"], dict) else "")
            for e in error.errors()
        ]
        raise ConfigError(f"{where}: {len(problems)} setting(s) can't be used:\n" + "\n".join(problems)) from None


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`["a=1", "b.c=x"]` as `{"a": 1, "b": {"c": "x"}}`; values are YAML."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        _set(tree, pair)
    return tree


def _set(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override}: expected name=value.")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: '{parent}' is not a section.")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML ({error}).") from error
