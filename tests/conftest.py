"""Tiny assets that many tests read, made by the library itself once a session. Treat them as read-only."""

import json
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: a test that asks the network fails
os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and threads that wait for a busy core spin

import pytest

from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.models import ModelConfig
from rho.score import ScoreConfig, score_corpus
from rho.tokenizer import Tokenizer, train_tokenizer
from rho.train import TrainConfig, train

SENTENCES = (
    "The shift by one is done in one function.",
    "A token that nobody predicts has no loss, so it is never selected.",
    "Straße, naïve, 東京 and 🙂 take more than one byte a character.",
    "for i in range(10): print(i, i * i)",
    "Selection keeps what the reference finds easier than the model does.",
    "1234567890 99 77 3.14159",
    "def add(a, b):\n    return a + b",
    "Sums over one known count, never a mean of means.",
)
CLOCK = ("tokens_per_second", "seconds", "cpu_seconds")  # of a step record: never the same twice
CODE = [sentence.startswith(("for", "def")) for sentence in SENTENCES]


def example_records(number: int = 60, seed: int = 0) -> list[dict]:
    """Short documents with id and source; two thirds have a `code` span around each line of code."""
    draw = random.Random(seed)
    records = []
    for n in range(number):
        text, spans = f"Document {seed}-{n}.", []
        for which in draw.choices(range(len(SENTENCES)), k=draw.randint(1, 4)):
            start = len(text) + 1
            text += "\n" + SENTENCES[which]
            if CODE[which]:
                spans.append([start, len(text), "code"])
        record = {"text": text, "id": f"doc-{n}", "source": f"site-{n % 3}"}
        records.append(record | ({"spans": spans} if n % 3 else {}))
    return records


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """60 documents (`example_records`) as JSON lines."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", example_records())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, text_file) -> Path:
    """A byte-level BPE of 300 tokens, as Hugging Face tokenizer files."""
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([str(text_file)], 300, out)
    return out / "tokenizer"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, text_file, tokenizer_folder) -> Path:
    """Folder of a packed corpus of `text_file`: blocks of 16 tokens, several train shards, a validation split."""
    out = tmp_path_factory.mktemp("corpus") / "packed"
    config = CorpusConfig(sources=[str(text_file)], block_length=16, heldout_fraction=0.2, shard_blocks=40)
    build_corpus(config, Tokenizer.load(tokenizer_folder), out)
    return out


@pytest.fixture(scope="session")
def architecture() -> dict:
    """A one-layer llama."""
    return {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }


@pytest.fixture(scope="session")
def reference(tmp_path_factory, corpus, architecture) -> Path:
    """Stage folder of a reference trained on `corpus` for a few steps: better than an untrained model."""
    out = tmp_path_factory.mktemp("reference") / "reference"
    arguments = {"per_device_train_batch_size": 8, "max_steps": 12, "learning_rate": 1e-2, "save_steps": 12}
    train(TrainConfig(arguments=arguments), Corpus(corpus), ModelConfig(architecture=architecture), out)
    return out


@pytest.fixture(scope="session")
def scores(tmp_path_factory, corpus, reference) -> Path:
    """Folder of the reference's float32 scores of `corpus`, with its loss on the validation split."""
    out = tmp_path_factory.mktemp("scores") / "scores"
    model = ModelConfig(path=str(reference))
    score_corpus(ScoreConfig(dtype="float32"), Corpus(corpus), model, out, Corpus(corpus, "validation"))
    return out
