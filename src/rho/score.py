"""Score: the reference's loss and entropy of every token of a corpus, into a store.

    tokens of a block    t0   t1   t2   t3          what the reference reads
    ref_loss             NaN  l1   l2   l3          l2 = -log P(t2 | t0 t1), at the index of t2

One block, one window: with `isolated` documents the window starts anew at each document. Every token but the first of
a window is scored exactly once.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from rho.corpus import Corpus
from rho.engines import POLL_SECONDS, Engine, run_workers
from rho.errors import ConfigError, DataError, MismatchError
from rho.linear_loss import linear_token_loss
from rho.models import (
    ModelConfig,
    Precision,
    check_head,
    check_isolation,
    device,
    head,
    hidden_states,
    make_model,
    model_folder,
    model_name,
    source_hash,
)
from rho.objective import IGNORE_INDEX, predictors, token_labels
from rho.progress import Advance, say, track
from rho.references.api import ApiConfig, ApiReference
from rho.runs import Manifest, Stage, hash_file, hash_json, load_manifest, open_stage, write_json
from rho.store import write_shard
from rho.tokenizer import Tokenizer


class ScoreConfig(BaseModel):
    """Settings of the score stage.

    Attributes:
        dtype: of the stored columns. float16 moves about 0.03 % of selections; float32 none.
        precision: of the reference's forward.
        batch_size: blocks a forward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float16", "float32"] = "float16"
    precision: Precision = "float32"
    batch_size: int = Field(8, ge=1)


def score_corpus(
    config: ScoreConfig,
    corpus: Corpus,
    reference: ModelConfig | ApiConfig,
    out: str | os.PathLike[str],
    target: Corpus | None = None,
    engine: Engine = "local",
    workers: int = 1,
    task: tuple[int, int] = (0, 1),
) -> Manifest:
    """Write `ref_loss` and (an API has none) `ref_entropy` of every token of `corpus` into the stage folder `out`.

    One output shard for each corpus shard, committed one by one: an interrupted run goes on after the last. With
    `target` (held-out text of the wanted domain) the reference's loss on it is recorded, and training can refuse a
    reference that is no better than the model.

    Args:
        config: what is stored, and how it is computed.
        corpus: what is scored.
        reference: what scores it: a model, or a server that has one.
        out: the store.
        target: see above.
        engine, workers: see `rho.engines`; one local worker is this process itself.
        task: (index, number): do every number-th shard, from that index on, as one of several jobs that share the
            folder. The last of them to end finishes the store.

    Raises:
        MismatchError: the reference has another tokenizer or too small a vocabulary; both sides are named.
        DataError: the reference gives a token no finite score; its document and shard are named.
    """
    inputs = {
        "corpus": corpus.fingerprint,
        "tokenizer": corpus.manifest.inputs["tokenizer"],
        "reference": _identity(reference),
        **({"target": target.fingerprint} if target else {}),
    }
    index, number = task
    if not 0 <= index < number or workers < 1:
        raise ConfigError(f"task {index} of {number}, {workers} workers: expected 0 <= index < number, and a worker.")
    with open_stage(out, "score", config.model_dump(), inputs, shared=True) as stage:
        if stage.fresh:
            return stage.manifest
        shards = corpus.shards[index::number]
        held_out = target.folder if target is not None and index == 0 else None
        job = _Job(config, corpus.folder, reference, stage.folder, shards, held_out)
        done = [shard for shard in shards if _receipt(stage.folder, shard["file"])]
        if done:
            say(f"score: going on after {len(done)} of {len(shards)} shards")
        tokens, tokens_done = (sum(s["rows"] for s in some) * corpus.block_length for some in (shards, done))
        with track(f"score {corpus.folder.name}", tokens, tokens_done) as advance:
            if workers == 1 and engine == "local":
                job.run(0, advance)
            else:
                job.watch(engine, workers, advance, corpus.block_length)
        name = reference.model if isinstance(reference, ApiConfig) else model_name(reference)
        return _finish(stage, corpus, target is not None, name)


