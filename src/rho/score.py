"""Score: the reference's loss and entropy of every token of a corpus, into a store.

    tokens of a block    t0   t1   t2   t3          what the reference reads
    ref_loss             NaN  l1   l2   l3          l2 = -log P(t2 | t0 t1), at the index of t2

A reference that can't read a whole block reads it in windows (`rho.references.scorer`), one with another tokenizer in
its own tokens (`rho.references.mapped`). A block that it can't score does not stop a job: it is put into quarantine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rho.corpus import Corpus
from rho.engines import POLL_SECONDS, Engine, run_workers
from rho.errors import ConfigError, DataError, MismatchError, UnscorableError
from rho.models import ModelConfig, Precision, model_name, source_hash
from rho.progress import Advance, say, track
from rho.receipts import (
    FILE,
    QUARANTINED,
    TARGET,
    claim,
    quarantine_path,
    receipt,
    receipt_path,
    remove_receipt,
    write_receipt,
)
from rho.references.api import ApiConfig, ApiReference, Meter
from rho.references.mapped import mapped, start_of_text
from rho.references.model import load_reference, score_batch
from rho.references.scorer import UNREAD, Batch, Scorer, batches, in_windows, mean_of
from rho.runs import Manifest, Stage, hash_json, load_manifest, open_stage, write_json
from rho.store import write_shard
from rho.tokenizer import Tokenizer

PROBE = ".probe.json"  # what a served model said of the known prompt
QUARANTINE = 100  # one block in so many (and one in a smaller shard) may lack scores; more are the reference's fault


class ScoreConfig(BaseModel):
    """Settings of the score stage.

    Attributes:
        dtype: of the stored columns. float16 moves about 0.03 % of selections; float32 none.
        precision: of the reference's forward.
        batch_size: blocks a forward.
        context: the reference's tokens that it reads at once; as many as a block has, if not given. See `windows`.
        overlap: of these, tokens that are read for the second time, where windows overlap; half of them if not given.
        entropy: whether `ref_entropy` is stored besides `ref_loss`: twice the size, and a few percent of the time.
        compile: whether the reference's backbone is compiled.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float16", "float32"] = "float16"
    precision: Precision = "float32"
    batch_size: int = Field(8, ge=1)
    context: int | None = Field(None, ge=2)
    overlap: int | None = Field(None, ge=1)
    entropy: bool = True
    compile: bool = False

    def of(self, block_length: int) -> ScoreConfig:
        """With the window that blocks of this length are read in.

        Raises:
            ConfigError: the windows would never get on.
        """
        context = self.context or block_length
        overlap = self.overlap or context // 2
        if overlap >= context:
            raise ConfigError(f"overlap: expected fewer than the {context} tokens of the context, found {overlap}.")
        return self.model_copy(update={"context": context, "overlap": overlap})


Reference = ModelConfig | ApiConfig


class Source(NamedTuple):
    """What scores, and where its own tokenizer is, if that is not the corpus's."""

    reference: Reference
    tokenizer: str | None = None


