"""Fine-tuning on answers of which some are wrong: the benchmark's data, and its recipe from end to end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from conftest import write_jsonl
from rho import pipeline
from rho.config import load_config
from rho.corpus import Corpus
from rho.errors import ConfigError
from rho.models import ModelConfig, make_model
from rho.objective import IGNORE_INDEX
from rho.rows import read_rows
from rho.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load(ROOT / "benchmarks" / "sft.py")


def pairs(number: int, first: int = 0) -> list[dict]:
    return [{"id": str(n), "prompt": f"{n} and {n}?", "completion": f" It is {2 * n}."} for n in range(first, number)]


def test_a_share_of_the_answers_is_another_questions_and_labelled_so(benchmark: ModuleType) -> None:
    right = pairs(50)
    mixed = benchmark.with_wrong_answers(right, 0.3, seed=1)
    wrong = [n for n, (a, b) in enumerate(zip(right, mixed, strict=True)) if a["completion"] != b["completion"]]
    assert len(wrong) == 15
    assert sorted(one["completion"] for one in mixed) == sorted(one["completion"] for one in right)
    for n, one in enumerate(mixed):
        [[start, end, label]] = one["spans"]
        assert label == ("corrupted" if n in wrong else "clean")
        assert (one["prompt"] + one["completion"])[start:end] == one["completion"]
        assert one["prompt"] == right[n]["prompt"]


def test_a_problem_is_cut_into_question_and_answer(benchmark: ModuleType) -> None:
    found = benchmark.question_and_answer({"id": "a", "text": "Problem: 1 + 1?\nSolution: It is 2.\nThe answer is 2."})
    assert found == {
        "id": "a",
        "prompt": "Problem: 1 + 1?\nSolution:",
        "completion": " It is 2.\nThe answer is 2.",
    }


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, benchmark: ModuleType, tokenizer_folder: Path, architecture: dict
) -> Path:
    """The recipe, with a tiny model, a few questions and two steps."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = Tokenizer.load(tokenizer_folder)
    make_model(ModelConfig(architecture=architecture), tokenizer.vocab_size).save_pretrained(folder / "base")
    tokenizer.save(folder / "base")
    tree = yaml.safe_load((ROOT / "recipes" / "sft.yaml").read_text())
    tree["tokenizer"]["path"] = str(tokenizer_folder)
    data = {"clean": pairs(40), "mixed": benchmark.with_wrong_answers(pairs(80, 40), 0.3, 0), "heldout": pairs(99, 80)}
    for name, records in data.items():
        tree["corpora"][name] |= {"sources": [str(write_jsonl(folder / f"{name}.jsonl", records))], "block_length": 32}
    tree["model"]["path"] = tree["references"]["base"]["path"] = str(folder / "base")
    steps = {"max_steps": 3, "save_steps": 1, "warmup_steps": 0, "logging_steps": 1}
    for section in (tree["references"]["reference"], tree["train"]):
        section["arguments"] |= steps
    tree["train"] |= {"seeds": [0], "allow_weak_reference": True}
    tree["train"]["arms"]["history"]["references"]["history"]["every"] = 1
    tree["dynamics"] = {"set": "heldout"}
    (folder / "sft.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    pipeline.run(load_config(folder / "sft.yaml"), folder / "run")
    return folder / "run"


def test_the_recipe_runs_every_arm_to_a_report_that_counts_answers_alone(finished: Path) -> None:
    summary = json.loads((finished / "report" / "summary.json").read_text())
    assert set(summary["arms"]) == {"clm", "random", "excess", "static", "history"}
    target = Corpus(finished / "corpus" / "heldout", "validation")
    answers = sum(
        int((target.inputs(target.row(b, target.reads))["labels"] != IGNORE_INDEX).sum()) for b in range(len(target))
    )
    for arm, seeds in summary["arms"].items():
        share = seeds["0"]["label_share"]
        assert set(share) == {"clean", "corrupted"}
        if arm == "clm":
            assert share == {"clean": 1.0, "corrupted": 1.0}
        else:
            assert seeds["0"]["mean_ratio"] == pytest.approx(0.7, abs=0.1)
        [*_, row] = (finished / "evaluate" / f"{arm}-seed0" / "losses.jsonl").read_text().splitlines()
        assert json.loads(row)["tokens"] == answers


def test_prompts_are_shown_but_never_selected(finished: Path) -> None:
    rows = read_rows(finished / "evaluate" / "excess-seed0" / "tokens.parquet")
    text = "".join(row.text for row in rows)
    assert " and " in text
    selected = "".join(row.text for row in rows if row.selected)
    assert selected and "?" not in selected


def test_what_a_history_picked_is_not_guessed_from_its_checkpoints(finished: Path) -> None:
    from rho.dynamics import selection_of

    target = Corpus(finished / "corpus" / "heldout", "validation")
    with pytest.raises(ConfigError, match="selected by its own history"):
        selection_of([str(finished / "train" / "history-seed0")], "somewhere", target)
