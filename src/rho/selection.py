"""Selector: a score, a ratio and a scope make the mask of tokens to train on, or their weights.

The steps of a selection, each a method, so that a trainer can put communication between them:

    eligible -> scores -> mask (Eq. 5) -> weights (1 and 0 unless asked otherwise)

Scopes are the tokens ranked together:

    sequence   each row by itself: one pass, the same for any batching
    batch      the micro-batch of this device: one pass; changes with batching and number of devices
    step       every token of the optimizer step, over all micro-batches and devices: exact and the same for any
               batching; with one micro-batch it costs one all-gather of the scores, with accumulation every micro-batch
               is passed forward twice (losses first, then gradients), unless the score needs no loss
    running    a threshold tracked from past steps: one pass, nothing gathered but counts; the realised ratio moves
               around the asked one, and the first step is ranked as `step`
    dataset    all tokens of the corpus, once, for scores that don't need the model
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from rho.objective import IGNORE_INDEX, excess_loss, num_to_select, select_top

Score = Literal["excess", "retrospective", "loss", "ref_loss", "ref_entropy", "random"]
Scope = Literal["sequence", "batch", "step", "running", "dataset"]
Weighting = Literal["mask", "softmax", "sigmoid", "exponential"]  # what can be said of a corpus
AnyWeighting = Literal[Weighting, "loss_weights"]
Combine = Literal["intersection", "union"]
COLUMNS = ("ref_loss", "ref_entropy", "loss_weights")  # what rows may say of each token, float32

# What part of its error a running threshold, and its slope, are moved by; what part of the owed ratio a step pays back.
FOLLOW, BEND, PAY_BACK = 0.5, 0.15, 0.2

Gather = Callable[[Tensor], list[Tensor]]  # a 1-D tensor of this rank -> those of all ranks, in order of ranks


@dataclass(frozen=True)
class Schedule:
    """The ratio by optimizer step.

    Attributes:
        points: (step, ratio), steps rising from 0; before the next point the ratio holds (`steps`), or moves to it in
            a line (`linear`). A warm-up from plain training is `Schedule(((0, 1.0), (200, 0.6)), "linear")`.
    """

    points: tuple[tuple[int, float], ...]
    kind: Literal["steps", "linear"] = "steps"

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.points]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"a schedule's steps must rise from 0, found {steps}")
        for _, ratio in self.points:
            _check_ratio(ratio)

    def ratio(self, step: int) -> float:
        """The ratio of the (0-based) optimizer step."""
        before = [point for point in self.points if point[0] <= step][-1]
        after = next((point for point in self.points if point[0] > step), before)
        if self.kind == "steps" or after is before:
            return before[1]
        return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])


@dataclass(frozen=True)
class Selector:
    """Which tokens of an optimizer step are trained on.

    Attributes:
        score: `excess` (Eq. 3); `retrospective`, the excess of the reference over the model (ssToken, with the model's
            own history as the reference); `loss` (highest current loss); `ref_loss` (lowest reference loss) and
            `ref_entropy` (lowest reference entropy), the paper's static scores (App. H); `random` (the control).
        ratio: share of the eligible tokens, in (0, 1]. At 1 every eligible token is selected: plain CLM.
        scope: the tokens ranked together; see the module.
        schedule: the ratio by step instead of `ratio`.
        second, combine: another selection of the same scope, and whether a token must be in both or in one (paper
            Table 4). The realised ratio is then what the two have in common.
        weighting: `mask` (Eq. 4), or soft weights of mean 1 over the eligible tokens of a sequence (scope `sequence`)
            or micro-batch (`batch`): `softmax` of score / temperature; `sigmoid` of (score - threshold) / temperature,
            the threshold being the score of the last token that the ratio would select; `exponential`, exp(score /
            temperature) but at most `clip`. `loss_weights` takes the weights as the rows' column of that name has them:
            no score, no reference, nothing normalised.
        retention: alpha: the mean loss of the unselected tokens is added with this weight.
        seed: of the `random` score.
    """

    score: Score = "excess"
    ratio: float = 1.0
    scope: Scope = "sequence"
    schedule: Schedule | None = None
    second: Selector | None = None
    combine: Combine = "intersection"
    weighting: AnyWeighting = "mask"
    temperature: float = 1.0
    clip: float = 5.0
    retention: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("score", Score), ("scope", Scope), ("combine", Combine), ("weighting", AnyWeighting)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}; found {getattr(self, name)!r}")
        _check_ratio(self.ratio)
        if self.second is not None and (self.second.scope != self.scope or self.scope in ("running", "dataset")):
            raise ValueError(
                f"two selections are combined in one scope, sequence, batch or step; found {self.scope} and "
                f"{self.second.scope}"
            )
        if self.second is not None and self.second != Selector(
            self.second.score, self.second.ratio, self.scope, self.second.schedule, seed=self.second.seed
        ):
            raise ValueError("of `second` only score, ratio, schedule and seed count: give all else to the first")
        if self.scope == "dataset" and self.selective and self.score not in ("ref_loss", "ref_entropy"):
            raise ValueError(
                f"scope dataset needs a score that does not change: ref_loss or ref_entropy, not {self.score}"
            )
        if self.scope == "dataset" and self.schedule is not None:
            raise ValueError("scope dataset is cut once for the whole run: it takes a ratio, not a schedule")
        if self.weighting != "mask" and (self.scope not in ("sequence", "batch") or self.second or self.retention):
            raise ValueError(
                f"soft weights ({self.weighting}) go with scope sequence or batch, one selection and no retention; "
                f"found scope {self.scope}"
            )
        if not (self.temperature > 0 and self.clip > 0):
            raise ValueError(f"temperature and clip must be above 0, found {self.temperature} and {self.clip}")
        if self.retention < 0 or (self.retention and self.scope == "running"):
            raise ValueError(
                f"retention must be 0 or more, and needs the step's counts, which scope running knows too late; found "
                f"{self.retention} with scope {self.scope}"
            )

    def at(self, step: int) -> Selector:
        """This selector with the ratio of one (0-based) optimizer step."""
        second = self.second.at(step) if self.second else None
        ratio = self.schedule.ratio(step) if self.schedule else self.ratio
        return replace(self, ratio=ratio, schedule=None, second=second)

    @property
    def parts(self) -> tuple[Selector, ...]:
        """This selector, and the second one where there is one."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def selective(self) -> bool:
        """Whether anything may be left out, at any step."""
        lowest = min((ratio for _, ratio in self.schedule.points), default=1.0) if self.schedule else self.ratio
        return lowest < 1.0 or self.weighting != "mask" or (self.second is not None and self.second.selective)

    @property
    def static(self) -> bool:
        """Whether the selection can be made before the forward."""
        return not self.selective or all(part.score not in ("excess", "retrospective", "loss") for part in self.parts)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the scores are made from, the reference's, or the weights themselves."""
        if self.weighting == "loss_weights":
            return (self.weighting,)
        needed = dict.fromkeys(("excess", "retrospective", "ref_loss"), "ref_loss") | {"ref_entropy": "ref_entropy"}
        found = (needed[part.score] for part in self.parts if part.score in needed)
        return tuple(dict.fromkeys(found)) if self.selective else ()

    def eligible(self, labels_BT: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """Tokens that take part: they have a label and, where it is needed, a finite value (a weight other than 0).

        Args:
            labels_BT: `IGNORE_INDEX` where there is no loss (first and special tokens, padding, prompts).
            columns: by name (`COLUMNS`), each of shape (B, T); a missing one, or of another shape, is a ValueError.
        """
        eligible = labels_BT != IGNORE_INDEX
        for name in self.columns:
            if name not in columns:
                if name == "loss_weights":
                    raise ValueError("weighting 'loss_weights' needs the rows' loss_weights, found none: pass them")
                raise ValueError(
                    f"score '{self.score}' needs the reference's {name}, found none: pass it, or ratio 1.0"
                )
            if (found := tuple(columns[name].shape)) != (shape := tuple(labels_BT.shape)):
                raise ValueError(f"expected a {name} for each label {shape}, NaN for first tokens, found {found}")
            eligible = eligible & columns[name].isfinite()
            if name == "loss_weights":
                eligible = eligible & (columns[name] != 0)
        return eligible

    def scores(
        self, loss_BT: Tensor | None, columns: dict[str, Tensor], block_B: Tensor | None, length: int, step: int
    ) -> Tensor:
        """score_BT, higher is wanted; see the class for the kinds.

        Args:
            loss_BT: current losses (nats, no gradient), for the scores that need them.
            columns: the reference's columns.
            block_B: number of each row in the corpus; with seed, step and position it decides the random score, so that
                it depends on neither batching nor resuming.
            length: T.
            step: the optimizer step.
        """
        if self.score == "random":
            if block_B is None:
                raise ValueError("score 'random' needs the rows' numbers, a column `block` (or block_B=), found none")
            return random_score(block_B, length, self.seed, step)
        if self.score in ("ref_loss", "ref_entropy"):
            return -columns[self.score]
        if loss_BT is None:
            raise ValueError(f"score '{self.score}' needs the current losses")
        if self.score == "loss":
            return loss_BT
        excess_BT = excess_loss(loss_BT, columns["ref_loss"])
        return -excess_BT if self.score == "retrospective" else excess_BT

    def select(self, parts_scores: Sequence[Tensor], eligible_BT: Tensor, threshold: float | None = None) -> Tensor:
        """mask_BT of Eq. 5 where the scope lies within the micro-batch: sequence, batch, or running with a threshold.

        Args:
            parts_scores: score_BT of each of `parts`.
            eligible_BT: from `eligible`.
            threshold: of scope running: a token is selected from this score on.
        """
        masks = []
        for part, score_BT in zip(self.parts, parts_scores, strict=True):
            if part.ratio >= 1.0:
                masks.append(eligible_BT)
            elif self.scope == "sequence":
                masks.append(select_top(score_BT, eligible_BT, part.ratio))
            elif self.scope == "running" and threshold is not None:
                masks.append(eligible_BT & (score_BT >= threshold))
            else:
                flat = select_top(score_BT.reshape(1, -1), eligible_BT.reshape(1, -1), part.ratio)
                masks.append(flat.view_as(eligible_BT))
        return self.combined(masks)

    def select_step(
        self,
        micro_batches: Sequence[Sequence[Tensor]],
        eligible: Sequence[Tensor],
        gather: Gather = lambda own: [own],
        rank: int = 0,
    ) -> list[Tensor]:
        """The masks of all micro-batches of this rank, ranked over the whole optimizer step and all ranks: exact.

        Ties go to the earlier token in the order (micro-batch, rank, row, position): the order in which a sampler
        hands rows out, so that the cut into micro-batches and ranks does not matter.

        Args:
            micro_batches: for each micro-batch, the score_BT of each of `parts`.
            eligible: eligible_BT of each micro-batch.
            gather: collects a 1-D tensor from all ranks, in order.
            rank: this rank's place among them.
        """
        masks = []
        for number, part in enumerate(self.parts):
            if part.ratio >= 1.0:
                masks.append(list(eligible))
                continue
            score_N, order_N = _flatten([scores[number] for scores in micro_batches], eligible)
            masks.append(_top_of_step(score_N, order_N, eligible, part.ratio, gather, rank))
        return [self.combined(list(of_parts)) for of_parts in zip(*masks, strict=True)]

    def combined(self, masks: Sequence[Tensor]) -> Tensor:
        """Intersection or union of the masks of `parts`."""
        if len(masks) == 1:
            return masks[0]
        return masks[0] & masks[1] if self.combine == "intersection" else masks[0] | masks[1]

    def num_selected(self, eligible_BT: Tensor) -> Tensor | None:
        """How many tokens `select` picks in a micro-batch, where that is known before the forward; else None.

        Known for one selection of scope sequence or batch. Soft weights count as many tokens as are eligible.
        """
        if self.weighting != "mask" or not self.selective:
            return eligible_BT.sum()
        if self.second is not None or self.scope not in ("sequence", "batch"):
            return None
        groups = eligible_BT if self.scope == "sequence" else eligible_BT.reshape(1, -1)
        return num_to_select(groups.sum(-1), self.ratio).sum()

    def soft_weights(self, score_BT: Tensor, eligible_BT: Tensor) -> Tensor:
        """weight_BT >= 0 with mean 1 over the eligible tokens of each sequence (or of the micro-batch), 0 elsewhere."""
        shape = eligible_BT.shape
        if self.scope == "batch":
            score_BT, eligible_BT = score_BT.reshape(1, -1), eligible_BT.reshape(1, -1)
        scaled = (score_BT / self.temperature).masked_fill(~eligible_BT, -torch.inf)
        if self.weighting == "softmax":
            weight = (scaled - scaled.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
        elif self.weighting == "sigmoid":
            chosen = select_top(score_BT, eligible_BT, self.ratio)
            threshold = scaled.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
            weight = (scaled - threshold.nan_to_num(posinf=0.0)).sigmoid()
        else:
            weight = scaled.clamp(max=math.log(self.clip)).exp()
        weight = weight.masked_fill(~eligible_BT, 0.0)
        mean = weight.sum(-1, keepdim=True) / eligible_BT.sum(-1, keepdim=True).clamp(min=1)
        return (weight / mean.clamp(min=torch.finfo(weight.dtype).tiny)).view(shape)


def _check_ratio(ratio: float) -> None:
    if not isinstance(ratio, Real) or not 0.0 < ratio <= 1.0:  # which not-a-number is not, either
        no_number = "" if isinstance(ratio, Real) else ", no plain number"
        raise ValueError(f"ratio must be in (0, 1], found {ratio!r}{no_number}. 1.0 trains on every token.")


def _flatten(scores: Sequence[Tensor], eligible: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scores of this rank's eligible tokens, and the micro-batch each comes from."""
    score_N = torch.cat([score[mask] for score, mask in zip(scores, eligible, strict=True)])
    numbers = [torch.full((int(mask.sum()),), m, device=mask.device) for m, mask in enumerate(eligible)]
    return score_N.double(), torch.cat(numbers)


def _top_of_step(
    score_N: Tensor, micro_N: Tensor, eligible: Sequence[Tensor], ratio: float, gather: Gather, rank: int
) -> list[Tensor]:
    """The part of the step's top `round(ratio * n)` that lies on this rank, as one mask for each micro-batch."""
    scores, micros = gather(score_N), gather(micro_N)
    all_scores, all_micros = torch.cat(scores), torch.cat(micros)
    # Ranks come in order and rows in order within them, so sorting by micro-batch gives (micro-batch, rank, row, t).
    position = all_micros.argsort(stable=True)
    everyone = torch.ones(1, len(position), dtype=torch.bool, device=position.device)
    chosen = torch.zeros_like(everyone[0])
    chosen[position] = select_top(all_scores[position][None], everyone, ratio)[0]
    start = sum(len(part) for part in scores[:rank])
    own = chosen[start : start + len(score_N)]
    masks = []
    for m, mask in enumerate(eligible):
        picked = torch.zeros_like(mask)
        picked[mask] = own[micro_N == m]
        masks.append(picked)
    return masks


@dataclass
class RunningThreshold:
    """The score from which on scope `running` selects; it follows past steps.

    Attributes:
        value: the threshold; None before the first step.
        slope: its change from step to step. Scores drift as losses fall: without a slope the threshold lags behind and
            far too little is selected.
        owed: ratio asked for less ratio realised, summed over steps, and paid back little by little.
    """

    value: float | None = None
    slope: float = 0.0
    owed: float = 0.0

    def follow(self, score_N: Tensor, ratio: float, realised: float, gather: Gather = lambda own: [own]) -> None:
        """Move towards what the wanted share of a step's eligible scores lies above.

        Args:
            score_N: this rank's.
            ratio, realised: shares of the tokens of all ranks that were to be, and were, selected.
            gather: collects a 1-D tensor from all ranks.
        """
        self.owed += ratio - realised
        wanted = round((ratio + PAY_BACK * self.owed) * len(score_N))
        lowest = score_N.new_tensor(torch.nan)  # a rank whose rows are all padding has no say
        if len(score_N):
            lowest = score_N.kthvalue(len(score_N) + 1 - min(max(wanted, 1), len(score_N))).values
        found = float(torch.cat(gather(lowest.double()[None])).nanmean())
        error = 0.0 if self.value is None else found - self.value
        self.slope += BEND * error
        self.value = found if self.value is None else self.value + FOLLOW * error + self.slope


@dataclass(frozen=True)
class Cut:
    """Where scope `dataset` divides a corpus: above `value`, or equal to it and not after (block, position)."""

    value: float
    block: int
    position: int

    def mask(self, score_BT: Tensor, eligible_BT: Tensor, block_B: Tensor) -> Tensor:
        """The eligible tokens of some rows that lie above the cut."""
        position_T = torch.arange(score_BT.shape[1], device=score_BT.device)
        block_B1 = block_B[:, None]
        before = (block_B1 < self.block) | ((block_B1 == self.block) & (position_T <= self.position))
        return eligible_BT & ((score_BT > self.value) | ((score_BT == self.value) & before))


def dataset_cut(rows: Callable[[], Iterable[tuple[Tensor, Tensor]]], ratio: float) -> Cut:
    """The cut that leaves exactly `round(ratio * n)` of all n eligible tokens above it, ties by position.

    Args:
        rows: called for each of up to three passes; gives (score_T float32, eligible_T) of block 0, 1, 2 ...
        ratio: share to select, in (0, 1].

    Memory does not grow with the corpus: the value is found by two histograms over the halves of the scores' bits.
    """
    high = torch.zeros(1 << 16, dtype=torch.int64)
    for score, eligible in rows():
        high += torch.bincount(_ordered_bits(score[eligible]) >> 16, minlength=1 << 16)
    wanted = int(num_to_select(high.sum(), ratio))
    if wanted == 0:
        raise ValueError(f"ratio {ratio} selects none of the corpus's {int(high.sum())} eligible tokens")
    top, above = _bucket(high, wanted)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for score, eligible in rows():
        bits = _ordered_bits(score[eligible])
        low += torch.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
    bottom, above_low = _bucket(low, wanted - above)
    ties = wanted - above - above_low
    wanted_bits = (top << 16) | bottom
    for block, (score, eligible) in enumerate(rows()):
        equal = (eligible & (_ordered_bits(score) == wanted_bits)).nonzero().squeeze(-1)
        if len(equal) >= ties:
            position = int(equal[ties - 1])
            return Cut(float(score[position]), block, position)
        ties -= len(equal)
    raise AssertionError("the passes gave different rows")


def _ordered_bits(score: Tensor) -> Tensor:
    """int64 in [0, 2^32) that orders as the float32 scores do (-0.0 counts as 0.0)."""
    bits = (score.float() + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits | (1 << 31), ~bits & 0x7FFFFFFF)


def _bucket(histogram: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th largest, and how many lie in the buckets above it."""
    from_top = histogram.flip(0).cumsum(0)
    index = int((from_top < wanted).sum())
    bucket = len(histogram) - 1 - index
    return bucket, int(from_top[index] - histogram[bucket])


def random_score(block_B: Tensor, length: int, seed: int, draw: int) -> Tensor:
    """score_BT, uniform, a pure function of (seed, draw, block, position): a counter-based generator (splitmix64)."""
    position_T = torch.arange(length, device=block_B.device)
    x = _mix(_mix(_mix(torch.tensor(seed, device=block_B.device)) + draw) + block_B.long())[:, None]
    return _mix(x + position_T[None, :]).double()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (wrapping), a bijection whose output bits look independent."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _logical_shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _logical_shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
