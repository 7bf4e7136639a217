"""Preference training with TRL on the tokens that an oracle, trained with DPO before, tells apart (SePO).

    python examples/trl_dpo.py ROWS.jsonl ORACLE BEFORE MODEL OUT

ROWS has `prompt`, `chosen` and `rejected` a line. ORACLE is a Transformers model, which may be small, after its
training with DPO; BEFORE is what it was before that; MODEL is what is trained. All have one tokenizer.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from rho import Selector
from rho.integrations.preference import score_pairs
from rho.integrations.trl_dpo import SelectiveDPOTrainer, tokenised_pairs


def main(rows_file: str, oracle_path: str, before_path: str, model_path: str, out: str) -> None:
    """Train on all pairs once with SePO's loss, and save a plain Transformers model."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    args = DPOConfig(
        out,
        num_train_epochs=1,
        per_device_train_batch_size=2,
        loss_type="sigmoid_norm",  # with reference_free SePO's loss; leave both out for DPO on the selected tokens
        beta=2.0,
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    oracle, before = (AutoModelForCausalLM.from_pretrained(path) for path in (oracle_path, before_path))
    rows = score_pairs(tokenised_pairs(Dataset.from_json(rows_file), tokenizer, args), oracle, before)
    trainer = SelectiveDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        selector=Selector("excess", ratio=0.3),
        reference_free=True,
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
