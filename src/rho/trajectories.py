"""Token dynamics as mathematics: what becomes of each token's loss over checkpoints, and what selection makes of it.

Rho-1, section 2.1 and appendices D.1, F: pure functions on arrays. `rho.dynamics` is the stage that has the losses.
Shape suffixes: N tokens, C checkpoints in order of training, G groups of tokens. Losses are nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rho.errors import DataError

CLASSES = ("H->H", "L->H", "H->L", "L->L")  # of high and low loss at the start and at the end
HIGH, RISING, FALLING, LOW = range(4)
UNCLASSIFIED = -1
THRESHOLD = 0.2  # nats; the paper's
CHUNK = 1 << 16  # tokens worked on at a time

PREFERENCES = ("never", "early", "middle", "late", "even")


@dataclass(frozen=True)
class Dynamics:
    """What became of each token's loss.

    Attributes:
        change_N: dL, the fitted line's end minus its start (float32, NaN where unclassified).
        fluctuation_N: standard deviation of the losses around the fitted line, that is, the root of the mean squared
            residual over the C checkpoints (float32, NaN where unclassified).
        class_N: number of the class in `CLASSES` (int8), `UNCLASSIFIED` where a loss is not finite.
        threshold, border: those of `token_dynamics`.
    """

    change_N: np.ndarray
    fluctuation_N: np.ndarray
    class_N: np.ndarray
    threshold: float
    border: float


def token_dynamics(
    losses_NC: np.ndarray,
    threshold: float = THRESHOLD,
    border: float | None = None,
    at_C: Sequence[float] | None = None,
) -> Dynamics:
    """Fit a line to each token's losses by least squares, and classify the token by it.

    With dL = end - start of the line (App. D.1):

        dL < -threshold         H->L
        dL > threshold          L->H
        else, last <= border    L->L
        else                    H->H

    Args:
        losses_NC: float16, float32 or float64, C >= 2; may be memory-mapped: it is read once, a chunk at a time. A
            token with a loss that is not finite at any checkpoint (a first token) is left out.
        threshold: nats.
        border: between low and high, nats; the mean loss at the last checkpoint of the tokens not left out, if not
            given.
        at_C: where the checkpoints stand, rising, in any unit (steps); equally far apart, as the paper's, if not given.

    Raises:
        DataError: fewer than two checkpoints, not in order, or no token with losses.
    """
    tokens, checkpoints = losses_NC.shape
    if checkpoints < 2:
        raise DataError(f"a line needs the losses of two checkpoints or more, found {checkpoints}.")
    x_C = np.arange(checkpoints) if at_C is None else np.asarray(at_C, np.float64)
    if x_C.shape != (checkpoints,) or not (np.diff(x_C) > 0).all():
        raise DataError(f"expected the rising places of {checkpoints} checkpoints, found {list(at_C or ())}.")
    x_C = x_C - x_C.mean()
    to_change_C = (x_C[-1] - x_C[0]) * x_C / (x_C @ x_C)
    # What is left of a trajectory without its mean and its slope: the residuals around the line.
    to_residuals_CC = np.eye(checkpoints) - 1 / checkpoints - np.outer(x_C, x_C) / (x_C @ x_C)
    change_N, fluctuation_N = np.empty(tokens, np.float32), np.empty(tokens, np.float32)
    class_N, last_N = np.empty(tokens, np.int8), np.empty(tokens, losses_NC.dtype)
    total, number = 0.0, 0
    for start in range(0, tokens, CHUNK):
        part = slice(start, start + CHUNK)
        losses = losses_NC[part].astype(np.float64)
        missing = ~np.isfinite(losses).all(1)
        losses[missing] = 0.0
        change = losses @ to_change_C
        residuals = losses @ to_residuals_CC
        fluctuation = np.sqrt(np.einsum("nc,nc->n", residuals, residuals) / checkpoints)
        total, number = total + float(losses[:, -1].sum()), number + int((~missing).sum())
        class_N[part] = np.select(
            [missing, change < -threshold, change > threshold], [UNCLASSIFIED, FALLING, RISING], LOW
        )
        change[missing] = fluctuation[missing] = np.nan
        change_N[part], fluctuation_N[part], last_N[part] = change, fluctuation, losses[:, -1]
    if number == 0:
        raise DataError(f"none of {tokens} tokens has a finite loss at all of the {checkpoints} checkpoints.")
    border = total / number if border is None else border
    for start in range(0, tokens, CHUNK):
        part = slice(start, start + CHUNK)
        high = last_N[part].astype(np.float64) > border  # not in float16, which would round the border
        class_N[part][high & (class_N[part] == LOW)] = HIGH
    return Dynamics(change_N, fluctuation_N, class_N, threshold, border)


def class_shares(class_N: np.ndarray) -> dict[str, float]:
    """The share of each class among the classified tokens (0 where there are none)."""
    counts = np.bincount(class_N[class_N != UNCLASSIFIED], minlength=len(CLASSES))
    return {name: float(count / max(counts.sum(), 1)) for name, count in zip(CLASSES, counts, strict=True)}


def group_means(values_NC: np.ndarray, group_N: np.ndarray, groups: int) -> np.ndarray:
    """mean_GC of the rows of each group (rows of group -1 are left out); NaN for a group without any.

    Of a boolean array these are shares: of the tokens of a group that a checkpoint selects, say.
    """
    inside = group_N >= 0
    counts_G = np.bincount(group_N[inside], minlength=groups)
    sums = [np.bincount(group_N[inside], column[inside], minlength=groups) for column in values_NC.T]
    return np.stack(sums, 1) / np.where(counts_G > 0, counts_G, np.nan)[:, None]


def losses_of_selected(losses_NC: np.ndarray, selected_NC: np.ndarray) -> np.ndarray:
    """loss_CC: at [i, j] the mean loss at checkpoint j of the tokens that checkpoint i selects (Fig. 8; exp is the
    perplexity). Row i column i is the loss of what is trained on at i (Fig. 6); pass `~selected_NC` for the others.

    NaN in the row of a checkpoint that selects nothing.
    """
    number_C = selected_NC.sum(0)
    sums = [losses_NC[chosen].sum(0, dtype=np.float64) for chosen in selected_NC.T]
    return np.stack(sums) / np.where(number_C > 0, number_C, np.nan)[:, None]


def preferences(selected_NC: np.ndarray) -> np.ndarray:
    """When each token is selected (Fig. 14), as its number in `PREFERENCES` (int8).

    The checkpoints are cut into three parts, as equal as can be, the earlier ones longer. `early`, `middle` and `late`
    tokens are selected at a higher share of that part's checkpoints than of either other's; `even` are all others that
    are ever selected.

    Raises:
        DataError: fewer than three checkpoints.
    """
    if selected_NC.shape[1] < 3:
        raise DataError(f"early, middle and late need three checkpoints or more, found {selected_NC.shape[1]}.")
    share_N3 = np.stack([part.mean(1) for part in np.array_split(selected_NC, 3, axis=1)], 1)
    most_N = share_N3.max(1)
    alone = (share_N3 == most_N[:, None]).sum(1) == 1
    return np.select([most_N == 0, alone], [0, 1 + share_N3.argmax(1)], 4).astype(np.int8)


@dataclass(frozen=True)
class AccuracyFit:
    """`accuracy = log(a * loss + c)` (App. F, Fig. 7) and how much of the accuracies' variance it explains."""

    a: float
    c: float
    r2: float


