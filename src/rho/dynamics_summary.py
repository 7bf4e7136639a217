"""What the dynamics stage found, in numbers: the JSON value of its `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rho.errors import DataError
from rho.evaluate import Checkpoint
from rho.trajectories import (
    CLASSES,
    HIGH,
    LOW,
    PREFERENCES,
    UNCLASSIFIED,
    Dynamics,
    class_shares,
    fit_accuracy,
    group_means,
    losses_of_selected,
    preferences,
)

FORMAT = 1
CONTEXT = 16  # tokens shown before and after one that stands out


@dataclass(frozen=True)
class Texts:
    """The N tokens that were followed, in whole blocks of `length`: the text of each and where it comes from."""

    set: str
    length: int
    text: list[str]
    document: list[str]
    source: list[str]
    label: list[str | None]


@dataclass(frozen=True)
class Selected:
    """What the selection would pick at each checkpoint: the references' loss, the mask, and which tokens take part."""

    ref_loss_N: np.ndarray
    mask_NC: np.ndarray
    eligible_N: np.ndarray


def places(steps: Sequence[int | None]) -> list[int]:
    """Where checkpoints stand: their steps, or their numbers from 1 on where steps are not known to rise."""
    known = [step for step in steps if step is not None]
    rising = len(known) == len(steps) and all(a < b for a, b in pairwise(known))
    return known if rising else list(range(1, len(steps) + 1))


def summarise(
    models: Sequence[Checkpoint],
    texts: Texts,
    losses_NC: np.ndarray,
    found: Dynamics,
    selected: Selected | None,
    top: int,
    accuracies: Mapping[int, float],
) -> dict[str, Any]:
    """The whole summary: plain JSON values; null stands for a number that there is not.

    Lists have a value for each checkpoint; `at` are their places (`places`). `persistent` are the tokens whose lowest
    loss over all checkpoints is the highest; `fluctuating`, of each of L->L and H->H, those that fluctuate most
    (none of two checkpoints: a line goes through both).
    """
    curves = group_means(losses_NC, found.class_N, len(CLASSES))
    classified = found.class_N != UNCLASSIFIED
    counts = np.bincount(found.class_N[classified], minlength=len(CLASSES))
    shares = class_shares(found.class_N)
    lowest = np.where(classified, losses_NC.min(1), -np.inf)
    means = losses_NC[classified].mean(0, dtype=np.float64)
    value = {
        "format": FORMAT,
        "set": texts.set,
        "tokens": int(classified.sum()),
        "threshold": found.threshold,
        "border": found.border,
        "at": places([model.step for model in models]),
        "checkpoints": [
            {"arm": m.arm, "seed": m.seed, "step": m.step, "tokens_seen": m.tokens_seen, "loss": loss}
            for m, loss in zip(models, means.tolist(), strict=True)
        ],
        "classes": {
            name: {"share": shares[name], "tokens": int(counts[k]), "losses": curves[k].tolist()}
            for k, name in enumerate(CLASSES)
        },
        "classes_by": {
            what: {
                name: {"tokens": int((codes[classified] == g).sum()), **class_shares(found.class_N[codes == g])}
                for g, name in enumerate(names)
            }
            for what, (names, codes) in _groups(texts).items()
        },
        "persistent": [_token(i, texts, losses_NC, found) for i in _highest(lowest, top)],
        "fluctuating": {
            CLASSES[k]: [
                _token(i, texts, losses_NC, found)
                for i in _highest(
                    np.where(found.class_N == k, found.fluctuation_N, -np.inf), top if len(models) > 2 else 0
                )
            ]
            for k in (LOW, HIGH)
        },
        "selection": None,
    }
    if selected is not None:
        value["selection"] = _selection(models, texts, losses_NC, found, selected, accuracies)
    elif accuracies:
        raise DataError("accuracies are fitted by the loss of what is selected: give a reference as well.")
    return _plain(value)


def _groups(texts: Texts) -> dict[str, tuple[list[str], np.ndarray]]:
    """The names of the sources and of the labels, and each token's number among them, -1 without."""
    both = [
        None if label is None else f"{source}: {label}" for source, label in zip(texts.source, texts.label, strict=True)
    ]
    columns: dict[str, Sequence[str | None]] = {"source": texts.source, "label": texts.label, "source and label": both}
    found = {}
    for what, column in columns.items():
        names = sorted({name for name in column if name is not None})
        number = {name: n for n, name in enumerate(names)}
        found[what] = (names, np.array([-1 if name is None else number[name] for name in column]))
    return found


