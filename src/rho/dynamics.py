"""Dynamics: each token's loss at every checkpoint of a run, its class, and what the run's selection made of it.

The mathematics is in `rho.trajectories`. Written to the stage folder:

    tokens.parquet   one row a token (see `_token_table`)
    summary.json     shares and curves of the classes, tokens that stand out, what was selected
    *.svg            the curves, as in Figures 3, 6, 8 and 10 of the paper
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rho.corpus import Corpus
from rho.dynamics_summary import Selected, Texts, places, summarise
from rho.errors import ConfigError, DataError
from rho.evaluate import (
    Checkpoint,
    Exploration,
    check_reads,
    checkpoints_of,
    finished,
    load_checkpoint,
    reference_columns,
    would_select,
)
from rho.models import ModelConfig, source_hash
from rho.objective import IGNORE_INDEX
from rho.progress import track
from rho.references.model import score_batch
from rho.references.scorer import Batch, as_batch
from rho.report.dynamics import figures
from rho.runs import MANIFEST, Manifest, Stage, atomic_write, hash_json, open_stage, read_manifest, write_json
from rho.score import Source
from rho.train import TrainConfig
from rho.trajectories import CLASSES, PREFERENCES, THRESHOLD, Dynamics, preferences, token_dynamics

WANTED = ("num_bytes", "label", "document_id", "source")  # beside what a model reads


class DynamicsConfig(BaseModel):
    """Settings of the dynamics stage.

    Attributes:
        max_tokens: of the set, in whole blocks spread evenly over it; the paper takes 320,000.
        batch_size: blocks a forward.
        threshold: nats that the fitted line must rise or fall for a token to be L->H or H->L.
        border: nats up to which a last loss is low; the mean loss at the last checkpoint, if not given.
        top: how many tokens that stand out are shown in their context.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = Field(320_000, ge=1)
    batch_size: int = Field(8, ge=1)
    threshold: float = Field(THRESHOLD, ge=0)
    border: float | None = None
    top: int = Field(20, ge=0)


@dataclass(frozen=True)
class TokenSet:
    """The blocks that are followed: their numbers, as a corpus and as a model have them, and their tokens as text."""

    block_B: np.ndarray
    rows: list[dict[str, np.ndarray]]
    batches: list[Batch]
    labels_BT: Tensor
    texts: Texts


def follow(
    config: DynamicsConfig,
    models: Sequence[Checkpoint],
    corpus: Corpus,
    out: str | os.PathLike[str],
    explore: Exploration | None = None,
    accuracies: Mapping[int, float] | None = None,
) -> Manifest:
    """Write the dynamics of the tokens of `corpus` over `models` into the stage folder `out`.

    Args:
        config: how many tokens, and the rule.
        models: the checkpoints in order of training. The line is fitted over their steps, or over their numbers
            where steps are not known.
        corpus: a held-out set.
        out: the stage folder. An interrupted run goes on after the last checkpoint whose losses were written.
        explore: the references and the selection of the run, on the same `corpus`: what it would pick is found out.
        accuracies: by step, of some of the checkpoints, as shares: fitted by the loss of what is selected (Fig. 7).

    Raises:
        MismatchError: a model with another tokenizer or vocabulary than the set.
        DataError: fewer than two checkpoints, one that is damaged, or one whose losses are not finite.
    """
    if len(models) < 2:
        raise DataError(
            f"{out}: dynamics need two checkpoints or more (eight show something), found {len(models)}. "
            "Training writes one every `--set save_steps=N` steps."
        )
    inputs = {f"model:{n}": m.content or source_hash(ModelConfig(path=m.model)) for n, m in enumerate(models)}
    inputs["set"] = corpus.fingerprint
    settings = config.model_dump() | {"accuracies": {str(step): value for step, value in (accuracies or {}).items()}}
    if explore is not None:
        inputs |= explore.inputs()
        settings |= explore.settings()
    with open_stage(out, "dynamics", settings, inputs) as stage:
        if stage.fresh:
            return stage.manifest
        tokens = token_set(corpus, config)
        losses_NC = _losses(stage, config, models, corpus, tokens)
        at_C = places([entry.step for entry in models])
        found = token_dynamics(losses_NC, config.threshold, config.border, at_C)
        selected = _selected(explore, models, losses_NC, tokens) if explore is not None else None
        summary = summarise(models, tokens.texts, losses_NC, found, selected, config.top, accuracies or {})
        write_json(stage.folder / "summary.json", summary)
        stage.add_output("summary.json")
        with atomic_write(stage.folder / "tokens.parquet") as file:
            table = _token_table(tokens, losses_NC, found, selected)
            pq.write_table(table, file, write_page_checksum=True, compression="zstd")
        stage.add_output("tokens.parquet")
        for name, plot in figures(summary, legend=True).items():
            with atomic_write(stage.folder / f"{name}.svg") as file:
                file.write(plot.svg)
            stage.add_output(f"{name}.svg")
        made = stage.finish()
        for path in stage.folder.glob(".losses-*.npy"):
            path.unlink()
        return made


