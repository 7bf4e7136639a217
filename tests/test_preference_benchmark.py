"""The benchmark of preference training: its pairs, its counts, its measure, and a run of all of it in little."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset

from rho.selection import Selector
from test_sft import load

pytest.importorskip("trl")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_disable|_enable)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.fixture
def benchmark() -> ModuleType:
    return load(BENCHMARKS / "preference.py")


def test_the_answers_differ_in_what_is_right_and_in_words_drawn_alike(benchmark: ModuleType) -> None:
    world = benchmark.World(3)
    rows = world.pairs(300)
    names = {n: name for name, n in benchmark.ID.items()}
    mean_length = {}
    for side, values in (("chosen", world.right), ("rejected", world.error)):
        for row in rows:
            ids = row[f"{side}_ids"]
            for t, key in enumerate(row[f"{side}_key"]):
                assert key == names[ids[t]].startswith("value")
                if key:
                    assert names[ids[t]] == f"value{values[int(names[ids[t - 1]].removeprefix('thing'))]}"
            assert sum(row[f"{side}_key"]) == benchmark.FACTS and ids[-1] == benchmark.ID["<eos>"]
        mean_length[side] = sum(map(len, rows[f"{side}_ids"])) / len(rows)
    assert all(a != b for a, b in zip(world.right, world.error, strict=True))
    assert mean_length["chosen"] == pytest.approx(mean_length["rejected"], rel=0.03)


def test_precision_and_recall_are_counted_by_side(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SELECTOR", Selector("excess", 0.5))
    row = {
        "chosen_rewards": [0.1, 0.9, 0.8, 0.0],
        "chosen_key": [False, True, True, True],
        "rejected_rewards": [-1.0, -2.0, 5.0, 5.0, 5.0, -3.0],
        "rejected_key": [False, True, False, False, False, False],
    }
    found = benchmark.precision_and_recall(Dataset.from_list([row]))
    assert found == {"chosen": [1.0, 2 / 3], "rejected": [1 / 3, 1.0]}


def test_the_measure_is_the_log_probability_of_the_whole_answer(benchmark: ModuleType) -> None:
    world = benchmark.World(0)
    model, rows = benchmark.pretrained(world, 8, 2, 0), world.pairs(3)
    for row, margin in zip(rows, benchmark.margins(model, rows).tolist(), strict=True):
        sums = []
        for side in ("chosen_ids", "rejected_ids"):
            text = row["prompt_ids"] + row[side]
            logp = model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1).detach()
            sums.append(sum(float(logp[t - 1, text[t]]) for t in range(len(row["prompt_ids"]), len(text))))
        assert margin == pytest.approx(sums[0] - sums[1], abs=1e-3)


def test_a_small_run_is_recorded_once_and_makes_a_section(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = {"STEPS": 4, "PAIRS": 2, "EVERY": 1, "HELD_OUT": 6, "ORACLE": {**benchmark.ORACLE, "steps": 1, "pairs": 2}}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    steps = benchmark.pretrained
    monkeypatch.setattr(benchmark, "pretrained", lambda world, width, _, seed: steps(world, 8, 2, seed))
    out = tmp_path / "preference.jsonl"
    monkeypatch.setattr(sys, "argv", ["preference.py", "--seeds", "0", "--out", str(out)])
    benchmark.main()
    first = out.read_text()
    benchmark.main()
    assert out.read_text() == first
    tuning, seed = [json.loads(line) for line in first.splitlines()]
    assert seed["seed"] == 0 and {arm: list(of_rate) for arm, of_rate in seed["arms"].items()} == {
        arm: [str(rate) for rate in best] for arm, best in tuning["best"].items()
    }
    assert all(list(curve) == ["1", "2", "3", "4"] for of_rate in seed["arms"].values() for curve in of_rate.values())
    section = load(BENCHMARKS / "preference_results.py").preference_section([tuning, seed])
    assert "| random |" in section and "{" not in section
