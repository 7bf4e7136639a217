"""Selection in a raw loop over FSDP2: the loss is made inside the model's forward, so that its weights are whole there.

    torchrun --nproc-per-node 2 examples/fsdp2.py CORPUS SCORES MODEL OUT

Works on CPUs (gloo) and GPUs (nccl). DDP is the same with another wrapper.
"""

import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, PreTrainedModel

from rho import Selector, count_selected
from rho.corpus import Corpus
from rho.data import TrainingBlocks
from rho.forward import make_selective
from rho.store import ScoreStore


def sharded(model: PreTrainedModel, selector: Selector, device: str) -> PreTrainedModel:
    """The model over all ranks; called with `selective=True` it returns sums of losses instead of logits."""
    make_selective(model, selector)  # before the wrapping
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(
    model: PreTrainedModel,
    steps: Iterable[list[dict[str, Tensor]]],
    selector: Selector,
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """One optimizer step for each list of this rank's micro-batches; the loss of each."""
    losses = []
    for step, batches in enumerate(steps):
        counts = [count_selected(batch["labels"], batch["ref_loss"], selector, step=step) for batch in batches]
        total = torch.stack(counts).sum()
        dist.all_reduce(total)  # the selected tokens of all micro-batches and ranks
        loss = torch.zeros((), dtype=torch.float64, device=total.device)
        for batch in batches:
            part = model(**batch, step=step, selective=True)["loss"] / total.clamp(min=1)  # none may have a score
            (part * dist.get_world_size()).backward()  # FSDP averages gradients over ranks
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        losses.append(loss.item())
    return losses


def main(corpus: str, scores: str, model_path: str, out: str) -> None:
    """Train on the whole corpus once and save the weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    selector = Selector("excess", ratio=0.6)
    model = sharded(AutoModelForCausalLM.from_pretrained(model_path).to(device).train(), selector, device)
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data, drop_last=True))
    names = ("input_ids", "position_ids", "labels", "ref_loss")
    steps = ([{name: batch[name].to(device) for name in names}] for batch in loader)
    losses = train(model, steps, selector, torch.optim.AdamW(model.parameters(), lr=1e-3))
    weights = {name: parameter.full_tensor().detach().cpu() for name, parameter in model.named_parameters()}
    if dist.get_rank() == 0:
        print(f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}")
        save_file(weights, out)
    dist.barrier()  # a rank that ends while a thread of its gloo group still holds a tensor is aborted
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
