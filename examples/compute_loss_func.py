"""Selection in an unchanged `transformers.Trainer`: scores inside the labels, and a `compute_loss_func`.

    python examples/compute_loss_func.py CORPUS SCORES MODEL OUT

The mixin (trainer_mixin.py) is the better way: it makes no logits of all tokens, and divides by what is selected.
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from rho import Selector, attach_scores
from rho.corpus import Corpus
from rho.data import TrainingBlocks
from rho.integrations.by_labels import LabelLoss
from rho.store import ScoreStore


def main(corpus: str, scores: str, model_path: str, out: str) -> None:
    """Train on the whole corpus once and save a plain Transformers model."""
    blocks = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    rows = [
        {
            "input_ids": block["input_ids"].tolist(),
            "position_ids": block["position_ids"].tolist(),
            "labels": attach_scores(block["labels"], block["ref_loss"]).tolist(),
        }
        for block in (blocks[number] for number in range(len(blocks)))
    ]
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        args=TrainingArguments(out, num_train_epochs=1, per_device_train_batch_size=8, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        compute_loss_func=LabelLoss(Selector("excess", ratio=0.6)),
    )
    trainer.accelerator.gradient_accumulation_steps = 1  # before 5.6, transformers divides by it twice
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
