"""Score: the reference's loss and entropy of every token of a corpus, into a store.

    tokens of a block    t0   t1   t2   t3          what the reference reads
    ref_loss             NaN  l1   l2   l3          l2 = -log P(t2 | t0 t1), at the index of t2

One block, one window: with `isolated` documents the window starts anew at each document. Every token but the first of
a window is scored exactly once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from rho.corpus import Corpus
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
from rho.runs import Manifest, Stage, open_stage
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
    reference: ModelConfig,
    out: str | os.PathLike[str],
    target: Corpus | None = None,
) -> Manifest:
    """Write `ref_loss` and `ref_entropy` of every token of `corpus` into the stage folder `out`.

    One output shard for each corpus shard, committed one by one: an interrupted run goes on after the last. With
    `target` (held-out text of the wanted domain) the reference's loss on it is recorded, and training can refuse a
    reference that is no better than the model.

    Raises:
        MismatchError: the reference has another tokenizer or too small a vocabulary; both sides are named.
        DataError: the reference gives no finite loss.
    """
    inputs = {
        "corpus": corpus.fingerprint,
        "tokenizer": corpus.manifest.inputs["tokenizer"],
        "reference": source_hash(reference),
        **({"target": target.fingerprint} if target else {}),
    }
    with open_stage(out, "score", config.model_dump(), inputs) as stage:
        if stage.fresh:
            return stage.manifest
        model = load_reference(reference, corpus, config.precision)
        if target is not None and "target_loss" not in stage.manifest.facts:
            stage.manifest.facts["target_loss"] = mean_loss(model, target, config.batch_size).nats_per_token
            stage.checkpoint()
        done = [s for s in corpus.shards if s["file"] in stage.manifest.outputs]
        tokens_done = sum(s["rows"] for s in done) * corpus.block_length
        if done:
            say(f"score: going on after {len(done)} of {len(corpus.shards)} shards")
        total = len(corpus) * corpus.block_length
        with track(f"score {corpus.folder.name}", total, tokens_done) as advance:
            for shard in corpus.shards:
                if shard not in done:
                    _score_shard(config, corpus, shard, model, stage, advance)
        shards = [{**s, "sha256": stage.manifest.outputs[s["file"]]["sha256"]} for s in corpus.shards]
        return stage.finish(shards=shards, reference=model_name(reference))


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
    weight, bias = head(model)
    loss, entropies = linear_token_loss(hidden, weight, labels.flatten(), bias, entropy=entropy)
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
    nats, tokens, size = 0.0, 0, 0
    for shard in corpus.shards:
        for batch in _batches(corpus, shard, batch_size):
            loss, _ = score_batch(model, batch)
            labelled = batch["labels"] != IGNORE_INDEX
            nats += float(loss.cpu().double()[labelled].sum())
            tokens += int(labelled.sum())
            size += int(batch["num_bytes"][labelled].sum())
    model.train(was_training)
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


def _score_shard(
    config: ScoreConfig, corpus: Corpus, shard: dict, model: PreTrainedModel, stage: Stage, advance: Advance
) -> None:
    columns: dict[str, list[np.ndarray]] = {"ref_loss": [], "ref_entropy": []}
    for number, batch in enumerate(_batches(corpus, shard, config.batch_size)):
        for values, scores_BT in zip(columns.values(), score_batch(model, batch, entropy=True), strict=True):
            stored = scores_BT.cpu().numpy().astype(config.dtype)
            bad = (batch["position_ids"].numpy() > 0) & ~np.isfinite(stored)
            if bad.any():
                row, token = (int(found) for found in np.argwhere(bad)[0])
                block = corpus.first_row(shard) + number * config.batch_size + row
                raise DataError(
                    f"{corpus.describe(block)}: the reference gives token {token} no finite score. Check the reference "
                    "(its weights, its precision) and that text."
                )
            values.append(stored)
        advance(batch["input_ids"].numel())
    write_shard(stage.folder / shard["file"], {name: np.concatenate(values) for name, values in columns.items()})
    stage.add_output(shard["file"])
    stage.checkpoint()
