"""Evaluate: loss and bits per byte of checkpoints on held-out sets, and a page of text token by token."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from rho.checkpoints import check, step_of
from rho.compare import BLOCKS
from rho.corpus import Corpus
from rho.data import CombineReferences, combined
from rho.errors import DataError
from rho.explore import Seen, token_rows
from rho.losses import block_losses, by_domain, total
from rho.models import ModelConfig, check_head, check_isolation, device, make_model, source_hash, text_config
from rho.objective import IGNORE_INDEX
from rho.progress import track
from rho.references.api import Meter
from rho.references.model import check_tokenizer, score_batch
from rho.references.scorer import Batch, MeanLoss, as_batch, checked
from rho.rows import write_rows
from rho.runs import MANIFEST, Manifest, atomic_write, hash_json, open_stage, read_manifest
from rho.score import ScoreConfig, Source, identity, load_scorer
from rho.selection import Selector


class EvaluateConfig(BaseModel):
    """Settings of the evaluate stage.

    Attributes:
        batch_size: blocks a forward.
        token_blocks: blocks of the explored set that are written out token by token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(8, ge=1)
    token_blocks: int = Field(4, ge=0)


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate, and where in which training run it stood.

    None where that is not known. `content` is the hash that a training run recorded of it: what was evaluated stays
    known when it is deleted.
    """

    model: str
    arm: str = "model"
    seed: int = 0
    step: int | None = 0
    tokens_seen: int | None = None
    tokens_selected: int | None = None
    content: str | None = None


@dataclass(frozen=True)
class Exploration:
    """Text to write out token by token: a held-out set, the references by name, and the selection to show.

    `combine` and `weights` make one reference of several, as in `rho.data.TrainingBlocks`.
    """

    corpus: Corpus
    references: Mapping[str, Source]
    selector: Selector
    combine: CombineReferences = "mean"
    weights: Mapping[str, float] | None = None
    score: ScoreConfig = field(default_factory=ScoreConfig)  # how the references read

    def inputs(self) -> dict[str, str]:
        """Content hashes of the references, for a manifest."""
        found = {name: identity(one.reference, one.tokenizer, self.corpus) for name, one in self.references.items()}
        return {f"{key}:{name}": value for name, hashes in found.items() for key, value in hashes.items()}

    def settings(self) -> dict[str, Any]:
        """What else decides the selection, for a manifest."""
        return {"selector": asdict(self.selector), "combine": self.combine, "weights": self.weights}


def checkpoints_of(train_folder: str | os.PathLike[str], arm: str) -> list[Checkpoint]:
    """Every checkpoint of a finished train stage, in order of steps."""
    manifest = read_manifest(train_folder, "train")
    return [
        Checkpoint(str(Path(train_folder) / c.pop("folder")), arm, manifest.config["seed"], **c)
        for c in map(dict, manifest.facts["checkpoints"])
    ]


def finished(model: str, name: str = "model") -> Checkpoint:
    """A model by its folder or name; with what it was trained on where it is (part of) a finished train stage."""
    path = Path(model)
    is_checkpoint = path.parent.name == "checkpoints"
    stage = path.parent.parent if is_checkpoint else path.parent if path.name == "model" else path
    if not (stage / MANIFEST).is_file() or not (stage / "model").is_dir():
        return Checkpoint(model, name, step=None)
    manifest = read_manifest(stage, "train")
    step = step_of(path) if is_checkpoint else manifest.facts["step"]
    found = [c for c in manifest.facts["checkpoints"] if c["step"] == step]
    counts = {key: found[0][key] for key in ("tokens_seen", "tokens_selected")} if found else {}
    return Checkpoint(model, name, manifest.config["seed"], step, **counts)


def evaluate(
    config: EvaluateConfig,
    models: Sequence[Checkpoint],
    sets: Mapping[str, Corpus],
    out: str | os.PathLike[str],
    explore: Exploration | None = None,
) -> Manifest:
    """Write what `models` lose on the sets' `validation` splits into the stage folder `out`.

    `losses.jsonl` has a line for each model and set, the means over all labelled tokens; `domains.jsonl` one for each
    source of documents, and label of tokens, in each set; `blocks.parquet` the sums of each block (`block_losses`), by
    which `rho.compare` tells models apart. With `explore`, `tokens.parquet` shows the last of `models` token by token.
    An interrupted run goes on after the last line written.

    Raises:
        MismatchError: a model with another tokenizer or vocabulary than a set.
        DataError: a checkpoint is damaged.
    """
    if not models or not sets:
        raise DataError(f"{out}: nothing to evaluate: {len(models)} models, {len(sets)} sets.")
    # By number: a run may be moved, and its models then have other paths.
    inputs = {f"model:{n}": m.content or source_hash(ModelConfig(path=m.model)) for n, m in enumerate(models)}
    inputs |= {f"set:{name}": corpus.fingerprint for name, corpus in sets.items()}
    settings = config.model_dump()
    if explore is not None:
        inputs |= {"explore": explore.corpus.fingerprint, **explore.inputs()}
        settings |= explore.settings()
    with open_stage(out, "evaluate", settings, inputs) as stage:
        if stage.fresh:
            return stage.manifest
        of = hash_json([inputs, [entry.model for entry in models]])[:12]
        unfinished = stage.folder / f".losses-{of}.jsonl"  # of just these models and sets
        rows = [row for row in _finished_rows(unfinished) if _part(unfinished, row["model"], row["set"]).is_file()]
        total = len(models) * sum(len(corpus) * corpus.block_length for corpus in sets.values())
        with track(f"evaluate {stage.folder.name}", total) as advance:
            for entry in models:
                rows += _evaluate_model(entry, sets, config, rows, unfinished, advance)
        parts = [_part(unfinished, row["model"], row["set"]) for row in rows]
        tables = [pq.read_table(part, page_checksum_verification=True) for part in parts]
        domains = [line for row, table in zip(rows, tables, strict=True) for line in _domains(row, table)]
        _write_lines(stage.folder / "losses.jsonl", rows)
        _write_lines(stage.folder / "domains.jsonl", domains)
        _write_blocks(stage.folder / BLOCKS, rows, tables)
        for name in ("losses.jsonl", "domains.jsonl", BLOCKS):
            stage.add_output(name)
        for path in (unfinished, *parts):
            path.unlink(missing_ok=True)
        if explore is not None:
            _write_tokens(models[-1], explore, config, stage.folder / "tokens.parquet")
            stage.add_output("tokens.parquet")
        return stage.finish()


def _finished_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # cut short by a kill
    return rows


def _part(unfinished: Path, model: str, name: str) -> Path:
    """Where the blocks of one finished line are until all are done."""
    return unfinished.with_name(f"{unfinished.stem}-{hash_json([model, name])[:12]}.parquet")


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def _write_blocks(path: Path, rows: Sequence[dict[str, Any]], tables: Sequence[pa.Table]) -> None:
    """The tables together, each with the model and set that it is of."""
    kinds = {"model": pa.string(), "arm": pa.string(), "seed": pa.int64(), "step": pa.int64(), "set": pa.string()}
    named = []
    for row, table in zip(rows, tables, strict=True):
        columns = {name: pa.array([row[name]] * len(table), kind) for name, kind in kinds.items()}
        named.append(pa.table({**columns, **dict(zip(table.column_names, table.columns, strict=True))}))
    with atomic_write(path) as file:
        pq.write_table(pa.concat_tables(named), file, write_page_checksum=True, compression="zstd")


def _domains(row: dict[str, Any], table: pa.Table) -> Iterator[dict[str, Any]]:
    """Lines of `domains.jsonl`: like those of `losses.jsonl`, of one source or label."""
    for by, name, loss in by_domain(table):
        yield {**row, "by": by, "domain": name, **_measures(loss)}


def _measures(loss: MeanLoss) -> dict[str, Any]:
    return {
        "loss": loss.nats_per_token,
        "bits_per_byte": loss.bits_per_byte if loss.bytes else None,  # of bytes that follow a character's first
        "tokens": loss.tokens,
        "bytes": loss.bytes,
    }


def _evaluate_model(
    entry: Checkpoint,
    sets: Mapping[str, Corpus],
    config: EvaluateConfig,
    done: list[dict[str, Any]],
    unfinished: Path,
    advance: Any,
) -> list[dict[str, Any]]:
    finished = {(row["model"], row["set"]) for row in done}
    missing = {name: corpus for name, corpus in sets.items() if (entry.model, name) not in finished}
    rows = []
    model = load_checkpoint(entry, next(iter(missing.values()))) if missing else None
    for name, corpus in missing.items():
        assert model is not None
        check_reads(entry, model, corpus)
        table = block_losses(model, corpus, config.batch_size)
        of = {key: value for key, value in asdict(entry).items() if key != "content"}
        row = {**of, "set": name, **_measures(checked(total(table), corpus))}
        with atomic_write(_part(unfinished, entry.model, name)) as part:
            pq.write_table(table, part, write_page_checksum=True, compression="zstd")
        with unfinished.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        advance(len(corpus) * corpus.block_length)
    return rows


def load_checkpoint(entry: Checkpoint, corpus: Corpus) -> PreTrainedModel:
    """The model in eval mode, its files checked where their hashes are known; `check_reads` is for the set."""
    if entry.content is not None:
        check(Path(entry.model))
    model = make_model(ModelConfig(path=entry.model), corpus.vocab_size)
    check_head(model)
    check_isolation(model, corpus.isolated)
    return model.to(device()).eval()


def check_reads(entry: Checkpoint, model: PreTrainedModel, corpus: Corpus) -> None:
    """Refuse a set of another tokenizer or vocabulary than the model's, with a `MismatchError`."""
    corpus.check_model(text_config(model), entry.model)
    check_tokenizer(ModelConfig(path=entry.model), corpus)


