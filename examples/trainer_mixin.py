"""Selection in a `transformers.Trainer` of your own: one base class more.

python examples/trainer_mixin.py CORPUS SCORES MODEL OUT
"""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from rho import Selector
from rho.corpus import Corpus
from rho.data import TrainingBlocks, collate
from rho.mixin import SelectiveMixin
from rho.store import ScoreStore


class MyTrainer(SelectiveMixin, Trainer):
    """Your own trainer, as it was, with a `selector`."""


def main(corpus: str, scores: str, model_path: str, out: str) -> None:
    """Train on the whole corpus once and save a plain Transformers model."""
    trainer = MyTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        args=TrainingArguments(out, num_train_epochs=1, per_device_train_batch_size=8, report_to="none"),
        train_dataset=TrainingBlocks(Corpus(corpus), ScoreStore(scores)),
        data_collator=collate,
        selector=Selector("excess", ratio=0.6),
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
