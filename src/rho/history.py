"""The weights a model had before, as the reference of its own training (ssToken, arXiv 2510.18250).

    step            0    1    2    3    4    5    6        before its update
    weights         w0   w1   w2   w3   w4   w5   w6
    every: 3        w0   w0   w0   w0   w3   w3   w3       what they are compared with
    moving average  w0   w0   a1   a2   a3   a4   a5       a = ema * a + (1 - ema) * w

Each step is scored first, then the history follows: so from the second step on it is at least one update old.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "history.safetensors"


class HistoryConfig(BaseModel):
    """Which weights of its own past a model is compared with: those of up to `every` steps ago, or their average.

    Attributes:
        every: steps after which the history is renewed: it is 1 to `every` steps old.
        ema: what part of the moving average stays at each step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int | None = Field(None, ge=1)
    ema: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_of(self) -> HistoryConfig:
        if (self.every is None) == (self.ema is None):
            raise ValueError("give either 'every' (steps) or 'ema' (what part of a moving average stays)")
        return self


class History:
    """Copies of a model's trained weights that follow them.

    Args:
        model: whose weights that get gradients are copied.
        config: how they follow.
    """

    def __init__(self, model: nn.Module, config: HistoryConfig) -> None:
        self.config = config
        self._now = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._then = {name: weight.detach().clone() for name, weight in self._now.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has its weights of then; afterwards those of now, the same tensors."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._now.items():
            weight.data, self._then[name] = self._then[name], weight.data

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Called once in each (0-based) optimizer step, before its update."""
        for name, weight in self._now.items():
            if self.config.ema is not None:
                self._then[name].lerp_(weight, 1.0 - self.config.ema)
            elif self.config.every is not None and step % self.config.every == 0:
                self._then[name].copy_(weight)

    def save(self, folder: Path) -> None:
        """Write the weights of then into a checkpoint's folder."""
        save_file({name: weight.contiguous() for name, weight in self._then.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote."""
        found: dict[str, Tensor] = load_file(folder / FILE)
        for name, weight in self._then.items():
            weight.copy_(found[name])