def _write_tokens(entry: Checkpoint, explore: Exploration, config: EvaluateConfig, path: Path) -> None:
    """One row a token of the first blocks: what model and reference lose, and whether it would be selected."""
    corpus = explore.corpus
    model = load_checkpoint(entry, corpus)
    wanted = (*corpus.reads, "num_bytes", "label", "document_id", "source")
    rows = [corpus.row(block, wanted) for block in range(min(config.token_blocks, len(corpus)))]
    batch = as_batch(corpus, rows)
    loss = score_batch(model, batch)[0].cpu()
    columns = reference_columns(explore, [batch])
    eligible = batch["labels"] != IGNORE_INDEX
    selected = would_select(explore.selector, entry.step or 0, batch["labels"], loss, columns)
    found = [
        token_rows(
            entry.arm,
            entry.seed,
            corpus.origins(row),
            corpus.tokenizer.pieces(row["input_ids"]),
            Seen(loss[b], columns["ref_loss"][b], eligible[b], selected[b]),
            [corpus.labels[i] if i >= 0 else None for i in row["label"]],
            block=b,
        )
        for b, row in enumerate(rows)
    ]
    write_rows([row for of_block in found for row in of_block], path)


def reference_columns(explore: Exploration, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Loss_BT and entropy_BT of the references, combined, for the rows of all batches; NaN where a token has none.

    One reference is in memory at a time.
    """
    losses, entropies = {}, {}
    for name, (reference, tokenizer) in explore.references.items():
        scorer = load_scorer(explore.score, reference, explore.corpus, tokenizer, Meter())
        scores = [scorer(batch) for batch in batches]
        losses[name] = torch.cat([one["ref_loss"] for one in scores])
        unknown = torch.full_like(losses[name], torch.nan)
        entropies[name] = torch.cat([s["ref_entropy"] for s in scores]) if "ref_entropy" in scores[0] else unknown
    found = {"ref_loss": losses, "ref_entropy": entropies}
    return {column: combined(values, explore.combine, explore.weights) for column, values in found.items()}


def would_select(selector: Selector, step: int, labels: Tensor, loss: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """mask_BT of what a selection picks of some rows at a step; scopes wider than these rows are shown as `batch`."""
    active = selector.at(step)
    if active.scope not in ("sequence", "batch"):
        second = replace(active.second, scope="batch") if active.second else None
        active = replace(active, scope="batch", second=second)
    blocks = torch.arange(len(labels))
    scores = [part.scores(loss, columns, blocks, labels.shape[1], step) for part in active.parts]
    return active.select(scores, active.eligible(labels, columns))
