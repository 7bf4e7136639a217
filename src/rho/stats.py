"""What selection did: counts and losses of a logging step, and the refusal to go on when it did nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rho.errors import RhoError
from rho.objective import excess_loss
from rho.selection import Selector

QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
# What float16 storage can move a loss by, relative; an excess below it says that two models agree.
SAME_LOSS = 2.0**-10


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
        asked: Tensor | None = None,
        ref_loss_BT: Tensor | None = None,
        label_BT: Tensor | None = None,
        padding_B: Tensor | None = None,
    ) -> None:
        """Count one micro-batch; nothing is moved to the host.

        Args:
            loss_BT: losses of the eligible tokens.
            eligible_BT, selected_BT: the masks.
            asked: how many tokens should have been selected, where that is known; counted apart from the mask.
            ref_loss_BT: the reference's losses, for the excess.
            label_BT: the tokens' labels.
            padding_B: which rows are padding: their tokens are not counted.
        """
        loss_selected = loss_BT.double().masked_fill(~selected_BT, 0.0).sum()
        loss_all = loss_BT.double().masked_fill(~eligible_BT, 0.0).sum()
        differs = compared = torch.zeros((), device=loss_BT.device)
        if ref_loss_BT is not None:
            excess = excess_loss(loss_BT, ref_loss_BT)[eligible_BT & ref_loss_BT.isfinite()].float()
            same = (excess.abs() <= 1e-4 + SAME_LOSS * loss_BT.nan_to_num().max()).sum()
            differs, compared = excess.numel() - same, torch.tensor(excess.numel(), device=loss_BT.device)
            self._excess = excess
        padding = 0 if padding_B is None else padding_B.sum()
        counts = [
            torch.tensor(loss_BT.numel(), device=loss_BT.device) - loss_BT.shape[1] * padding,
            eligible_BT.sum(),
            selected_BT.sum(),
            selected_BT.sum() if asked is None else asked,
            loss_selected,
            loss_all,
            differs,
            compared,
        ]
        if self.label_names and label_BT is not None:
            for mask in (eligible_BT, selected_BT):
                counts += list(torch.bincount(label_BT[mask] + 1, minlength=len(self.label_names) + 1)[1:])
        self._parts.append(torch.stack([count.double() for count in counts]))

    def forget(self, micro_batches: int) -> None:
        """Leave the last micro-batches out again."""
        del self._parts[len(self._parts) - micro_batches :]
        self._excess = None

    def sums(self) -> Tensor:
        """One float64 vector, to be summed over ranks and given to `record`."""
        return torch.stack(self._parts).sum(0)

    def go_on(self, sums: Tensor) -> None:
        """Begin with what was counted before an interruption."""
        self._parts.append(sums)

    def record(self, sums: Tensor) -> dict[str, Any]:
        """The counts as a log record, after checking that selection did what it was asked to.

        Excess quantiles are those of this rank's last micro-batch.

        Raises:
            RhoError: another number of tokens was selected than asked for, the loss is not finite, or the reference
                agrees with the model on every token.
        """
        tokens, eligible, selected, asked, loss_selected, loss_all, differs, compared, *by_label = sums.tolist()
        if selected != asked:
            raise RhoError(
                f"selection is not doing what it was asked to: {selected:.0f} of {eligible:.0f} eligible tokens were "
                f"selected, {asked:.0f} were asked for. Training stopped; please report this."
            )
        if not math.isfinite(loss_all):
            raise RhoError(
                f"the training loss is {loss_all}. Training stopped: lower the learning rate, check the data."
            )
        ranks_excess = self.selector.selective and any(part.score == "excess" for part in self.selector.parts)
        if ranks_excess and compared and differs == 0:
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
            "loss_selected": loss_selected / selected if selected else None,
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