@dataclass(frozen=True)
class _Job:
    """Shards to score, for any number of workers; it is sent to other processes."""

    config: ScoreConfig
    corpus: Path
    reference: ModelConfig | ApiConfig
    out: Path
    shards: list[dict[str, Any]]
    target: Path | None

    def __call__(self, worker: int) -> None:
        self.run(worker, lambda tokens: None)

    def run(self, worker: int, advance: Advance) -> None:
        """Score what nobody has scored yet, until all is: what another holds is waited for, he may be lost.

        Workers begin in different places, so they seldom meet.
        """
        corpus = Corpus(self.corpus)
        scorer = cache(lambda: load_scorer(self.reference, corpus, self.config.precision))
        if self.target is not None:
            with _claim(self.out, TARGET) as mine:
                if mine:
                    loss = _mean(scorer(), Corpus(self.target, "validation"), self.config.batch_size)
                    write_json(_receipt_path(self.out, TARGET), {"loss": loss.nats_per_token})
        shards = [*self.shards[worker:], *self.shards[:worker]]
        while left := [shard for shard in shards if not _receipt(self.out, shard["file"])]:
            held = True
            for shard in left:
                with _claim(self.out, shard["file"]) as mine:
                    if mine:
                        _score_shard(self.config, corpus, shard, scorer(), self.out, advance)
                        held = False
            if held:
                time.sleep(POLL_SECONDS)

    def watch(self, engine: Engine, workers: int, advance: Advance, block_length: int) -> None:
        """Let workers do it."""
        left = {s["file"]: s["rows"] for s in self.shards if not _receipt(self.out, s["file"])}

        def poll() -> None:
            for file in [file for file in left if _receipt_path(self.out, file).is_file()]:
                advance(left.pop(file) * block_length)

        run_workers(engine, self, min(workers, max(len(left), 1)), poll)
        poll()


TARGET, TARGET_LOSS = "target", "target_loss"


@contextmanager
def _claim(folder: Path, name: str) -> Iterator[bool]:
    """Whether this piece of work is ours: not finished, and nobody else is at it. A dead holder's lock is free."""
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    with lock:
        yield _receipt(folder, name) is None


def _receipt_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.json"


def _receipt(folder: Path, name: str) -> dict[str, Any] | None:
    """What was noted when a piece of work was finished: of a shard its hash and size. None if it is still to be done.

    Receipts are files until the manifest of the finished store takes them over.
    """
    path = _receipt_path(folder, name)
    try:
        receipt = json.loads(path.read_bytes())
    except FileNotFoundError:
        made = load_manifest(folder)
        if made is None:
            return None
        if name == TARGET:
            return {"loss": made.facts[TARGET_LOSS]} if TARGET_LOSS in made.facts else None
        receipt = made.outputs.get(name)
    if receipt is None or name == TARGET:
        return receipt
    shard = folder / name
    return receipt if shard.is_file() and shard.stat().st_size == receipt["bytes"] else None


def _finish(stage: Stage, corpus: Corpus, has_target: bool, reference: str) -> Manifest:
    """Complete the store if every piece of work is done; the last of several jobs to come here finds that it is."""
    with stage.alone() as unfinished:
        if not unfinished:
            return stage.manifest
        names = [*(s["file"] for s in corpus.shards), *([TARGET] if has_target else [])]
        receipts = {name: _receipt(stage.folder, name) for name in names}
        if missing := [name for name, receipt in receipts.items() if receipt is None]:
            say(f"score: {len(missing)} of {len(names)} shards are left to the other jobs")
            return stage.manifest
        for shard in corpus.shards:
            stage.add_output(shard["file"])
            if stage.manifest.outputs[shard["file"]] != receipts[shard["file"]]:
                (stage.folder / shard["file"]).unlink()
                raise DataError(
                    f"{stage.folder / shard['file']}: changed since it was written. Run the same command again: it "
                    "scores this shard anew."
                )
        facts = {TARGET_LOSS: receipts[TARGET]["loss"]} if has_target else {}  # type: ignore[index]
        shards = [{**s, "sha256": stage.manifest.outputs[s["file"]]["sha256"]} for s in corpus.shards]
        manifest = stage.finish(shards=shards, block_length=corpus.block_length, reference=reference, **facts)
        for name in names:
            _receipt_path(stage.folder, name).unlink(missing_ok=True)
            (stage.folder / f".{name}.lock").unlink(missing_ok=True)
        return manifest


Scorer = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # a batch's columns, on the CPU: ref_loss_BT first


def _identity(reference: ModelConfig | ApiConfig) -> str:
    """Content hash of a model; of a served one its name, which is all that is known of it, wherever the server is."""
    if isinstance(reference, ApiConfig):
        return hash_json([reference.kind, reference.model])
    return source_hash(reference)


