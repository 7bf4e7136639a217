"""A plain loop with `rho.selective_loss`: no tensor of all logits, and any number of micro-batches a step.

    python examples/selective_loss.py CORPUS SCORES MODEL OUT

CORPUS and SCORES are folders that `rho corpus` and `rho score` wrote; MODEL is any Transformers causal language model.
What the equations say is in plain_pytorch.py; models that are wrapped (DDP, FSDP2, Accelerate) are in fsdp2.py and
accelerate_loop.py.
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

import rho
from rho.corpus import Corpus
from rho.data import TrainingBlocks
from rho.models import head
from rho.store import ScoreStore

MICRO_BATCHES = 2  # in an optimizer step


def train(
    model: PreTrainedModel,
    steps: Iterable[list[dict[str, Tensor]]],
    selector: rho.Selector,
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """One optimizer step for each list of micro-batches; the loss of each."""
    losses = []
    for batches in steps:
        # All micro-batches divide by what the whole step selects, which the labels and scores say beforehand.
        total = sum(rho.count_selected(batch["labels"], batch["ref_loss"], selector) for batch in batches)
        loss = 0.0
        for batch in batches:
            # No attention mask and no cache: position ids alone keep isolated documents apart.
            inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            weight, bias, scale, cap = head(model)  # all that makes its logits
            out = rho.selective_loss(
                hidden,
                weight,
                batch["labels"],
                batch["ref_loss"],
                selector,
                bias_V=bias,
                scale=scale,
                cap=cap,
                num_selected=total,
            )
            out.loss.backward()
            loss += out.loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        print(f"step {len(losses)}: loss {loss:.4f} on {int(total)} selected tokens")
    return losses


def main(corpus: str, scores: str, model_path: str, out: str) -> None:
    """Train on the whole corpus once and save a plain Transformers model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path).train()
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))  # refuses scores of another corpus or tokenizer
    batches = iter(DataLoader(data, batch_size=8, shuffle=True))
    steps = zip(*[batches] * MICRO_BATCHES, strict=False)
    train(model, map(list, steps), rho.Selector("excess", 0.6), torch.optim.AdamW(model.parameters(), lr=1e-3))
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
