"""The optimizer step in progress: what was asked for, what was selected, and which rows went wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

SHOWN = 4  # blocks that a message names


@dataclass
class Step:
    """Micro-batches of an optimizer step on this rank, and the tokens asked for (by all ranks) and selected so far."""

    micro_batches: int = 0
    asked: Tensor | int = 0
    exact: bool = True  # whether as many must be selected
    done: int = 0
    selected: Tensor | int = 0
    loss: Tensor | float = 0.0  # as divided by the number asked for
    scores: list[Tensor] = field(default_factory=list)  # of eligible tokens, for scope running
    blocks: list[Tensor] = field(default_factory=list)
    bad_blocks: list[Tensor] = field(default_factory=list)  # those with a loss that is not finite

    @property
    def finite(self) -> bool:
        """Whether every token's loss is a number, on this rank."""
        return not any(len(blocks) for blocks in self.bad_blocks)

    def suspects(self, rows: Dataset, gather: Callable[[Tensor], list[Tensor]]) -> str:
        """Documents and shards of all ranks' rows whose loss is not finite, or of all rows where only a gradient is.

        Args:
            rows: the training rows; those of a corpus are described, of others the block numbers are given.
            gather: collects a 1-D tensor from all ranks.
        """
        bad, every = (torch.cat(gather(torch.cat(blocks))).tolist() for blocks in (self.bad_blocks, self.blocks))
        blocks = [block for block in bad or every if block >= 0]
        if not blocks:
            return "rows without a block number"
        corpus = getattr(rows, "corpus", None)
        named = [corpus.describe(block) if corpus else f"block {block}" for block in blocks[:SHOWN]]
        more = f" and {len(blocks) - SHOWN} more" if len(blocks) > SHOWN else ""
        return ("" if bad else "one or more of ") + "; ".join(named) + more