def fit_accuracy(loss_P: np.ndarray, accuracy_P: np.ndarray) -> AccuracyFit:
    """Least squares in accuracy over P checkpoints, the sign of `a` free.

    Args:
        loss_P: of selected, or of unselected, tokens.
        accuracy_P: shares in [0, 1].

    Raises:
        DataError: fewer than three points, all of one loss, values that are not finite, or accuracies that are no
            shares.
    """
    loss, accuracy = np.asarray(loss_P, np.float64), np.asarray(accuracy_P, np.float64)
    if loss.shape != accuracy.shape or loss.ndim != 1 or len(loss) < 3 or np.ptp(loss) == 0:
        raise DataError(
            f"expected an accuracy for each of three or more different losses, found {loss.shape} losses and "
            f"{accuracy.shape} accuracies."
        )
    if not np.isfinite(loss).all() or not ((accuracy >= 0) & (accuracy <= 1)).all():
        raise DataError("expected finite losses, and accuracies as shares in [0, 1].")
    # In exp(accuracy) the fit is a line; from there go Gauss-Newton steps, shortened where they lead astray.
    middle = loss.mean()
    design = np.stack([loss - middle, np.ones_like(loss)], 1)
    point = np.linalg.lstsq(design, np.exp(accuracy), rcond=None)[0]
    if (design @ point).min() <= 0:
        point = np.array([0.0, np.exp(accuracy).mean()])

    def error(at: np.ndarray) -> float:
        inner = design @ at
        return float(((np.log(inner) - accuracy) ** 2).sum()) if inner.min() > 0 else np.inf

    for _ in range(100):
        inner = design @ point
        step = np.linalg.lstsq(design / inner[:, None], accuracy - np.log(inner), rcond=None)[0]
        while not error(point + step) < error(point) and np.abs(step).max() > 1e-14:
            step = step / 2
        if not error(point + step) < error(point):
            break
        point = point + step
    spread = float(((accuracy - accuracy.mean()) ** 2).sum())
    r2 = 1 - error(point) / spread if spread > 0 else float("nan")
    return AccuracyFit(float(point[0]), float(point[1] - point[0] * middle), r2)
