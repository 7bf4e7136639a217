"""TRL: `SFTTrainer` that trains on the tokens a `Selector` picks among those it would train on."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from rho.errors import ConfigError, MismatchError
from rho.integrations.labels import attach_scores
from rho.mixin import SelectiveMixin
from rho.selection import Selector


class SelectiveSFTTrainer(SelectiveMixin, SFTTrainer):
    """`SelectiveMixin` on TRL's `SFTTrainer`: packing, completion-only and assistant-only loss work as they do there.

    Rows are tokenised (`input_ids`, with `labels`, `completion_mask` or `assistant_masks` as TRL knows them) and have
    the column that the selector needs, one number a token, NaN where there is none. It is put into the labels before
    TRL prepares the rows, as packing keeps nothing else. Selected are tokens among those with a label alone. Evaluation
    needs no column: every label counts.

    TRL's own metrics of tokens (entropy, accuracy) are not logged; those of the selection are.

    Args:
        selector: which tokens to train on; `rho.mixin.SelectiveMixin` has the other arguments.

    Raises:
        ConfigError: a loss of TRL's own (`loss_type`), or a selector with two columns.
        MismatchError: training rows without the column that the selector needs, or not tokenised.
    """

    def __init__(self, *args: Any, selector: Selector, **kwargs: Any) -> None:
        if len(selector.columns) > 1:
            raise ConfigError(f"one column fits into the labels, the selector needs {', '.join(selector.columns)}.")
        self._column = next(iter(selector.columns), None)
        super().__init__(*args, selector=selector, **kwargs)
        if self.args.loss_type != "nll":
            raise ConfigError(f"loss_type {self.args.loss_type}: the selection makes the loss here. Take nll.")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: Any, *others: Any) -> Any:
        names = dataset.column_names or list(next(iter(dataset)))
        scored = self._column in names and "input_ids" in names
        if scored:
            own = {"column": self._column, "completion_only": self.completion_only_loss}
            dataset = dataset.map(_with_scores, fn_kwargs=own, remove_columns=[self._column])
        elif self._column is not None and others[-1] == "train" and "labels" not in names:
            raise MismatchError(
                f"the training rows need input_ids and {self._column}, one number a token, or labels of "
                f"rho.attach_scores; found {', '.join(names)}."
            )
        return super()._prepare_dataset(dataset, processing_class, args, packing, *others)


def _with_scores(row: dict[str, Any], column: str, completion_only: bool) -> dict[str, Any]:
    """Labels of the tokens that TRL would train on, with their scores inside."""
    masks = [row[name] for name in ("completion_mask",) * completion_only + ("assistant_masks",) if name in row]
    labels = row.get("labels")
    if labels is None:
        labels = [token if all(bits) else -100 for token, *bits in zip(row["input_ids"], *masks, strict=True)]
    return {"labels": attach_scores(labels, row[column]).tolist()}