def score_corpus(
    config: ScoreConfig,
    corpus: Corpus,
    reference: Reference,
    out: str | os.PathLike[str],
    target: Corpus | None = None,
    reference_tokenizer: str | None = None,
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
        reference_tokenizer: where the reference's own tokenizer is, if that is not the corpus's.
        engine, workers: see `rho.engines`; one local worker is this process itself.
        task: (index, number): do every number-th shard, from that index on, as one of several jobs that share the
            folder. The last of them to end finishes the store.

    Raises:
        MismatchError: the reference has another tokenizer or too small a vocabulary; both sides are named.
        DataError: too many blocks of a shard have no score.
    """
    own, wanted = (text and text.manifest.inputs["tokenizer"][:12] for text in (corpus, target))
    if target is not None and own != wanted:
        raise MismatchError(
            f"the tokenizers differ: {corpus.folder} was made with {own}, the target {target.folder} with {wanted}. "
            "Build the target with the corpus's tokenizer."
        )
    inputs = {
        "corpus": corpus.fingerprint,
        "tokenizer": corpus.manifest.inputs["tokenizer"],
        **identity(reference, reference_tokenizer, corpus),
        **({"target": target.fingerprint} if target else {}),
    }
    index, number = task
    if not 0 <= index < number or workers < 1:
        raise ConfigError(f"task {index} of {number}, {workers} workers: expected 0 <= index < number, and a worker.")
    with open_stage(out, "score", config.of(corpus.block_length).model_dump(), inputs, shared=True) as stage:
        if stage.fresh:
            return stage.manifest
        shards = corpus.shards[index::number]
        held_out = target.folder if target is not None and index == 0 else None
        made_from = stage.manifest.made_from
        job = _Job(config, corpus.folder, reference, reference_tokenizer, stage.folder, made_from, shards, held_out)
        done = [shard for shard in shards if receipt(stage.folder, shard["file"], made_from)]
        if done:
            say(f"score: going on after {len(done)} of {len(shards)} shards")
        tokens, tokens_done = (sum(s["rows"] for s in some) * corpus.block_length for some in (shards, done))
        with track(f"score {corpus.folder.name}", tokens, tokens_done, note=_cost(reference, stage, shards)) as advance:
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
    reference: Reference
    reference_tokenizer: str | None
    out: Path
    made_from: str
    shards: list[dict[str, Any]]
    target: Path | None

    def __call__(self, worker: int) -> None:
        self.run(worker, lambda tokens: None)

    def run(self, worker: int, advance: Advance) -> None:
        """Score what nobody has scored yet, until all is: what another holds is waited for, he may be lost.

        Workers begin in different places, so they seldom meet.
        """
        corpus = Corpus(self.corpus)
        meter = Meter()
        scorer = cache(
            lambda: load_scorer(self.config, self.reference, corpus, self.reference_tokenizer, meter, self.out)
        )
        if self.target is not None:
            with claim(self.out, TARGET, self.made_from) as mine:
                if mine:
                    loss = self._loss_on(Corpus(self.target, "validation"), meter)
                    write_receipt(self.out, TARGET, self.made_from, loss=loss)
        shards = [*self.shards[worker:], *self.shards[:worker]]
        while left := [shard for shard in shards if not receipt(self.out, shard["file"], self.made_from)]:
            held = True
            for shard in left:
                with claim(self.out, shard["file"], self.made_from) as mine:
                    if mine:
                        self._check_alone()
                        quarantined = _score_shard(self.config, corpus, shard, scorer(), self.out, advance)
                        facts = {QUARANTINED: quarantined, "tokens_sent": meter.take()}
                        write_receipt(self.out, shard["file"], self.made_from, **facts)
                        held = False
            if held:
                time.sleep(POLL_SECONDS)

    def _loss_on(self, target: Corpus, meter: Meter) -> float:
        """The reference's mean loss on the target, whose blocks may be other ones than the corpus's.

        A scorer of its own, which is gone before the corpus's is loaded: there may be room for one reference only.
        """
        scorer = load_scorer(self.config, self.reference, target, self.reference_tokenizer, meter, self.out)
        return mean_of(scorer, target, self.config.batch_size).nats_per_token

    def _check_alone(self) -> None:
        """Another job may have begun here before anything was finished, with other settings."""
        found = load_manifest(self.out)
        if found is not None and found.made_from != self.made_from:
            raise MismatchError(
                f"{self.out}: another job, with other settings, writes here now. Run one of the two in a folder of its "
                "own."
            )

    def watch(self, engine: Engine, workers: int, advance: Advance, block_length: int) -> None:
        """Let workers do it."""
        left = {s["file"]: s["rows"] for s in self.shards if not receipt(self.out, s["file"], self.made_from)}

        def poll() -> None:
            for file in [file for file in left if receipt_path(self.out, file).is_file()]:
                advance(left.pop(file) * block_length)

        run_workers(engine, self, min(workers, max(len(left), 1)), poll)
        poll()


def _finish(stage: Stage, corpus: Corpus, has_target: bool, reference: str) -> Manifest:
    """Complete the store if every piece of work is done; the last of several jobs to come here finds that it is."""
    with stage.alone() as unfinished:
        if not unfinished:
            return stage.manifest
        names = [*(s["file"] for s in corpus.shards), *([TARGET] if has_target else [])]
        receipts = {name: receipt(stage.folder, name, stage.manifest.made_from) for name in names}
        done = {name: found for name, found in receipts.items() if found is not None}
        if missing := len(names) - len(done):
            say(f"score: {missing} of {len(names)} shards are left to the other jobs")
            return stage.manifest
        shards = []
        for shard in corpus.shards:
            file, found = shard["file"], done[shard["file"]]
            stage.add_output(file)
            if stage.manifest.outputs[file] != {key: found[key] for key in FILE}:
                (stage.folder / file).unlink()
                raise DataError(
                    f"{stage.folder / file}: changed since it was written. Run the same command again: it scores this "
                    "shard anew."
                )
            listed = quarantine_path(stage.folder, file)
            stage.manifest.outputs.pop(listed.name, None)
            if found[QUARANTINED]:
                stage.add_output(listed.name)
                say(f"score: {found[QUARANTINED]} blocks of {file} have tokens without a score, in {listed}")
            shards.append({**shard, "sha256": found["sha256"], QUARANTINED: found[QUARANTINED]})
        facts = {"target_loss": done[TARGET]["loss"]} if has_target else {}
        manifest = stage.finish(shards=shards, block_length=corpus.block_length, reference=reference, **facts)
        for name in names:
            remove_receipt(stage.folder, name)
        return manifest


def _cost(reference: Reference, stage: Stage, shards: list[dict[str, Any]]) -> Callable[[], str]:
    """What an API's finished shards have cost so far, for whoever waits."""
    known: dict[str, int] = {}

    def note() -> str:
        if not isinstance(reference, ApiConfig):
            return ""
        for shard in shards:
            if shard["file"] not in known and (found := receipt(stage.folder, shard["file"], stage.manifest.made_from)):
                known[shard["file"]] = found.get("tokens_sent", 0)
        sent = sum(known.values())
        price = f" for {reference.price * sent / 1e6:,.2f}" if reference.price is not None else ""
        return f"{sent:,} tokens sent{price}"

    return note


def identity(reference: Reference, reference_tokenizer: str | None, corpus: Corpus) -> dict[str, str]:
    """What makes other scores of a corpus, for a manifest.

    `reference`: content hash of a model; of a served one its name, which is all that is known of it, wherever the
    server is. `reference_tokenizer`: where that is another than the corpus's.
    """
    if isinstance(reference, ApiConfig):
        found = {"reference": hash_json([reference.kind, reference.model])}
    else:
        found = {"reference": source_hash(reference)}
    other = _other_tokenizer(reference_tokenizer, corpus)
    if other is not None:
        found["reference_tokenizer"] = hash_json([other.fingerprint, start_of_text(other)])
    return found


def _other_tokenizer(path: str | None, corpus: Corpus) -> Tokenizer | None:
    """The reference's tokenizer, if it is another than the corpus's."""
    found = Tokenizer.load(path) if path is not None else corpus.tokenizer
    return None if found.fingerprint == corpus.tokenizer.fingerprint else found


def load_scorer(
    config: ScoreConfig,
    reference: Reference,
    corpus: Corpus,
    reference_tokenizer: str | None,
    meter: Meter,
    store: Path | None = None,
) -> Scorer:
    """What scores the batches of `corpus`, ready and checked; the arguments are those of `score_corpus`.

    A served model must be the one that the other shards of `store` were scored by.
    """
    config = config.of(corpus.block_length)
    assert config.context is not None and config.overlap is not None
    tokenizer = _other_tokenizer(reference_tokenizer, corpus)
    if isinstance(reference, ApiConfig):
        api = ApiReference(reference, meter)
        api.probe()
        if store is not None:
            if (store / PROBE).is_file():
                api.check_same_weights(json.loads((store / PROBE).read_bytes()))
            else:
                write_json(store / PROBE, api.known)

        def scorer(batch: Batch) -> dict[str, Tensor]:
            return {"ref_loss": api.score(batch["input_ids"], batch["position_ids"])}
    else:
        model = load_reference(reference, corpus, config.precision, config.context, tokenizer)
        if config.compile:
            model.base_model.compile()

        def scorer(batch: Batch) -> dict[str, Tensor]:
            loss_BT, entropy_BT = score_batch(model, batch, entropy=config.entropy)
            columns = {"ref_loss": loss_BT, "ref_entropy": entropy_BT} if config.entropy else {"ref_loss": loss_BT}
            return {name: column.cpu() for name, column in columns.items()}

    in_parts = in_windows(scorer, config.context, config.overlap)
    return in_parts if tokenizer is None else mapped(in_parts, corpus.tokenizer, tokenizer, corpus.isolated)


def _score_shard(config: ScoreConfig, corpus: Corpus, shard: dict, scorer: Scorer, out: Path, advance: Advance) -> int:
    """Write the scores of a shard; how many of its blocks are in quarantine."""
    columns: dict[str, list[np.ndarray]] = {}
    quarantine: list[dict[str, Any]] = []
    for number, batch in enumerate(batches(corpus, shard, config.batch_size)):
        first = corpus.first_row(shard) + number * config.batch_size
        scores, refused = _scored(scorer, batch)
        unread = scores.pop(UNREAD, torch.zeros(batch["input_ids"].shape, dtype=torch.bool)).numpy()
        missing = np.zeros(batch["input_ids"].shape, bool)
        for name, scores_BT in scores.items():
            stored = scores_BT.numpy().astype(config.dtype)
            missing |= (batch["position_ids"].numpy() > 0) & ~unread & ~np.isfinite(stored)
            columns.setdefault(name, []).append(np.where(np.isfinite(stored), stored, np.nan))
        for row in np.flatnonzero(missing.any(1)).tolist():
            reason = refused.get(row, "the reference gives these tokens no finite score")
            tokens = np.flatnonzero(missing[row]).tolist()
            where = corpus.describe(first + row)
            quarantine.append({"block": first + row, "where": where, "tokens": tokens, "reason": reason})
        if len(quarantine) > max(1, shard["rows"] // QUARANTINE):
            raise DataError(
                f"{where}: expected a score of nearly every token, found none of token {tokens[0]} ({reason}), and "
                f"{len(quarantine)} blocks of this shard of {shard['rows']} with such tokens. Check the reference (its "
                "weights, its precision) and these texts."
            )
        advance(batch["input_ids"].numel())
    listed = quarantine_path(out, shard["file"])
    if quarantine:
        write_json(listed, quarantine)
    else:
        listed.unlink(missing_ok=True)
    write_shard(out / shard["file"], {name: np.concatenate(values) for name, values in columns.items()})
    return len(quarantine)


def _scored(scorer: Scorer, batch: Batch) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The columns of a batch, NaN in rows that the reference refuses; and why it refuses these."""
    try:
        return scorer(batch), {}
    except UnscorableError:  # somewhere among them
        pass
    rows: list[dict[str, Tensor]] = []
    refused: dict[int, str] = {}
    for row in range(len(batch["input_ids"])):
        alone = {name: column[row : row + 1] for name, column in batch.items()}
        try:
            rows.append(scorer(alone))
        except UnscorableError as error:
            refused[row] = str(error)
            rows.append({"ref_loss": torch.full(alone["input_ids"].shape, torch.nan)})  # an API has nothing else
    return {"ref_loss": torch.cat([one["ref_loss"] for one in rows])}, refused
