"""The plain PyTorch loop of examples/ and SelectiveTrainer are the same training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from rho.corpus import Corpus
from rho.data import TrainingBlocks, collate
from rho.models import ModelConfig, make_model
from rho.selection import Selector
from rho.store import ScoreStore
from rho.trainer import SelectiveTrainer

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class InOrder(SelectiveTrainer):
    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def test_the_plain_loop_trains_to_the_same_losses_and_weights_as_the_trainer(
    corpus: Path, scores: Path, architecture: dict, tmp_path: Path
) -> None:
    data = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    vocab_size = Corpus(corpus).vocab_size
    plain = make_model(ModelConfig(architecture=architecture), vocab_size)
    batches = [collate([data[8 * step + i] for i in range(8)]) for step in range(6)]
    losses = load("plain_pytorch").train(plain, batches, learning_rate=1e-2)

    ours = make_model(ModelConfig(architecture=architecture), vocab_size)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(ours, Selector("excess", 0.6), args, data)
    trainer.train()
    logged = [entry["loss_selected"] for entry in trainer.state.log_history if "loss_selected" in entry]
    assert logged == pytest.approx(losses, rel=1e-5)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)


def test_the_example_runs_as_its_page_says(
    corpus: Path,
    scores: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    module = load("plain_pytorch")
    monkeypatch.setattr(
        sys, "argv", ["plain_pytorch.py", str(corpus), str(scores), str(reference / "model"), str(tmp_path)]
    )
    module.main(*sys.argv[1:])
    assert "step 0: loss" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == Corpus(corpus).vocab_size
