"""TRL: `DPOTrainer` that trains on the tokens of each pair's answers that a `Selector` picks."""

from __future__ import annotations

from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from rho.errors import ConfigError, MismatchError
from rho.integrations.preference import IDS, REWARDS, answer_labels, check_pairs_selector, select_in_pairs
from rho.selection import Selector


class SelectiveDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` on the highest-rewarded tokens of chosen answers and the lowest-rewarded of rejected ones.

    What is selected takes the place of TRL's `completion_mask`. So policy and reference sum the same tokens, every
    `loss_type` is TRL's own code, and ratio 1.0 is TRL's training to the last bit. SePO's loss is TRL's `sigmoid_norm`
    (the mean over the selected tokens, times beta) with `reference_free`.

    Rows are tokenised (`tokenised_pairs`) and have `chosen_rewards` and `rejected_rewards`, one number for each token
    of the answer (`rho.integrations.preference.score_pairs`). TRL's metrics in training are those of the selected
    tokens; `ratio` is the share of them. Evaluation is TRL's own: every token counts, and no rewards are needed.

    Args:
        selector: `Selector("excess", ratio)`, or one with a schedule.
        reference_free: take 0 for the reference's log-probabilities. No reference model is loaded.
        All else is the trainer's.

    Raises:
        ConfigError: another kind of selection, or settings that don't go with one.
        MismatchError: training rows without rewards, or not tokenised.
    """

    # Of the trainer:
    data_collator: Any
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        *,
        args: DPOConfig,
        selector: Selector,
        reference_free: bool = False,
        **others: Any,
    ) -> None:
        check_pairs_selector(selector)
        if args.precompute_ref_log_probs and (selector.selective or reference_free):
            raise ConfigError("precompute_ref_log_probs: the reference sums selected tokens here. Leave it out.")
        if args.ld_alpha is not None and selector.selective:
            raise ConfigError("ld_alpha: it weighs an answer's tokens by their place among all of them. Leave it out.")
        if reference_free and ref_model is not None:
            raise ConfigError("reference_free, and a ref_model: leave one of the two out.")
        self.selector, self.reference_free = selector, reference_free
        # What TRL has computed beforehand needs no reference model; what it would compute is passed over below.
        args = copy(args)
        args.precompute_ref_log_probs |= reference_free
        super().__init__(model, ref_model, args, **others)
        self.accelerator.gradient_accumulation_steps = 1  # nor may `backward`, which older versions ask to divide again
        if reference_free:
            self.precompute_ref_logps, self.ref_model = False, _no_reference
        if selector.selective:
            self.data_collator = partial(_with_rewards, self.data_collator)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset if self.reference_free else super()._precompute_ref_logps(dataset, name, batch_size)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        names = dataset.column_names or list(next(iter(dataset)))
        tokenised = all(name in names for name in IDS)
        if self.selector.selective and dataset_name == "train" and not (tokenised and all(n in names for n in REWARDS)):
            raise MismatchError(
                f"the training rows need {', '.join((*IDS, *REWARDS))}; found {', '.join(names)}. Make them with "
                "tokenised_pairs and score_pairs."
            )
        return dataset if tokenised else super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that are not dropped from a data set."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or []), *REWARDS]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """TRL's loss, in training of the selected tokens."""
        inputs = dict(inputs)
        reward_BT = inputs.pop("rewards", None)
        active = self.selector.at(self.state.global_step)
        if self.model.training and active.selective:
            if reward_BT is None:
                raise MismatchError(f"the batch has no rewards, only {', '.join(inputs)}: the training rows lack them.")
            labels_BT = answer_labels(inputs["input_ids"], inputs["completion_mask"])
            selected_BT = select_in_pairs(reward_BT, labels_BT, active)
            counts = torch.stack([selected_BT.sum(), inputs["completion_mask"].sum()])
            selected, tokens = self.accelerator.gather(counts).view(-1, 2).sum(0).tolist()
            self._metrics["train"]["ratio"].append(selected / tokens)
            inputs["completion_mask"] = selected_BT.to(inputs["completion_mask"].dtype)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def tokenised_pairs(rows: Any, tokenizer: Any, args: DPOConfig) -> Any:
    """Preference rows of text or messages with the tokens that TRL makes of them, and without those too long for it.

    Args:
        rows: a data set with `chosen`, `rejected` and (or inside both) `prompt`.
        tokenizer: the model's; with its chat template for messages.
        args: the `DPOConfig` of the training (`max_length`, `truncation_mode`).
    """
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")


def _with_rewards(collator: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the collator makes of the rows, with `rewards` BT beside its `input_ids` BT where the rows have them."""
    batch = collator(rows)
    if not all(name in row for row in rows for name in REWARDS):
        return batch
    for row in rows:
        found = [(len(row[ids]), len(row[rewards])) for ids, rewards in zip(IDS[1:], REWARDS, strict=True)]
        if any(tokens != numbers for tokens, numbers in found):
            raise MismatchError(f"expected a reward for each token, found tokens and rewards {found} of a pair.")
    # Rewards in the place of ids go through the collator a second time: cut and padded as the ids are.
    nothing = [[float("nan")] * len(row["prompt_ids"]) for row in rows]
    instead = [
        dict(zip(IDS, (prompt, *(row[name] for name in REWARDS)), strict=True))
        for prompt, row in zip(nothing, rows, strict=True)
    ]
    return {**batch, "rewards": collator(instead)["input_ids"]}


def _no_reference(input_ids: Tensor, **_: Any) -> SimpleNamespace:
    """In the place of a reference model: log-probability 0 of every token."""
    return SimpleNamespace(log_probs=torch.zeros(input_ids.shape, device=input_ids.device))
