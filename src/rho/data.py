"""What a trainer reads: blocks of a corpus joined with their scores, in an order that no batching changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from rho.corpus import Corpus
from rho.errors import ConfigError, DataError, MismatchError
from rho.history import HistoryConfig
from rho.objective import IGNORE_INDEX
from rho.selection import Cut, Selector, dataset_cut
from rho.store import ScoreStore

CombineReferences = Literal["mean", "min", "max", "weights"]


class References(BaseModel):
    """The references that score the tokens (`names`, or all) and how several become one: see `TrainingBlocks`.

    With `history` the only reference is the model itself, as it was: see `rho.history`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: list[str] | None = Field(None, min_length=1)
    combine: CombineReferences = "mean"
    weights: dict[str, float] | None = None
    history: HistoryConfig | None = None

    @model_validator(mode="after")
    def _weights_are_for_weights(self) -> References:
        if self.history is not None and (self.names or self.combine != "mean"):
            raise ValueError("'history' is the only reference: leave names, combine and weights out")
        if (self.combine == "weights") != (self.weights is not None):
            raise ValueError("'weights' by name go with combine: weights, and it with them")
        return self

    def chosen(self, scores: ScoreStore | Mapping[str, ScoreStore] | None) -> dict[str, ScoreStore]:
        """The stores of `names`, in their order."""
        stores = {"reference": scores} if isinstance(scores, ScoreStore) else dict(scores or {})
        names = self.names or list(stores)
        if missing := [name for name in names if name not in stores]:
            raise ConfigError(
                f"references.names: no scores of {', '.join(missing)}, found {', '.join(stores) or 'none'}."
            )
        return {name: stores[name] for name in names}


class TrainingBlocks(Dataset):
    """The training split of a corpus with its scores: input_ids, position_ids, labels, label, block, and the columns.

    Args:
        corpus: what is trained on.
        scores: one store, or several by name, each of this corpus.
        combine: how several references become one column: `mean`, `min`, `max`, or the sum with `weights`, by name
            (one wanted and one unwanted domain: weights 1 and -1).
        columns: which of `ref_loss` and `ref_entropy` to read.
    """

    def __init__(
        self,
        corpus: Corpus,
        scores: ScoreStore | Mapping[str, ScoreStore] | None = None,
        combine: CombineReferences = "mean",
        weights: Mapping[str, float] | None = None,
        columns: Sequence[str] = ("ref_loss",),
    ) -> None:
        self.stores = {"reference": scores} if isinstance(scores, ScoreStore) else dict(scores or {})
        for store in self.stores.values():
            store.check_corpus(corpus)
        if weights and combine != "weights":
            raise ConfigError(f"weights are for combine 'weights', found combine '{combine}'")
        if combine == "weights" and set(weights or {}) != set(self.stores):
            raise ConfigError(
                f"weights are for references {', '.join(weights or {}) or 'none'}, the scores given are "
                f"{', '.join(self.stores) or 'none'}. Name each of them once."
            )
        self.corpus, self.combine, self.weights, self.columns = corpus, combine, weights, tuple(columns)

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, block: int) -> dict[str, Tensor]:
        row = self.corpus.row(block, (*self.corpus.reads, "label"))
        example = self.corpus.inputs(row)
        example["label"] = torch.from_numpy(row["label"].astype("int64"))
        example["block"] = torch.tensor(block)
        return example | self.scores(block, len(row["input_ids"]))

    def scores(self, block: int, length: int) -> dict[str, Tensor]:
        """The reference's columns of one block, several references combined, float32."""
        if not self.stores or not self.columns:
            return {}
        found: dict[str, dict[str, Tensor]] = {column: {} for column in self.columns}
        for name, store in self.stores.items():
            for column, values in store.row(block, self.columns).items():
                if len(values) != length:
                    raise MismatchError(
                        f"block {block}: {length} tokens in {self.corpus.folder}, {len(values)} scores in "
                        f"{store.folder}. Score the corpus again."
                    )
                if np.isinf(values).any():  # NaN says that a token has no score
                    raise DataError(
                        f"block {block}: token {int(np.isinf(values).argmax())} has an infinite {column} in "
                        f"{store.folder / store.locate(block)[0]['file']}. Look at {self.corpus.describe(block)}, or "
                        "score the corpus again."
                    )
                found[column][name] = torch.from_numpy(values.astype("float32"))
        return {column: combined(values, self.combine, self.weights) for column, values in found.items()}

    def cut(self, selector: Selector) -> Cut:
        """Where scope `dataset` divides this corpus."""

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            for block in range(len(self)):
                example = self[block]
                columns = {name: example[name][None] for name in self.columns if name in example}
                eligible = selector.eligible(example["labels"][None], columns)
                yield selector.scores(None, columns, None, eligible.shape[1], 0)[0], eligible[0]

        return dataset_cut(rows, selector.ratio)


def combined(
    values: Mapping[str, Tensor], combine: CombineReferences, weights: Mapping[str, float] | None = None
) -> Tensor:
    """One column of several references', by name, as `TrainingBlocks` says."""
    if combine == "weights":
        return torch.stack([(weights or {})[name] * value for name, value in values.items()]).sum(0)
    stacked = torch.stack(list(values.values()))
    if combine == "mean":
        return stacked.mean(0)
    return stacked.amin(0) if combine == "min" else stacked.amax(0)


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows of equal length into a batch."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


class Padded(Dataset):
    """A data set in which row -1 is padding: a block without labels, so that nothing of it is trained on."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= 0:
            return self.rows[index]
        padding = dict(self.rows[0])
        padding["labels"] = torch.full_like(padding["labels"], IGNORE_INDEX)
        padding["block"] = torch.tensor(-1)
        return padding


class RowOrder(Sampler[int]):
    """Every row once an epoch, in an order that depends on seed and epoch alone, then padding (-1) to a whole batch.

    So the rows of an optimizer step are the same for any cut into micro-batches and ranks, and none is trained on twice
    to make the ranks even.

    Args:
        rows: number of rows.
        batch: rows that all ranks take in one micro-batch.
        seed: of the order.
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rows, self.batch, self.seed, self.epoch = rows, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + -self.rows % self.batch

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(self.rows).tolist()
        yield from [-1] * (len(self) - self.rows)
