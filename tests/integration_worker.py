"""One rank of the FSDP2 case of `tests/test_integrations.py`: the loop of examples/fsdp2.py on half of the rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import integration_cases as cases
from rho.distributed import leave
from rho.errors import RhoError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import fsdp2


def main(job_file: str) -> None:
    """Train on the job's rows; the first rank leaves losses and changes."""
    job = json.loads(Path(job_file).read_text())
    dist.init_process_group("gloo")
    network = cases.model(job["architecture"])
    before = cases.weights(network)
    fsdp2.sharded(network, cases.SELECTOR, "cpu")
    half = len(cases.LENGTHS) // dist.get_world_size()
    mine = cases.rows()[dist.get_rank() * half :][:half]
    batches = [cases.batch(mine[:2]), cases.batch(mine[2:])]
    optimizer = torch.optim.SGD(network.parameters(), lr=cases.RATE)
    losses = fsdp2.train(network, [batches] * cases.STEPS, cases.SELECTOR, optimizer)
    found = cases.changes(before, network)
    for batch in batches:
        del batch["ref_loss"]
    try:
        network(**batches[0], selective=True)
        refusal = "none"
    except (RhoError, ValueError) as error:
        refusal = str(error)
    if dist.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in found.items()}, job["changes"])
        Path(job["losses"]).write_text(json.dumps({"losses": losses, "refusal": refusal}))
    dist.barrier()  # of FSDP2's group, see `leave`
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
