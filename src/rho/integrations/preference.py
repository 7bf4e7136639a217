"""Preference pairs with a reward for each token (SePO, Yang et al. 2024, arXiv 2408.13518): scoring and selecting.

The reward of a token is `beta * log(pi_oracle / pi_before)`: how much likelier it has become while an oracle, which
may be small, was trained with DPO. In losses that is `beta * (loss_before - loss_oracle)`: the excess loss (Eq. 3) with
the oracle as the reference. Trained on are the tokens of the highest reward of a chosen answer and of the lowest of a
rejected one. beta, which changes no rank, is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rho.errors import ConfigError, DataError, MismatchError
from rho.models import check_head
from rho.objective import IGNORE_INDEX, excess_loss, token_labels
from rho.references.model import score_batch
from rho.selection import Selector

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # a tokenised pair, as TRL has it
REWARDS = ("chosen_rewards", "rejected_rewards")  # one number for each token of an answer, NaN where there is none


def check_pairs_selector(selector: Selector) -> None:
    """Refuse a selection that has no meaning for pairs, whose two answers are ranked each by itself.

    Raises:
        ConfigError: naming what is asked for.
    """
    if selector != Selector(ratio=selector.ratio, schedule=selector.schedule):
        raise ConfigError(
            "preference pairs are selected by Selector('excess', ratio) or its schedule, in scope sequence: an "
            f"answer's tokens by their rewards. Found {selector}."
        )


def select_in_pairs(reward_BT: Tensor, labels_BT: Tensor, selector: Selector) -> Tensor:
    """mask_BT: of each chosen answer the tokens of the highest reward, of each rejected one those of the lowest.

    Args:
        reward_BT: NaN where a token has none. The first half of the rows are chosen answers, the second the rejected.
        labels_BT: `IGNORE_INDEX` where a token is not of the answer, or nothing predicts it.
        selector: of the step (`Selector.at`).

    Raises:
        DataError: an answer of which nothing is selected. Its log-probability would be 0, that of a sure answer.
    """
    wanted_B1 = torch.ones_like(reward_BT[:, :1])
    wanted_B1[len(reward_BT) // 2 :] = -1.0
    eligible_BT = (labels_BT != IGNORE_INDEX) & reward_BT.isfinite()
    selected_BT = selector.select([wanted_B1 * reward_BT], eligible_BT)
    if bool((empty_B := ~selected_BT.any(-1)).any()):
        raise DataError(
            f"ratio {selector.ratio} of {int(eligible_BT[empty_B].sum(-1).min())} tokens with a reward selects none, "
            f"in {int(empty_B.sum())} of {len(empty_B)} answers. Leave such short answers, and prompts that fill "
            "max_length, out; or ask for a larger ratio."
        )
    return selected_BT


def score_pairs(rows: Any, oracle: PreTrainedModel, before: PreTrainedModel, batch_size: int = 8) -> Any:
    """The rows with the columns of `REWARDS`.

    Args:
        rows: a data set (of `datasets`) of tokenised pairs (`IDS`).
        oracle: trained with DPO, on these pairs or on others. Both models are left in eval mode.
        before: what the oracle was before that training.
        batch_size: pairs passed forward at once.

    Raises:
        MismatchError: rows that are not tokenised, models of other vocabularies, or twice the same model.
    """
    names = rows.column_names or list(next(iter(rows)))
    if missing := [name for name in IDS if name not in names]:
        raise MismatchError(f"the rows need {', '.join(IDS)}; {', '.join(missing)} not found among {', '.join(names)}.")
    sizes = [model.get_input_embeddings().num_embeddings for model in (oracle, before)]
    if sizes[0] != sizes[1]:
        raise MismatchError(f"the oracle's vocabulary has {sizes[0]} entries, that of the model before it {sizes[1]}.")
    for model in (oracle, before):
        check_head(model)
        model.eval()
    return rows.map(_with_rewards, batched=True, batch_size=batch_size, fn_kwargs={"oracle": oracle, "before": before})


def _with_rewards(pairs: dict[str, list], oracle: PreTrainedModel, before: PreTrainedModel) -> dict[str, list]:
    prompts = pairs["prompt_ids"] * 2
    answers = pairs["chosen_ids"] + pairs["rejected_ids"]
    texts = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    # Padding stands behind the tokens and is seen by none of them.
    input_ids_BT = pad_sequence(texts, batch_first=True)
    batch = {"input_ids": input_ids_BT, "position_ids": positions(input_ids_BT)}
    reward_BT = excess_loss(*(score_batch(model, batch)[0].float().cpu() for model in (before, oracle)))
    found = [
        row[len(prompt) : len(prompt) + len(answer)]
        for row, prompt, answer in zip(reward_BT, prompts, answers, strict=True)
    ]
    if not any(bool(row.nan_to_num().any()) for row in found):
        raise MismatchError(
            f"every token of {len(found) // 2} pairs has reward 0: the oracle and the model before it are the same. "
            "Give the oracle after its training with DPO, and its weights before."
        )
    rewards = [row.tolist() for row in found]
    return dict(zip(REWARDS, (rewards[: len(rewards) // 2], rewards[len(rewards) // 2 :]), strict=True))


def answer_labels(input_ids_BT: Tensor, answer_BT: Tensor) -> Tensor:
    """Label t is token t where it is of an answer and has a predecessor, else `IGNORE_INDEX`.

    An answer's first token has none where the prompt is empty, or was cut off.
    """
    return token_labels(input_ids_BT, positions(input_ids_BT), ignore=answer_BT == 0)


def positions(input_ids_BT: Tensor) -> Tensor:
    """position_ids_BT of rows that begin at their first token."""
    return torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(input_ids_BT)
