"""One tiny model and one stream of rows, trained for two steps in every framework of `tests/test_integrations.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rho.integrations.labels import attach_scores
from rho.models import ModelConfig, make_model
from rho.selection import Selector

STEPS, RATE, PADDING = 2, 0.5, 0
SELECTOR = Selector("excess", 0.6)
VOCABULARY = 300
# A row has one label fewer than tokens, or fewer still where a prompt takes no part; 0.6 of them is a whole number.
LENGTHS, PROMPTS = (16, 11, 6, 16, 13, 8, 16, 11), (0, 0, 0, 0, 3, 3, 6, 0)


class Trained(NamedTuple):
    """The loss of each step, and what the steps changed in each parameter (float64)."""

    losses: list[float]
    changes: dict[str, Tensor]


def rows() -> list[dict[str, list]]:
    """Tokenised examples with `labels` (the first token and the prompt have none) and `ref_loss`."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = torch.randint(5, VOCABULARY, (length,), generator=draw)
        labels = ids.clone()
        labels[: max(prompt, 1)] = -100
        ref_loss = 6.0 * torch.rand(length, generator=draw)
        mask = [0] * prompt + [1] * (length - prompt)
        found.append(
            {
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "ref_loss": [float("nan"), *ref_loss[1:].tolist()],
                "completion_mask": mask,
            }
        )
    return found


def packed(row: dict[str, list]) -> dict[str, list]:
    """The row as any trainer carries it: the scores in the labels."""
    return {"input_ids": row["input_ids"], "labels": attach_scores(row["labels"], row["ref_loss"]).tolist()}


def batch(some: list[dict[str, list]]) -> dict[str, Tensor]:
    """Rows padded on the right to the longest; of the columns those that are there."""
    padding = {"input_ids": PADDING, "labels": -100, "ref_loss": float("nan"), "loss_weights": 0.0, "attention_mask": 0}
    some = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in some]
    longest = max(len(row["input_ids"]) for row in some)
    names = [name for name in padding if name in some[0]]
    return {n: torch.tensor([row[n] + [padding[n]] * (longest - len(row[n])) for row in some]) for n in names}


def model(architecture: dict) -> Any:
    """The model, in float64."""
    return make_model(ModelConfig(architecture=architecture), VOCABULARY).double().train()


def changes(before: dict[str, Tensor], after: Any) -> dict[str, Tensor]:
    """What training changed; of sharded parameters the whole."""
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in after.named_parameters()}
    return {name: whole[name].detach() - value for name, value in before.items()}


def weights(network: Any) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def by_loss(network: Any, loss: Callable[[], Tensor]) -> Trained:
    """Train by a loss of all rows, written out by hand."""
    before, losses = weights(network), []
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    for _ in range(STEPS):
        total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return Trained(losses, changes(before, network))


def arguments(out: Path, rows_at_once: int, accumulation: int) -> dict[str, Any]:
    """Of `TrainingArguments`: plain SGD over all rows in each step, so that their order is of no matter."""
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": rows_at_once,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def by_trainer(trainer: Any) -> Trained:
    """Train with any `transformers.Trainer`."""
    before, losses = weights(trainer.model), []
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        losses.append((trainer.state.global_step, float(loss)))
        return loss

    trainer.training_step = recorded
    trainer.train()
    sums = [sum(loss for number, loss in losses if number == at) for at in range(STEPS)]
    return Trained(sums, changes(before, trainer.model))
