"""The protocol of data loaders: batches of (dict of inputs, labels), with a state."""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from torchtitan.components.loss import Configurable


class ParallelAwareDataloader(DataLoader, Configurable):
    """One rank's share of the data."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        num_workers: int = 0
        pin_memory: bool = False

    def __init__(
        self, dataset: IterableDataset, dp_rank: int, dp_world_size: int, snapshot_every_n_steps: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(dataset, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Where the data set is."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.dataset.load_state_dict(state)