def load_scorer(reference: ModelConfig | ApiConfig, corpus: Corpus, precision: Precision = "float32") -> Scorer:
    """What scores the batches of `corpus`, ready and checked."""
    if isinstance(reference, ApiConfig):
        api = ApiReference(reference)
        api.probe()
        return lambda batch: {"ref_loss": api.score(batch["input_ids"], batch["position_ids"])}
    model = load_reference(reference, corpus, precision)

    def by_model(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss_BT, entropy_BT = score_batch(model, batch, entropy=True)
        return {"ref_loss": loss_BT.cpu(), "ref_entropy": entropy_BT.cpu()}

    return by_model


def load_reference(reference: ModelConfig, corpus: Corpus, precision: Precision = "float32") -> PreTrainedModel:
    """The reference in eval mode, frozen, checked against the corpus's tokenizer and vocabulary."""
    model = make_model(reference, corpus.vocab_size, precision=precision)
    corpus.check_model(model.config, model_name(reference))
    check_tokenizer(reference, corpus)
    check_head(model)
    check_isolation(model, corpus.isolated)
    return model.to(device()).eval().requires_grad_(False)


def check_tokenizer(model: ModelConfig, corpus: Corpus) -> None:
    """Refuse a model that comes with another tokenizer than the corpus's, naming both."""
    if model.path is None:
        return
    folder = Path(model_folder(model.path))
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        return  # comes without a tokenizer (the library would make one up): the vocabulary check is all there is
    try:
        own = Tokenizer.load(folder if folder.is_dir() else model.path, corpus.tokenizer.eos)
    except ConfigError:
        return
    if own.fingerprint != corpus.tokenizer.fingerprint:
        raise MismatchError(
            f"the tokenizers differ: {corpus.folder} was made with {corpus.tokenizer.fingerprint[:12]} "
            f"(vocabulary {corpus.vocab_size}), {model.path} comes with {own.fingerprint[:12]} "
            f"(vocabulary {own.vocab_size}). Build the corpus with --tokenizer {model.path}, or take another model."
        )


@torch.no_grad()
def score_batch(model: PreTrainedModel, batch: dict[str, Tensor], entropy: bool = False) -> tuple[Tensor, Tensor]:
    """loss_BT (Eq. 1) and entropy_BT (Eq. 8; NaN unless asked for), nats, NaN where a token has no score.

    Every token is scored that has a predecessor in its window, special tokens too. The head's logits exist only for
    a chunk of rows at a time.
    """
    where = next(model.parameters()).device
    input_ids, position_ids = batch["input_ids"].to(where), batch["position_ids"].to(where)
    labels = token_labels(input_ids, position_ids)
    hidden = predictors(hidden_states(model, input_ids, position_ids)).flatten(0, 1)
    loss, entropies = linear_token_loss(hidden, head(model), labels.flatten(), entropy=entropy)
    if entropies is None:
        entropies = torch.full_like(loss, torch.nan)
    return loss.view_as(labels), entropies.view_as(labels)


@dataclass(frozen=True)
class MeanLoss:
    """Loss of a model on a set: sums over the tokens that have a label (special tokens do not)."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean loss."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Loss that does not depend on the tokenizer: bits for each UTF-8 byte of the scored tokens' text."""
        return self.nats / math.log(2) / self.bytes


def mean_loss(model: PreTrainedModel, corpus: Corpus, batch_size: int = 8) -> MeanLoss:
    """The model's loss on all labelled tokens of one split of a corpus."""
    was_training = model.training
    model.eval()
    found = _mean(lambda batch: {"ref_loss": score_batch(model, batch)[0].cpu()}, corpus, batch_size)
    model.train(was_training)
    return found


def _mean(scorer: Scorer, corpus: Corpus, batch_size: int) -> MeanLoss:
    nats, tokens, size = 0.0, 0, 0
    for shard in corpus.shards:
        for batch in _batches(corpus, shard, batch_size):
            labelled = batch["labels"] != IGNORE_INDEX
            nats += float(scorer(batch)["ref_loss"].double()[labelled].sum())
            tokens += int(labelled.sum())
            size += int(batch["num_bytes"][labelled].sum())
    if tokens == 0:
        raise DataError(f"{corpus.folder}: no token of the {corpus.split} split has a label. Give longer documents.")
    return MeanLoss(nats, tokens, size)


def _batches(corpus: Corpus, shard: dict, batch_size: int) -> Iterator[dict[str, Tensor]]:
    columns = corpus.read_shard(shard, ("input_ids", "document", "num_bytes"))
    for start in range(0, shard["rows"], batch_size):
        rows = [
            corpus.inputs({name: column[row] for name, column in columns.items()})
            | {"num_bytes": torch.from_numpy(columns["num_bytes"][row].astype("int64"))}
            for row in range(start, min(start + batch_size, shard["rows"]))
        ]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _score_shard(config: ScoreConfig, corpus: Corpus, shard: dict, scorer: Scorer, out: Path, advance: Advance) -> None:
    columns: dict[str, list[np.ndarray]] = {}
    for number, batch in enumerate(_batches(corpus, shard, config.batch_size)):
        for name, scores_BT in scorer(batch).items():
            stored = scores_BT.numpy().astype(config.dtype)
            bad = (batch["position_ids"].numpy() > 0) & ~np.isfinite(stored)
            if bad.any():
                row, token = (int(found) for found in np.argwhere(bad)[0])
                block = corpus.first_row(shard) + number * config.batch_size + row
                raise DataError(
                    f"{corpus.describe(block)}: the reference gives token {token} no finite score. Check the reference "
                    "(its weights, its precision) and that text."
                )
            columns.setdefault(name, []).append(stored)
        advance(batch["input_ids"].numel())
    path = out / shard["file"]
    write_shard(path, {name: np.concatenate(values) for name, values in columns.items()})
    write_json(_receipt_path(out, shard["file"]), {"sha256": hash_file(path), "bytes": path.stat().st_size})
