"""torchtitan: the loss and the data loader of a selective training, as configs of its `config_registry`.

torchtitan shifts in the data: its `labels[t]` is what row t of the logits predicts, token t+1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import BaseLoss

from rho.corpus import Corpus
from rho.data import Padded, RowOrder, TrainingBlocks
from rho.errors import ConfigError, MismatchError
from rho.integrations.by_labels import LabelLoss
from rho.integrations.labels import attach_scores
from rho.objective import next_labels
from rho.selection import Selector
from rho.store import ScoreStore


class SelectiveLoss(BaseLoss):
    """Eq. 4 for torchtitan; see `rho.integrations.by_labels.LabelLoss` for what it divides by.

    Not inside `ChunkedLossWrapper` nor with context parallelism: both hand a loss parts of sequences, whose tokens
    would be ranked part by part.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Fields of `rho.selection.Selector`.

        Attributes:
            seq_len: tokens of a row (`training.seq_len`), by which parts of sequences are found out.
        """

        ratio: float
        seq_len: int
        score: Literal["excess", "loss", "ref_loss", "ref_entropy"] = "excess"
        scope: Literal["sequence", "batch"] = "sequence"
        weighting: Literal["mask", "softmax", "sigmoid", "exponential", "loss_weights"] = "mask"
        temperature: float = 1.0

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        # Not compiled: what is selected has shapes that depend on the data.
        self.seq_len = config.seq_len
        self._loss = LabelLoss(
            Selector(
                config.score,
                config.ratio,
                config.scope,
                weighting=config.weighting,
                temperature=config.temperature,
            )
        )

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, nats, and no metrics.

        Args:
            pred: logits BTV of whole sequences; row t predicts label t.
            labels: BT, of `rho.attach_scores`.
            global_valid_tokens: labels of the optimizer step over all ranks.

        Raises:
            ValueError: labels without scores, parts of sequences, or logits that are spread over devices.
        """
        if pred.dim() != 3 or pred.shape[1] != self.seq_len or hasattr(pred, "placements"):
            raise ValueError(
                f"expected logits (B, {self.seq_len}, V) of whole sequences on one device, found {type(pred).__name__} "
                f"{tuple(pred.shape)}. Take this loss without ChunkedLossWrapper, context and loss parallelism."
            )
        return self._loss.of_aligned(pred, labels, global_valid_tokens), {}


class ScoredBlocks(IterableDataset):
    """This rank's blocks of a corpus, epoch after epoch, with scores inside their labels; goes on where it was.

    Args:
        blocks: the corpus joined with its scores.
        column: the column whose values go into the labels.
        rank, ranks: which share of the blocks.
        seed: of their order.
    """

    def __init__(self, blocks: TrainingBlocks, column: str, rank: int, ranks: int, seed: int) -> None:
        self.blocks, self.column, self.rank, self.ranks = blocks, column, rank, ranks
        self.order = RowOrder(len(blocks), ranks, seed)
        self.taken = 0  # in this epoch

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rows = Padded(self.blocks)
        while True:
            mine = list(self.order)[self.rank :: self.ranks]
            for number in mine[self.taken :]:
                self.taken += 1
                row = rows[number]
                labels = attach_scores(row["labels"], row[self.column])
                inputs = {"input": row["input_ids"], "positions": row["position_ids"]}
                yield inputs, next_labels(labels[None])[0]
            self.order.set_epoch(self.order.epoch + 1)
            self.taken = 0

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.order.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.order.set_epoch(state["epoch"])
        self.taken = state["taken"]


class SelectiveDataLoader(ParallelAwareDataloader):
    """Blocks that `rho corpus` packed and `rho score` scored, for `SelectiveLoss`."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        """Where the data is.

        Attributes:
            corpus: folder of `rho corpus`; its blocks are `training.seq_len` long.
            scores: folder of `rho score`.
            column: what the loss's score needs: ref_loss or ref_entropy.
            seed: of the order of the blocks.
        """

        corpus: str
        scores: str
        column: Literal["ref_loss", "ref_entropy"] = "ref_loss"
        seed: int = 0

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **others: Any,
    ) -> None:
        if config.num_workers:
            raise ConfigError(f"num_workers {config.num_workers}: each would read the same blocks. Take 0.")
        blocks = TrainingBlocks(Corpus(config.corpus), ScoreStore(config.scores), columns=(config.column,))
        if (length := len(blocks[0]["input_ids"])) != seq_len:
            raise MismatchError(
                f"{config.corpus}: its blocks have {length} tokens, training.seq_len is {seq_len}. Make them equal."
            )
        known = {name: others[name] for name in ("snapshot_every_n_steps",) if name in others}
        super().__init__(
            ScoredBlocks(blocks, config.column, dp_rank, dp_world_size, config.seed),
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=local_batch_size,
            pin_memory=config.pin_memory,
            **known,
        )
