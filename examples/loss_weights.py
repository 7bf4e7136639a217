"""Per-token loss weights from data, without any reference model: JSON lines with `text` and `spans` of weights.

    python examples/loss_weights.py ROWS.jsonl MODEL OUT

A row is {"text": "...", "weights": [[begin, end, weight], ...]}, in characters; all else weighs 1, and what weighs 0 is
not trained on. MODEL is a folder or name of a Transformers model and its tokenizer.
"""

import json
import sys
from pathlib import Path

from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from rho import Selector, attach_scores
from rho.mixin import SelectiveMixin


class WeightedTrainer(SelectiveMixin, Trainer):
    """`Trainer` with a selector."""


def weighted(row: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids, and labels with each token's weight inside: no collator drops those."""
    tokens = tokenizer(row["text"], return_offsets_mapping=True, add_special_tokens=False)
    weights = [
        next((weight for begin, end, weight in row["weights"] if begin <= start < end), 1.0)
        for start, _ in tokens["offset_mapping"]
    ]
    labels = attach_scores(tokens["input_ids"], weights)
    labels[0] = -100  # nothing predicts a first token
    return {"input_ids": tokens["input_ids"], "labels": labels.tolist()}


def train(model, rows: Dataset, collate, arguments: TrainingArguments) -> None:
    """The loss of each token times its weight, summed over the step / number of tokens that weigh something."""
    WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        selector=Selector(weighting="loss_weights"),
    ).train()


def main(rows_file: str, model_path: str, out: str) -> None:
    """Train on all rows once and save a plain Transformers model."""
    from transformers import DataCollatorForSeq2Seq  # pads labels with -100

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [weighted(json.loads(line), tokenizer) for line in Path(rows_file).read_text().splitlines()]
    arguments = TrainingArguments(out, num_train_epochs=1, per_device_train_batch_size=4, report_to="none")
    train(model, rows, DataCollatorForSeq2Seq(tokenizer), arguments)
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