def checkpoints_in(models: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints of one train stage folder, or the models named, in their order."""
    if len(models) == 1 and (Path(models[0]) / MANIFEST).is_file():
        return checkpoints_of(models[0], Path(models[0]).name)
    return [finished(model) for model in models]


def selection_of(models: Sequence[str], reference: str, corpus: Corpus) -> Exploration:
    """The selection that a train stage folder was made with, by a reference on `corpus`."""
    if len(models) != 1 or not (Path(models[0]) / MANIFEST).is_file():
        raise ConfigError(
            f"--reference: what would be selected is known of one folder that `rho train` wrote, found "
            f"{' '.join(models)}. Give that folder, or leave --reference out."
        )
    made = TrainConfig.model_validate(read_manifest(models[0], "train").config)
    if made.references.history is not None:
        raise ConfigError(
            f"--reference: {models[0]} selected by its own history, which its checkpoints' weights do not tell. Leave "
            "it out."
        )
    return Exploration(corpus, {"reference": Source(ModelConfig(path=reference))}, made.selector)


def read_accuracies(path: Path, models: Sequence[Checkpoint]) -> dict[int, float]:
    """Accuracies, shares in [0, 1], by step: of a JSON file of them, or of a folder of evaluated suites.

    Of such a folder each sub-folder is what `rho evaluate CHECKPOINT --suite NAME` wrote; it belongs to the one of
    `models` with the same weights, and the mean over its tasks counts.

    Raises:
        DataError: it is neither, or the suites are not of the same tasks.
    """
    if path.is_dir():
        return _suites(path, models)
    try:
        return {int(step): float(value) for step, value in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f'{path}: expected JSON such as {{"1000": 0.25}}, step and accuracy ({error}).') from error


def _suites(folder: Path, models: Sequence[Checkpoint]) -> dict[int, float]:
    step_of = {entry.content or source_hash(ModelConfig(path=entry.model)): entry.step for entry in models}
    found: dict[int, float] = {}
    asked: dict[tuple[tuple[str, int], ...], Path] = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        made = read_manifest(path.parent, "suite")
        rows, step = made.facts["rows"], step_of.get(made.inputs["model"])
        if step is not None:
            asked.setdefault(tuple((row["name"], row["questions"]) for row in rows), path.parent)
            found[step] = sum(row["value"] for row in rows) / len(rows)
    if len(asked) > 1:
        raise DataError(
            f"{folder}: expected the same tasks of every checkpoint, found others in "
            f"{' than in '.join(str(one) for one in list(asked.values())[:2])}. Evaluate them alike."
        )
    if not found:
        raise DataError(
            f"{folder}: expected folders that `rho evaluate CHECKPOINT --suite NAME` wrote of these checkpoints, found "
            f"none. Evaluate each into a sub-folder of its own."
        )
    return found


def token_set(corpus: Corpus, config: DynamicsConfig) -> TokenSet:
    """The tokens to follow: whole blocks, spread evenly over the set."""
    number = min(len(corpus), max(1, config.max_tokens // corpus.block_length))
    block_B = np.arange(number) * len(corpus) // number
    rows = [corpus.row(int(block), (*corpus.reads, *WANTED)) for block in block_B]
    batches = [
        as_batch(corpus, rows[start : start + config.batch_size]) for start in range(0, number, config.batch_size)
    ]
    origins = [origin for row in rows for origin in corpus.origins(row)]
    texts = Texts(
        set=corpus.folder.name,
        length=corpus.block_length,
        text=[piece for row in rows for piece in corpus.tokenizer.pieces(row["input_ids"])],
        document=[document for document, _ in origins],
        source=[source for _, source in origins],
        label=[corpus.labels[label] if label >= 0 else None for row in rows for label in row["label"]],
    )
    return TokenSet(block_B, rows, batches, torch.cat([batch["labels"] for batch in batches]), texts)


def _losses(
    stage: Stage, config: DynamicsConfig, models: Sequence[Checkpoint], corpus: Corpus, tokens: TokenSet
) -> np.ndarray:
    """losses_NC (float32 nats, NaN where a token has no label); each checkpoint's are in a file until all are there."""
    columns = []
    size = tokens.labels_BT.numel()
    with track(f"dynamics {stage.folder.name}", len(models) * size) as advance:
        for number, entry in enumerate(models):
            of = hash_json([corpus.fingerprint, config.max_tokens, stage.manifest.inputs[f"model:{number}"]])[:12]
            path = stage.folder / f".losses-{of}.npy"
            if not path.is_file():
                losses = _losses_of(entry, corpus, tokens)
                with atomic_write(path) as file:
                    np.save(file, losses, allow_pickle=False)
            columns.append(np.load(path, allow_pickle=False))
            advance(size)
    return np.stack(columns, 1)


def _losses_of(entry: Checkpoint, corpus: Corpus, tokens: TokenSet) -> np.ndarray:
    model = load_checkpoint(entry, corpus)
    check_reads(entry, model, corpus)
    loss_BT = torch.cat([score_batch(model, batch)[0].cpu().float() for batch in tokens.batches])
    labelled = tokens.labels_BT != IGNORE_INDEX
    if not loss_BT[labelled].isfinite().all():
        bad = int((~loss_BT[labelled].isfinite()).sum())
        raise DataError(
            f"{entry.model}: expected a finite loss of every token of {corpus.folder}, found {bad} that are not. "
            "Check the model (its weights, its precision), or leave this checkpoint out."
        )
    return loss_BT.masked_fill(~labelled, torch.nan).flatten().numpy()


def _selected(explore: Exploration, models: Sequence[Checkpoint], losses_NC: np.ndarray, tokens: TokenSet) -> Selected:
    columns = reference_columns(explore, tokens.batches)
    labels = tokens.labels_BT
    masks = [
        would_select(
            explore.selector, entry.step or 0, labels, torch.from_numpy(losses_NC[:, c]).view_as(labels), columns
        )
        for c, entry in enumerate(models)
    ]
    eligible = explore.selector.eligible(labels, columns)
    return Selected(
        columns["ref_loss"].float().masked_fill(labels == IGNORE_INDEX, torch.nan).flatten().numpy(),
        np.stack([mask.flatten().numpy() for mask in masks], 1),
        eligible.flatten().numpy(),
    )


def _token_table(tokens: TokenSet, losses_NC: np.ndarray, found: Dynamics, selected: Selected | None) -> pa.Table:
    """One row a token: where it stands, its losses (a list, a value a checkpoint), its class, and what selected it.

    `change` (dL) and `fluctuation` are those of `rho.trajectories.Dynamics`; `class` is null where there is no loss.
    With a selection: `ref_loss`, `selected` (a list), `times_selected`; of three checkpoints or more, `preference`.
    """
    length = tokens.texts.length
    columns = {
        "block": np.repeat(tokens.block_B, length),
        "position": np.tile(np.arange(length, dtype=np.int32), len(tokens.block_B)),
        "document": tokens.texts.document,
        "source": tokens.texts.source,
        "label": pa.array(tokens.texts.label, pa.string()),
        "token": np.concatenate([row["input_ids"] for row in tokens.rows]),
        "text": tokens.texts.text,
        "losses": _lists(losses_NC),
        "class": _named(found.class_N, CLASSES),
        "change": found.change_N,
        "fluctuation": found.fluctuation_N,
    }
    if selected is not None:
        columns |= {
            "ref_loss": selected.ref_loss_N,
            "selected": _lists(selected.mask_NC),
            "times_selected": selected.mask_NC.sum(1, dtype=np.int32),
        }
        if selected.mask_NC.shape[1] >= 3:
            columns["preference"] = _named(preferences(selected.mask_NC), PREFERENCES)
    return pa.table(columns)


def _lists(values_NC: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_NC.reshape(-1)), values_NC.shape[1])


def _named(code_N: np.ndarray, names: Sequence[str]) -> pa.Array:
    """Codes as names; null where negative."""
    return pa.DictionaryArray.from_arrays(pa.array(code_N, mask=code_N < 0), pa.array(list(names)))
