"""Selection in Lightning: `make_selective` on the model, one count in `training_step`.

python examples/lightning_module.py CORPUS SCORES MODEL OUT

On several devices (`strategy="ddp"`) every rank divides by what all of them select. One batch a step: with
`accumulate_grad_batches` a step's selected tokens would have to be counted before its first batch.
"""

import sys
from collections.abc import Callable, Iterable

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from rho import Selector, count_selected
from rho.corpus import Corpus
from rho.data import TrainingBlocks
from rho.forward import make_selective
from rho.store import ScoreStore


class SelectiveModule(lightning.LightningModule):
    """Trains a Transformers causal language model on the tokens that `selector` picks."""

    def __init__(
        self,
        model: PreTrainedModel,
        selector: Selector,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        super().__init__()
        self.model, self.selector, self.optimizer = make_selective(model, selector), selector, optimizer

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The mean loss of the tokens that the step selects, over all ranks."""
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels", "ref_loss") if name in batch}
        step = self.global_step
        selected = count_selected(inputs["labels"], inputs.get("ref_loss"), self.selector, step=step)
        total = self.trainer.strategy.reduce(selected, reduce_op="sum")
        loss = self.model(**inputs, step=step, selective=True)["loss"] / total.clamp(min=1)  # none may have a score
        self.log("loss_selected", self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="sum"))
        return loss * self.trainer.world_size  # DDP averages gradients over ranks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As given."""
        return self.optimizer(self.model.parameters())


def main(corpus: str, scores: str, model_path: str, out: str) -> None:
    """Train on the whole corpus once and save a plain Transformers model."""
    model = AutoModelForCausalLM.from_pretrained(model_path).train()
    module = SelectiveModule(model, Selector("excess", ratio=0.6), lambda found: torch.optim.AdamW(found, lr=1e-3))
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=out, enable_checkpointing=False, logger=False)
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['loss_selected']:.4f}")
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
