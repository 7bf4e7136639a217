"""Supervised fine-tuning with TRL on the completion tokens that the reference finds learnable.

    python examples/trl_sft.py ROWS.jsonl REFERENCE MODEL OUT

ROWS has a prompt and a completion a line; REFERENCE and MODEL are Transformers models with one tokenizer.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from rho import Selector
from rho.integrations.trl import SelectiveSFTTrainer
from rho.objective import token_loss


@torch.no_grad()
def scored(row: dict, reference, tokenizer) -> dict[str, list]:
    """Tokens of prompt and completion, which of them are the completion, and the reference's loss of each."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    completion = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + completion])
    labels = ids.clone()
    labels[:, 0] = -100  # nothing predicts a first token
    return {
        "input_ids": ids[0].tolist(),
        "completion_mask": [0] * len(prompt) + [1] * len(completion),
        "ref_loss": token_loss(reference(ids).logits, labels)[0].tolist(),
    }


def main(rows_file: str, reference_path: str, model_path: str, out: str) -> None:
    """Train on all rows once, packed, and save a plain Transformers model."""
    reference = AutoModelForCausalLM.from_pretrained(reference_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rows = Dataset.from_json(rows_file)
    rows = rows.map(
        scored, fn_kwargs={"reference": reference, "tokenizer": tokenizer}, remove_columns=rows.column_names
    )
    trainer = SelectiveSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        args=SFTConfig(
            out,
            num_train_epochs=1,
            per_device_train_batch_size=2,
            packing=True,
            max_length=64,
            completion_only_loss=True,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        selector=Selector("excess", ratio=0.6),
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
