"""The plain PyTorch loop and SelectiveTrainer are the same training, and every file of examples/ runs as it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import rho
from rho.corpus import Corpus
from rho.data import TrainingBlocks, collate
from rho.models import ModelConfig, make_model
from rho.selection import Selector
from rho.store import ScoreStore
from rho.trainer import SelectiveTrainer

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = [  # of Trainer's defaults on a CPU, and of what TRL and Lightning do themselves
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_disable|_enable)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]


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


@pytest.mark.parametrize(
    "name", ["selective_loss", "trainer_mixin", "compute_loss_func", "accelerate_loop", "lightning_module"]
)
def test_examples_on_a_scored_corpus_end_with_a_plain_model(
    name: str, corpus: Path, scores: Path, reference: Path, tmp_path: Path
) -> None:
    if name == "lightning_module":
        pytest.importorskip("lightning")
    load(name).main(str(corpus), str(scores), str(reference / "model"), str(tmp_path))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (reference / "model", tmp_path))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_the_weights_example_trains_on_what_weighs_something(
    reference: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    module, tokenizer = load("loss_weights"), AutoTokenizer.from_pretrained(tokenizer_folder)
    row = module.weighted({"text": "def add(a, b)", "weights": [[0, 3, 0.5], [4, 7, 2.0]]}, tokenizer)
    labels, weights = rho.split_labels(torch.tensor(row["labels"]))
    pieces = dict(zip(tokenizer.convert_ids_to_tokens(row["input_ids"]), weights.tolist(), strict=True))
    assert labels[0] == -100 and 2.0 in pieces.values() and 1.0 in pieces.values()
    model = AutoModelForCausalLM.from_pretrained(reference / "model")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": "def add(a, b):", "weights": [[0, 3, 2.0]]}, {"text": "no weights", "weights": []}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module.main(str(tmp_path / "rows.jsonl"), str(tmp_path / "model"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_trl_example_runs(reference: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    AutoModelForCausalLM.from_pretrained(reference / "model").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "Selection keeps", "completion": " what the reference finds easier."}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tmp_path / "model")
    load("trl_sft").main(str(tmp_path / "rows.jsonl"), str(reference / "model"), model, str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_preference_example_runs(reference: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    model = AutoModelForCausalLM.from_pretrained(reference / "model")
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.1)  # in the place of a training with DPO
    model.save_pretrained(tmp_path / "oracle")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "model")
    pair = {
        "prompt": "Selection keeps",
        "chosen": " what the reference finds easier.",
        "rejected": " every token there is.",
    }
    (tmp_path / "rows.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    places = [str(tmp_path / name) for name in ("rows.jsonl", "oracle", "model", "model", "out")]
    load("trl_dpo").main(*places)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "out"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_the_fsdp2_example_runs_on_two_processes(corpus: Path, scores: Path, reference: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = [EXAMPLES / "fsdp2.py", corpus, scores, reference / "model", tmp_path / "weights.safetensors"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, asked)], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "steps, loss" in done.stdout and (tmp_path / "weights.safetensors").is_file()


def test_the_torchtitan_example_sets_loss_and_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchtitan") is None:
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "stubs"))
    config = SimpleNamespace(training=SimpleNamespace(seq_len=16))
    config = load("torchtitan_config").selective(config, "noisy.rho", "scores")
    assert config.loss.build().seq_len == 16 and config.dataloader.scores == "scores"
