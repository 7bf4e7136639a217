"""Supervised fine-tuning on answers of which 30 % are wrong: is the loss on clean ones lower with selection?

    python benchmarks/sft.py [--out FOLDER] [--set KEY=VALUE ...]      about an hour and a half on one slow core

Makes the data from ../shared/data (grade-school problems with solutions; a wrong answer is that of another problem),
trains a small base model on other problems, runs recipes/sft.yaml from it over three seeds, and writes
benchmarks/results/sft.json; `python benchmarks/write_results.py` makes docs/results.md of it. What is done already is
left alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rho.config import load_config
from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.models import ModelConfig
from rho.pipeline import run
from rho.runs import atomic_write, environment
from rho.tokenizer import Tokenizer
from rho.train import TrainConfig, train

DATA = Path("../shared/data")
HERE = Path(__file__).parent
RESULT = HERE / "results" / "sft.json"
RECIPE = HERE.parent / "recipes" / "sft.yaml"
CORRUPTED = 0.3
CLEAN, MIXED, HELD_OUT = 1600, 1200, 200  # problems for the reference, for the arms, and to measure both by
BASE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
BASE_ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "max_steps": 600,
    "learning_rate": 3e-3,
    "warmup_steps": 50,
    "save_steps": 100,
}


def records(file: Path) -> list[dict[str, Any]]:
    """The lines of a data file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def question_and_answer(record: dict[str, Any]) -> dict[str, Any]:
    """A problem as prompt, its solution as completion."""
    question, answer = record["text"].split("\nSolution: ")
    return {"id": record["id"], "prompt": f"{question}\nSolution:", "completion": f" {answer}"}


def with_wrong_answers(pairs: Sequence[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """The pairs, of which a share has changed answers with each other; every answer is labelled clean or corrupted."""
    draw = random.Random(seed)
    wrong = draw.sample(range(len(pairs)), round(share * len(pairs)))
    answer_of = dict(zip(wrong, [*wrong[1:], wrong[0]], strict=True))  # a cycle: nobody keeps his own
    found = []
    for n, pair in enumerate(pairs):
        completion, start = pairs[answer_of.get(n, n)]["completion"], len(pair["prompt"])
        label = "corrupted" if n in answer_of else "clean"
        found.append({**pair, "completion": completion, "spans": [[start, start + len(completion), label]]})
    return found


def make_data(out: Path) -> None:
    """Write base.jsonl (text), clean.jsonl, mixed.jsonl and heldout.jsonl (prompts and completions)."""
    curated = records(DATA / "reference" / "train.jsonl.gz")
    problems = [record for record in curated if record["source"] == "gsm8k_train"]
    random.Random(0).shuffle(problems)
    pairs = [question_and_answer(record) for record in problems[: CLEAN + MIXED]]
    files = {
        "base": problems[CLEAN + MIXED :],
        "clean": pairs[:CLEAN],
        "mixed": with_wrong_answers(pairs[CLEAN:], CORRUPTED, seed=0),
        "heldout": [question_and_answer(one) for one in records(DATA / "heldout" / "gsm8k.valid.jsonl.gz")[:HELD_OUT]],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        with atomic_write(out / f"{name}.jsonl") as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in found)


def make_base(out: Path) -> None:
    """Train the base model on the rest, as plain text: one that knows nothing can't see which answers are wrong."""
    tokenizer = Tokenizer.load(DATA / "tokenizers" / "slm-bpe-4k" / "tokenizer.json")
    build_corpus(CorpusConfig(sources=[str(out / "base.jsonl")], block_length=512), tokenizer, out / "base.rho")
    config = TrainConfig(arguments=BASE_ARGUMENTS)
    train(config, Corpus(out / "base.rho"), ModelConfig(architecture=BASE), out / "base")


def main() -> None:
    """Do what is left to do, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-sft"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if not (out / "mixed.jsonl").is_file():
        make_data(out)
    make_base(out)
    files = {name: f"corpora.{name}.sources=[{out / f'{name}.jsonl'}]" for name in ("clean", "mixed", "heldout")}
    places = [*files.values(), f"model.path={out / 'base'}", f"references.base.path={out / 'base'}"]
    config = load_config(RECIPE, [*places, *arguments.overrides])
    page = run(config, out / "run")
    result = {
        "environment": environment(),
        "problems": {name: sum(1 for _ in (out / f"{name}.jsonl").open()) for name in ("base", *files)},
        "corrupted": CORRUPTED,
        "base": {"architecture": BASE, **BASE_ARGUMENTS},
        "reference_steps": config.references["reference"].arguments["max_steps"],
        "steps": config.train.arguments["max_steps"],
        "rows": config.train.arguments["per_device_train_batch_size"],
        "arms": {name: arm.model_dump(mode="json", exclude_defaults=True) for name, arm in config.train.arms.items()},
        "summary": json.loads((page.parent / "summary.json").read_bytes()),
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(RESULT)


if __name__ == "__main__":
    main()
