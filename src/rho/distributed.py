"""What the processes of one training tell each other."""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Before there is a group: its functions' defaults are the group of the moment they are imported, and would keep it
    # for ever, so that `leave` could not end its threads. Wrapping a model for DDP imports it, but after that moment.
    import torch.distributed.nn


def rank() -> int:
    """This process's place among the ranks; before they have met, as their launcher says."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes there are; before they have met, as their launcher says."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def all_gather(own_N: Tensor) -> list[Tensor]:
    """1-D tensors, of any lengths, from all ranks in order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own_N]
    lengths = [torch.zeros(1, dtype=torch.int64, device=own_N.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(own_N)], device=own_N.device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=own_N.dtype, device=own_N.device)
    padded[: len(own_N)] = own_N
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    return [part[: int(length)] for part, length in zip(found, lengths, strict=True)]


def leave() -> None:
    """Leave the gloo group of the ranks, where there is one: the last thing that a program on several CPUs does.

    Its threads free the tensors of the last collectives. One that does so while the interpreter ends aborts the process
    ("terminate called without an active exception", Python 3.13 and before), and the launcher calls the finished run
    failed. Here they end, if models wrapped for DDP are out of use. They do not of a group that FSDP2 has used: there a
    barrier before gives them the time to have freed all. No rank waits here for another, which may be saving.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        gc.collect()  # wrapped models, which hold the group, stand in cycles
        dist.destroy_process_group()
