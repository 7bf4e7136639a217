"""Selective Language Modeling in a plain PyTorch loop: the equations of `rho.objective` and a score store.

    python examples/plain_pytorch.py CORPUS SCORES MODEL OUT

CORPUS and SCORES are folders that `rho corpus` and `rho score` wrote; MODEL is any Transformers causal language model.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from rho.corpus import Corpus
from rho.data import TrainingBlocks
from rho.objective import IGNORE_INDEX, excess_loss, select_top, slm_loss, token_loss
from rho.store import ScoreStore

RATIO = 0.6


def slm_step(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The SLM loss of a batch (Eq. 4) and the mask of selected tokens (Eq. 5), ranked within each sequence."""
    # No attention mask and no cache: position ids alone keep isolated documents apart.
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    loss = token_loss(logits, batch["labels"])  # Eq. 1, token t's loss at index t
    eligible = (batch["labels"] != IGNORE_INDEX) & batch["ref_loss"].isfinite()
    selected = select_top(excess_loss(loss.detach(), batch["ref_loss"]), eligible, RATIO)  # Eq. 3 and 5
    return slm_loss(loss, selected, selected.sum()), selected  # Eq. 4


def train(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], learning_rate: float) -> list[float]:
    """One pass over the batches with AdamW; the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for step, batch in enumerate(batches):
        loss, selected = slm_step(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f} on {selected.sum().item()} of {selected.numel()} tokens")
    return losses


def main(corpus: str, scores: str, model_path: str, out: str) -> None:
    """Train on the whole corpus once and save a plain Transformers model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    text = Corpus(corpus)
    data = TrainingBlocks(text, ScoreStore(scores))  # refuses scores of another corpus or tokenizer
    train(model, DataLoader(data, batch_size=8, shuffle=True), learning_rate=1e-3)
    model.save_pretrained(out)
    text.tokenizer.save(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
