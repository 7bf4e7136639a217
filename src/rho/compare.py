"""Two models on the same held-out text: the difference of their losses, and how sure it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rho.errors import DataError, MismatchError
from rho.runs import Manifest, hash_file, read_manifest

BLOCKS = "blocks.parquet"
RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 1 << 22  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A difference of losses, nats a token, and the interval that holds it with the confidence asked for."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    first_B: np.ndarray,
    second_B: np.ndarray,
    tokens_B: np.ndarray,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    stretch: int = 1,
) -> Interval:
    """Loss of the first model minus that of the second, with a percentile interval of the paired bootstrap.

    What is resampled are the blocks of the held-out text, with replacement, each with the losses of both models in it:
    how hard a block is falls out of the difference. The interval speaks of other text of the same kind. It does not
    speak of other training runs: for that, train more seeds. Sources: Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, sections 13.3 and 16.4; Politis and Romano, A circular block-resampling procedure, 1992.

    Args:
        first_B: sum of the first model's losses in each block, nats.
        second_B: of the second's, in the same blocks.
        tokens_B: tokens in each block.
        level: confidence of the interval.
        resamples: how many times the blocks are drawn.
        seed: of the draws.
        stretch: neighbouring blocks that are drawn together. Blocks of one document are alike; drawn one by one they
            make the interval too narrow.

    Raises:
        DataError: blocks that don't pair, fewer than two of them, or losses that are not finite.
    """
    if not first_B.shape == second_B.shape == tokens_B.shape or first_B.ndim != 1 or len(first_B) < 2:
        shapes = ", ".join(str(values.shape) for values in (first_B, second_B, tokens_B))
        raise DataError(f"paired_bootstrap: expected the same two or more blocks three times, found shapes {shapes}.")
    if not (np.isfinite(first_B).all() and np.isfinite(second_B).all()):
        raise DataError("paired_bootstrap: expected finite losses, found some that are not.")
    delta_B, number = first_B - second_B, len(first_B)
    random = np.random.default_rng(seed)
    drawn, rows = [], max(CHUNK // number, 1)
    for start in range(0, resamples, rows):
        first = random.integers(0, number, (min(rows, resamples - start), -(-number // stretch), 1), dtype=np.int32)
        chosen = ((first + np.arange(stretch, dtype=np.int32)) % number).reshape(len(first), -1)[:, :number]
        drawn.append(delta_B[chosen].sum(1) / tokens_B[chosen].sum(1))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(drawn), [tail, 100 - tail])
    return Interval(float(delta_B.sum() / tokens_B.sum()), float(low), float(high))


@dataclass(frozen=True)
class BlockSums:
    """One model's losses on one set: nats and tokens of each block, in order of the blocks."""

    model: str
    arm: str
    seed: int
    step: int | None
    set: str
    nats_B: np.ndarray
    tokens_B: np.ndarray

    @property
    def loss(self) -> float:
        """Mean, nats a token."""
        return float(self.nats_B.sum() / self.tokens_B.sum())


def read_blocks(folder: Path, manifest: Manifest) -> list[BlockSums]:
    """What an evaluate stage wrote of its blocks, in its order of models and sets; a `DataError` if it wrote none.

    Args:
        folder: of the finished stage.
        manifest: its manifest; the file must be the one recorded there.
    """
    path = folder / BLOCKS
    if BLOCKS not in manifest.outputs or not path.is_file():
        raise DataError(f"{folder}: no {BLOCKS} here. Evaluate again, into a new folder, with this version of rho.")
    if hash_file(path) != manifest.outputs[BLOCKS]["sha256"]:
        raise DataError(f"{path}: changed since its stage wrote it. Restore it or evaluate again.")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        keys = ["model", "arm", "seed", "step", "set"]
        sums = table.group_by([*keys, "block"], use_threads=False).aggregate([("nats", "sum"), ("tokens", "sum")])
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in sums.to_pylist():
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: can't be read as losses of blocks ({error}). Evaluate again.") from error
    found = []
    for key, rows in groups.items():
        rows.sort(key=lambda row: row["block"])
        nats, tokens = (np.array([row[name] for row in rows]) for name in ("nats_sum", "tokens_sum"))
        model, arm, seed, step, name = key
        found.append(BlockSums(model, arm, seed, step, name, nats, tokens))
    return found


@dataclass(frozen=True)
class Comparison:
    """One model against another on one set."""

    first: BlockSums
    second: BlockSums
    interval: Interval


def compare(folders: Sequence[str | os.PathLike[str]], resamples: int = RESAMPLES) -> list[Comparison]:
    """Every model against the first, on every set that both were evaluated on.

    Args:
        folders: that `rho evaluate`, or a run, wrote. Of one folder all models are compared; of several the last of
            each (of a training run, its last checkpoint).
        resamples: see `paired_bootstrap`.

    Raises:
        MismatchError: a set of the same name is another text.
        DataError: nothing to compare.
    """
    manifests = [read_manifest(folder, "evaluate") for folder in folders]
    read = [read_blocks(Path(folder), made) for folder, made in zip(folders, manifests, strict=True)]
    texts = [{key: value for key, value in made.inputs.items() if key.startswith("set:")} for made in manifests]
    models = [[row for row in rows if row.model == name] for rows in read for name in _models(rows, len(folders))]
    origin = [n for n, rows in enumerate(read) for _ in _models(rows, len(folders))]
    found = []
    for rows, where in zip(models[1:], origin[1:], strict=True):
        for second in models[0]:
            for first in (row for row in rows if row.set == second.set):
                key = f"set:{second.set}"
                if texts[where][key] != texts[0][key]:
                    raise MismatchError(
                        f"the set {second.set} is another text in {folders[where]} ({texts[where][key][:12]}) than in "
                        f"{folders[0]} ({texts[0][key][:12]}). Evaluate both on the same corpus."
                    )
                interval = paired_bootstrap(first.nats_B, second.nats_B, second.tokens_B, resamples=resamples)
                found.append(Comparison(first, second, interval))
    if not found:
        raise DataError(f"{', '.join(map(str, folders))}: no two models that were evaluated on the same set.")
    return found


def _models(rows: Sequence[BlockSums], folders: int) -> list[str]:
    names = list(dict.fromkeys(row.model for row in rows))
    return names if folders == 1 else names[-1:]


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as text, a line each."""
    lines = []
    for one in comparisons:
        low, high = one.interval.low, one.interval.high
        lines.append(
            f"{one.first.set}: {one.first.model} {one.first.loss:.4f}, {one.second.model} {one.second.loss:.4f} "
            f"nats a token: the first less the second {one.interval.difference:+.4f} "
            f"({100 * LEVEL:.0f} %: {low:+.4f} to {high:+.4f})"
        )
    return "\n".join(lines)
