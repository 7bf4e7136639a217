"""One rank of `tests/test_distributed.py`: does the jobs of a JSON file; the first rank leaves the weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rho.corpus import Corpus
from rho.data import TrainingBlocks, collate
from rho.distributed import all_gather, leave
from rho.forward import selective_forward
from rho.models import ModelConfig, make_model
from rho.selection import Selector
from rho.store import ScoreStore
from rho.train import TrainConfig, train


def by_trainer(job: dict) -> None:
    """Through the train stage: DDP where there are several ranks."""
    config = TrainConfig.model_validate(job["config"])
    model = ModelConfig(architecture=job["architecture"])
    target = Corpus(job["corpus"], "validation") if "target" in job else None
    train(config, Corpus(job["corpus"]), model, job["out"], ScoreStore(job["scores"]), target)


def by_fully_shard(job: dict) -> None:
    """A raw loop over `fully_shard`: four steps of SGD on rows 0, 1, 2 ..., each rank its own half of a step's rows."""
    from torch.distributed.fsdp import fully_shard

    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    data = TrainingBlocks(Corpus(job["corpus"]), ScoreStore(job["scores"]))
    model = make_model(ModelConfig(architecture=job["architecture"]), Corpus(job["corpus"]).vocab_size).train()
    selector = Selector("excess", 0.6, job["scope"])
    model.forward = selective_forward(selector).__get__(model)
    if ranks > 1:
        for layer in model.model.layers:
            fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(4):
        rows = range(8 * step + rank * (8 // ranks), 8 * step + (rank + 1) * (8 // ranks))
        batch = collate([data[row] for row in rows])
        batch.pop("label")
        out = model(**batch, step=step)
        count = torch.cat(all_gather(out["selected"].sum()[None])).sum()
        (out["loss"] / count * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    if rank == 0:
        from safetensors.torch import save_file

        Path(job["out"]).mkdir()
        save_file({name: p.detach().contiguous() for name, p in full.items()}, f"{job['out']}/weights.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        {"trainer": by_trainer, "fully_shard": by_fully_shard}[job["how"]](job)
    dist.barrier()  # of FSDP2's group, see `leave`
    leave()