def _highest(value_N: np.ndarray, top: int) -> list[int]:
    """Numbers of the tokens with the highest values, highest first, ties by position; none of those at -inf."""
    order = np.argsort(-value_N, kind="stable")[:top]
    return [int(i) for i in order if np.isfinite(value_N[i])]


def _token(i: int, texts: Texts, losses_NC: np.ndarray, found: Dynamics) -> dict[str, Any]:
    """A token that stands out, in its context."""
    block = i - i % texts.length
    return {
        "before": "".join(texts.text[max(block, i - CONTEXT) : i]),
        "text": texts.text[i],
        "after": "".join(texts.text[i + 1 : min(block + texts.length, i + 1 + CONTEXT)]),
        "document": texts.document[i],
        "source": texts.source[i],
        "label": texts.label[i],
        "class": CLASSES[found.class_N[i]],
        "lowest_loss": float(losses_NC[i].min()),
        "fluctuation": float(found.fluctuation_N[i]),
        "losses": losses_NC[i].tolist(),
    }


def _selection(
    models: Sequence[Checkpoint],
    texts: Texts,
    losses_NC: np.ndarray,
    found: Dynamics,
    selected: Selected,
    accuracies: Mapping[int, float],
) -> dict[str, Any]:
    """What is selected when, by what, and with which losses; of the eligible tokens alone.

    `excess_above_0` is the share of tokens on which the checkpoint is worse than the reference.
    """
    eligible = selected.eligible_N
    losses, mask = losses_NC[eligible], selected.mask_NC[eligible]
    worse = losses > selected.ref_loss_N[eligible, None]
    groups = {"class": (list(CLASSES), found.class_N), **_groups(texts)}
    of_selected, of_others = losses_of_selected(losses, mask), losses_of_selected(losses, ~mask)
    counts = np.bincount(mask.sum(1), minlength=len(models) + 1)
    value: dict[str, Any] = {
        "eligible": int(eligible.sum()),
        "share": mask.mean(0).tolist(),
        "by": {what: _shares(names, codes[eligible], mask, worse) for what, (names, codes) in groups.items()},
        "loss_selected": of_selected.diagonal().tolist(),
        "loss_unselected": of_others.diagonal().tolist(),
        "losses_of_selected": of_selected.tolist(),
        "times_selected": counts.tolist(),
        "preference": None,
        "accuracy": _accuracy(models, of_selected[-1], of_others[-1], accuracies) if accuracies else None,
    }
    if len(models) >= 3:
        preferred, class_N = preferences(mask), found.class_N[eligible]
        of = {"all": preferred, **{name: preferred[class_N == k] for k, name in enumerate(CLASSES)}}
        value["preference"] = {
            name: dict(zip(PREFERENCES, (np.bincount(p, minlength=5) / max(len(p), 1)).tolist(), strict=True))
            for name, p in of.items()
        }
    return value


def _shares(names: Sequence[str], codes: np.ndarray, mask: np.ndarray, worse: np.ndarray) -> dict[str, Any]:
    selected, above = group_means(mask, codes, len(names)), group_means(worse, codes, len(names))
    return {
        name: {"eligible": int((codes == g).sum()), "share": selected[g].tolist(), "excess_above_0": above[g].tolist()}
        for g, name in enumerate(names)
    }


def _accuracy(
    models: Sequence[Checkpoint], selected_C: np.ndarray, others_C: np.ndarray, accuracies: Mapping[int, float]
) -> dict[str, Any]:
    """The fit of Figure 7, over the tokens that the last checkpoint selects and over the others."""
    steps = [model.step for model in models]
    if missing := sorted(set(accuracies) - set(steps)):
        raise DataError(
            f"accuracies: no checkpoint of step {missing[0]}; there are steps {', '.join(map(str, steps))}."
        )
    there = [c for c, step in enumerate(steps) if step in accuracies]
    values = np.array([accuracies[steps[c] or 0] for c in there])
    return {
        "steps": [steps[c] for c in there],
        "accuracies": values.tolist(),
        **{
            name: {"losses": loss[there].tolist(), **asdict(fit_accuracy(loss[there], values))}
            for name, loss in (("selected", selected_C), ("unselected", others_C))
        },
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
