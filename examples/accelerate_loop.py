"""Selection in a loop with Accelerate: `make_selective` before `prepare`, one count a step.

accelerate launch examples/accelerate_loop.py CORPUS SCORES MODEL OUT
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from rho import Selector, count_selected
from rho.corpus import Corpus
from rho.data import TrainingBlocks
from rho.forward import make_selective
from rho.store import ScoreStore


def main(corpus: str, scores: str, model_path: str, out: str) -> None:
    """Train on the whole corpus once and save a plain Transformers model."""
    accelerator, selector = Accelerator(), Selector("excess", ratio=0.6)
    model = make_selective(AutoModelForCausalLM.from_pretrained(model_path).train(), selector)
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8, shuffle=True))
    for step, batch in enumerate(loader):
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels", "ref_loss")}
        total = accelerator.reduce(count_selected(inputs["labels"], inputs["ref_loss"], selector, step=step), "sum")
        loss = model(**inputs, step=step, selective=True)["loss"] / total.clamp(min=1)  # none may have a score
        accelerator.backward(loss * accelerator.num_processes)  # DDP averages gradients over ranks
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"{step + 1} steps, loss {accelerator.reduce(loss.detach(), 'sum').item():.4f}")
    accelerator.unwrap_model(model).save_pretrained(out, is_main_process=accelerator.is_main_process)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
