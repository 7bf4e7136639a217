"""One row a token, as a model and a reference see it: what exploring writes, and pages and the terminal show."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rho.errors import DataError
from rho.runs import atomic_write

SCHEMA = pa.schema(
    {
        "arm": pa.string(),
        "seed": pa.int64(),
        "document": pa.string(),
        "source": pa.string(),
        "position": pa.int64(),
        "text": pa.string(),
        "loss": pa.float32(),
        "ref_loss": pa.float32(),
        "excess": pa.float32(),
        "rank": pa.float32(),
        "selected": pa.bool_(),
        "label": pa.string(),
        "dynamics": pa.string(),
        "block": pa.int64(),
    }
)


@dataclass(frozen=True)
class TokenRow:
    """One token of a document as one model and its reference see it; NaN where a number is not known.

    Attributes:
        arm, seed: what the model is called, and the seed of its training where there was one.
        document, source: where the text comes from.
        position: of the token in its row.
        text: what the token stands for; empty where it only goes on with the character that a token before it began.
        loss, ref_loss, excess: nats (Eq. 1 and 3).
        rank: by excess among the tokens ranked together: 0 is the lowest, 1 the highest.
        selected: whether it would be trained on.
        label: of the text's span that it is in.
        dynamics: the class of its losses over training, such as `H->L`.
        block: of the corpus, where the text is one.
    """

    arm: str
    seed: int | None
    document: str
    source: str
    position: int
    text: str
    loss: float
    ref_loss: float
    excess: float
    rank: float
    selected: bool
    label: str | None = None
    dynamics: str | None = None
    block: int | None = None

    @property
    def view(self) -> str:
        """The name of what sees it."""
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"


def write_rows(rows: Sequence[TokenRow], path: str | os.PathLike[str]) -> None:
    """Write a Parquet file with one row a token."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA)
    with atomic_write(path) as file:
        pq.write_table(table, file, write_page_checksum=True, compression="zstd")


def read_rows(path: str | os.PathLike[str]) -> list[TokenRow]:
    """Read what `write_rows` wrote; columns that may be empty may be missing.

    Raises:
        DataError: damaged, or no file of token rows.
    """
    try:
        rows = pq.read_table(path, page_checksum_verification=True).to_pylist()
        return [_row(position, row) for position, row in enumerate(rows)]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: can't be read as token rows ({error}). Run the evaluate stage again.") from error


def read_classes(
    path: str | os.PathLike[str], blocks: Collection[int | None]
) -> dict[tuple[int | None, int], str | None]:
    """The class of each token of some blocks, by (block, position), from what a dynamics stage wrote.

    Raises:
        DataError: damaged, or no such file.
    """
    try:
        table = pq.read_table(path, columns=["block", "position", "class"], page_checksum_verification=True)
        of_blocks = table.filter(pc.is_in(table["block"], pa.array([b for b in blocks if b is not None], pa.int64())))
        return {(row["block"], row["position"]): row["class"] for row in of_blocks.to_pylist()}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: can't be read as tokens' classes ({error}). Run the dynamics stage again.") from error


def _row(position: int, row: dict[str, Any]) -> TokenRow:
    seed, label, dynamics, block = row["seed"], row.get("label"), row.get("dynamics"), row.get("block")
    return TokenRow(
        arm=str(row["arm"]),
        seed=None if seed is None else int(seed),
        document=str(row["document"]),
        source=str(row["source"] or ""),
        position=int(row.get("position", position)),
        text=str(row["text"] or ""),
        **{name: _number(row[name]) for name in ("loss", "ref_loss", "excess", "rank")},
        selected=bool(row["selected"]),
        label=None if label is None else str(label),
        dynamics=None if dynamics is None else str(dynamics),
        block=None if block is None else int(block),
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
