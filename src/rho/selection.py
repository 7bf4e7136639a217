"""Selector: a score, a ratio and a scope make the mask of tokens to train on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rho.errors import RhoError
from rho.objective import IGNORE_INDEX, excess_loss, num_to_select, select_top

Score = Literal["excess", "random"]
Scope = Literal["sequence", "batch"]

QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
# What float16 storage can move a loss by, relative; an excess below it says that two models agree.
SAME_LOSS = 2.0**-10


@dataclass(frozen=True)
class Selector:
    """Which tokens of a batch are trained on.

    Attributes:
        score: `excess` (Eq. 3: current loss minus reference loss) or `random` (the control: the same number of
            tokens, drawn without looking at them).
        ratio: share of the eligible tokens, in (0, 1]. At 1 every eligible token is selected, whatever the score:
            plain causal language modeling.
        scope: the tokens ranked together. `sequence`: each row by itself; does not change with batch size,
            accumulation or number of devices. `batch`: the micro-batch of this device; does change with them.
        seed: of the `random` score.
    """

    score: Score = "excess"
    ratio: float = 1.0
    scope: Scope = "sequence"
    seed: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.ratio) or not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], found {self.ratio}. 1.0 trains on every token.")

    @property
    def selective(self) -> bool:
        """Whether anything is left out."""
        return self.ratio < 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the score is made from a reference's losses."""
        return self.selective and self.score == "excess"

    @property
    def needs_loss(self) -> bool:
        """Whether the current losses must be known before the selection."""
        return self.selective and self.score == "excess"

    def eligible(self, labels_BT: Tensor, ref_loss_BT: Tensor | None) -> Tensor:
        """Tokens that take part: they have a label and, where the score needs one, a finite reference loss."""
        eligible = labels_BT != IGNORE_INDEX
        if self.needs_reference:
            if ref_loss_BT is None:
                raise ValueError("score 'excess' needs the reference's losses, found none: pass ref_loss, or ratio 1.0")
            eligible = eligible & ref_loss_BT.isfinite()
        return eligible

    def num_selected(self, eligible_BT: Tensor) -> Tensor:
        """How many tokens `select` will pick: known before any forward, so that it can divide the loss (Eq. 4)."""
        groups = eligible_BT if self.scope == "sequence" else eligible_BT.reshape(1, -1)
        return num_to_select(groups.sum(-1), self.ratio).sum()

    def select(
        self, eligible_BT: Tensor, loss_BT: Tensor | None, ref_loss_BT: Tensor | None, block_B: Tensor | None, draw: int
    ) -> Tensor:
        """The boolean mask_BT of Eq. 5.

        Args:
            eligible_BT: from `eligible`.
            loss_BT: current losses (nats, no gradient); needed if `needs_loss`.
            ref_loss_BT: the reference's losses; needed if `needs_reference`.
            block_B: number of each row in the corpus, and `draw`, the number of the optimizer step: with the seed and
                the position they decide the random score, so that it depends on neither batching nor resuming.
        """
        if not self.selective:
            return eligible_BT
        if self.score == "excess":
            assert loss_BT is not None and ref_loss_BT is not None, "excess needs both losses"
            score_BT = excess_loss(loss_BT, ref_loss_BT)
        else:
            assert block_B is not None, "random selection needs the rows' block numbers"
            score_BT = random_score(block_B, eligible_BT.shape[1], self.seed, draw)
        if self.scope == "sequence":
            return select_top(score_BT, eligible_BT, self.ratio)
        return select_top(score_BT.reshape(1, -1), eligible_BT.reshape(1, -1), self.ratio).view_as(eligible_BT)


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


class SelectionStats:
    """What selection did since the last log: sums that add up over micro-batches and ranks.

    Args:
        selector: whose work is counted.
        label_names: names of the token labels (`label` -1 means none).
    """

    def __init__(self, selector: Selector, label_names: list[str]) -> None:
        self.selector, self.label_names = selector, label_names
        self._parts: list[Tensor] = []
        self._excess: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._parts)

    @torch.no_grad()
    def add(
        self,
        loss_BT: Tensor,
        eligible_BT: Tensor,
        selected_BT: Tensor,
        ref_loss_BT: Tensor | None,
        label_BT: Tensor | None,
    ) -> None:
        """Count one micro-batch; nothing is moved to the host."""
        loss_selected = loss_BT.double().masked_fill(~selected_BT, 0.0).sum()
        loss_all = loss_BT.double().masked_fill(~eligible_BT, 0.0).sum()
        differs = torch.zeros((), device=loss_BT.device)
        if ref_loss_BT is not None:
            excess = excess_loss(loss_BT, ref_loss_BT)[eligible_BT & ref_loss_BT.isfinite()].float()
            differs = (excess.abs() > 1e-4 + SAME_LOSS * loss_BT.nan_to_num().max()).sum()
            self._excess = excess
        counts = [
            torch.tensor(loss_BT.numel(), device=loss_BT.device),
            eligible_BT.sum(),
            selected_BT.sum(),
            self.selector.num_selected(eligible_BT),
            loss_selected,
            loss_all,
            differs,
        ]
        if self.label_names and label_BT is not None:
            for mask in (eligible_BT, selected_BT):
                counts += list(torch.bincount(label_BT[mask] + 1, minlength=len(self.label_names) + 1)[1:])
        self._parts.append(torch.stack([count.double() for count in counts]))

    def sums(self) -> Tensor:
        """One float64 vector, to be summed over ranks and given to `record`."""
        return torch.stack(self._parts).sum(0)

    def record(self, sums: Tensor) -> dict[str, Any]:
        """The counts as a log record, after checking that selection did what it was asked to.

        Excess quantiles are those of this rank's last micro-batch.

        Raises:
            RhoError: another number of tokens was selected than asked for, the loss is not finite, or the reference
                agrees with the model on every token.
        """
        tokens, eligible, selected, asked, loss_selected, loss_all, differs, *by_label = sums.tolist()
        if selected != asked or selected == 0:
            raise RhoError(
                f"selection is not doing what it was asked to: {selected:.0f} of {eligible:.0f} eligible tokens were "
                f"selected, ratio {self.selector.ratio} asks for {asked:.0f}. Training stopped; please report this."
            )
        if not math.isfinite(loss_all):
            raise RhoError(
                f"the training loss is {loss_all}. Training stopped: lower the learning rate, check the data."
            )
        if self.selector.needs_reference and differs == 0:
            raise RhoError(
                "the excess loss is zero for every token: the reference and the model are the same weights, so nothing "
                "is selected by it. Give another reference, or train with ratio 1.0."
            )
        half = len(by_label) // 2
        labels = zip(self.label_names, by_label[:half], by_label[half:], strict=False)
        rest = eligible - selected
        return {
            "tokens": int(tokens),
            "eligible": int(eligible),
            "selected": int(selected),
            "ratio": selected / eligible,
            "loss_selected": loss_selected / selected,
            "loss_unselected": (loss_all - loss_selected) / rest if rest else None,
            "loss_all": loss_all / eligible,
            "excess": self._quantiles(),
            "labels": {name: {"eligible": int(e), "selected": int(s)} for name, e, s in labels},
        }

    def _quantiles(self) -> dict[str, float] | None:
        if self._excess is None or not self._excess.numel():
            return None
        values = torch.quantile(self._excess, self._excess.new_tensor(list(QUANTILES.values())))
        return dict(zip(QUANTILES, values.tolist(), strict=True))
