"""The evidence: what makes a run the same run, runs that go on after an interruption, and what the tables say."""

import json
import re
import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from evidence import SECONDS, Experiment, Identity, load_experiment
from evidence_page import RECIPES, command, ranking, write_page
from evidence_ranking import chance
from evidence_results import Runs, at_equal, difference, over_seeds, read_lines, to_target
from evidence_summary import introduction

from conftest import example_records, write_jsonl
from rho import evaluate, score, train
from rho.config import load_config
from rho.errors import ConfigError
from rho.suites import tasks_of

STEPS = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, architecture) -> Path:
    """A recipe whose texts are looked for in ../shared/data."""
    folder = tmp_path_factory.mktemp("evidence")
    for seed, (name, number) in enumerate({"curated": 30, "noisy": 60, "target": 10, "test": 20}.items()):
        (folder / "texts").mkdir(exist_ok=True)
        write_jsonl(folder / "texts" / f"{name}.jsonl", example_records(number, seed))
    places = {name: f"../shared/data/{name}.jsonl" for name in ("curated", "noisy", "target", "test")}
    held_out = {"block_length": 16, "heldout_fraction": 1.0}
    tree = {
        "name": "toy",
        "tokenizer": {"vocab_size": 300, "corpora": ["curated", "noisy"]},
        "corpora": {
            "curated": {"sources": [places["curated"]], "block_length": 16},
            "noisy": {"sources": [places["noisy"]], "block_length": 16, "shard_blocks": 60},
            "mixed": {"sources": [places["curated"], places["noisy"]], "block_length": 16},
            "target": {"sources": [places["target"]], **held_out},
            "test": {"sources": [places["test"]], **held_out},
        },
        "model": {"architecture": architecture},
        "references": {
            "reference": {"corpus": "curated", "arguments": STEPS},
            "second": {"corpus": "curated", "after": "slm", "arguments": STEPS},
        },
        "corpus": "noisy",
        "target": "target",
        "train": {
            "arms": {
                "clm": {},
                "slm": {"ratio": 0.6, "references": {"names": ["reference"]}},
                "mixed": {"corpus": "mixed"},
                "later": {"after": "slm", "corpus": "curated", "arguments": {"max_steps": 2}},
            },
            "seeds": [0, 1],
            "arguments": STEPS,
        },
        "evaluate": {"sets": ["target", "test"]},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "toy.yaml"


def load(recipe: Path, *overrides: str, texts: str = "texts"):
    return load_experiment(recipe, str(recipe.parent / texts), overrides)


def identities(config) -> dict[str, str]:
    return {arm: Identity(config).run(arm, 0) for arm in config.train.arms}


def test_texts_are_looked_for_in_the_folder_given(recipe):
    assert load_experiment(recipe, None, []) == load_config(recipe)
    assert load(recipe).corpora["mixed"].sources == [
        f"{recipe.parent}/texts/{name}.jsonl" for name in ("curated", "noisy")
    ]


def test_the_recipe_for_texts_of_ones_own_takes_them_from_the_folder_given(tmp_path):
    config = load_experiment(RECIPES / "evidence-own.yaml", str(tmp_path), [])
    assert {name: one.sources for name, one in config.corpora.items()} == {
        "curated": [f"{tmp_path}/curated"],
        "noisy": [f"{tmp_path}/noisy"],
        "target": [f"{tmp_path}/heldout"],
    }
    assert list(config.train.arms) == ["clm", "slm", "random"]
    assert command("evidence.py", "evidence-own") == "python benchmarks/evidence.py FOLDER --size own"


def test_the_folder_given_may_have_any_name():
    config = load_experiment(RECIPES / "evidence-smoke.yaml", "my-texts/sub", [])
    assert config == load_config(RECIPES / "evidence-smoke.yaml")  # its texts are in no folder
    config = load_experiment(RECIPES / "evidence-small.yaml", 'my-texts/"a"', [])
    assert config.corpora["curated"].sources == ['my-texts/"a"/reference/train.jsonl.gz']


def test_a_run_is_the_same_wherever_its_texts_are_and_whatever_other_arms_do(recipe):
    shutil.copytree(recipe.parent / "texts", recipe.parent / "moved")
    before = identities(load(recipe))
    assert identities(load(recipe, texts="moved")) == before
    assert (
        identities(load(recipe, "corpora.noisy.shard_blocks=7", "train.arms.more={ratio: 0.1}")).items()
        > before.items()
    )
    assert len({*before.values(), Identity(load(recipe)).run("clm", 1)}) == 5


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train.arms.mixed.arguments.max_steps=5", {"mixed"}),
        ("train.arms.slm.ratio=0.3", {"slm", "later", "clm"}),  # the second reference goes on after it
        ("references.reference.arguments.max_steps=3", {"clm", "slm", "later"}),
        ("score.dtype=float32", {"clm", "slm", "later"}),
        ("corpora.test.max_tokens=100", {"clm", "slm", "mixed", "later"}),
        ("model.architecture.hidden_size=32", {"clm", "slm", "mixed", "later"}),
    ],
)
def test_what_decides_a_run_makes_it_another_run(recipe, override, changed):
    before, after = identities(load(recipe)), identities(load(recipe, override))
    assert {arm for arm in before if before[arm] != after[arm]} == changed


def test_a_text_that_changed_makes_another_run(recipe):
    shutil.copytree(recipe.parent / "texts", recipe.parent / "edited")
    write_jsonl(recipe.parent / "edited" / "curated.jsonl", example_records(31, 0))
    before, after = identities(load(recipe)), identities(load(recipe, texts="edited"))
    assert all(before[arm] != after[arm] for arm in before)  # the tokenizer is trained on it


INTERRUPTED = [(train.SelectiveTrainer, "training_step", 3), (score, "write_shard", 2), (evaluate, "block_losses", 2)]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is heard; a shell's background jobs are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_the_experiment_goes_on_where_it_was_stopped_and_records_every_run_once(recipe, tmp_path, monkeypatch):
    """Stopped as its time limit does it, by a Ctrl-C from within."""
    config = load(recipe)
    Experiment(config, tmp_path / "whole", tmp_path / "whole.jsonl").run(list(config.train.arms))
    for place, name, at in INTERRUPTED:
        calls = 0
        original = getattr(place, name)

        def stopped(*arguments, original=original, at=at, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                signal.raise_signal(signal.SIGINT)
            return original(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, stopped)
            Experiment(config, tmp_path / "parts", tmp_path / "parts.jsonl").run(list(config.train.arms))
    for arms in (["later"], list(config.train.arms), ["clm"]):
        Experiment(config, tmp_path / "parts", tmp_path / "parts.jsonl").run(arms)
    whole, parts = (
        sorted(read_lines(tmp_path / f"{n}.jsonl"), key=lambda r: (r["model"], r["seed"])) for n in ("whole", "parts")
    )
    assert [(run["model"], run["seed"]) for run in parts] == [
        *((arm, seed) for arm in ("clm", "later", "mixed") for seed in (0, 1)),
        ("reference", 0),
        ("reference-second", 0),
        *(("slm", seed) for seed in (0, 1)),
    ]
    for one, other in zip(whole, parts, strict=True):
        for line in (one, other):
            assert line["curve"].pop("seconds")[-1] > 0
            selective = line["model"] in ("slm", "later")
            for key in ("reference_seconds", "scoring_seconds"):
                assert set(line.pop(key, ())) == ({"reference"} if selective else set())
            for name in ("reference", "second"):
                line["hashes"].pop(f"scores:{name}", None)  # they name the reference by its folder
        assert one == other
    assert len(list((tmp_path / "parts" / "train").glob("*/checkpoints"))) == 0
    assert "slm" in page_of(read_lines(tmp_path / "parts.jsonl"), tmp_path)


def steps(folder: Path, seconds: float) -> None:
    folder.mkdir(parents=True)
    line = {"step": 1, SECONDS: seconds}
    (folder / "steps.jsonl").write_text(json.dumps(line) + "\n")


def test_a_reference_costs_all_that_it_goes_on_after_but_nothing_twice(recipe, tmp_path):
    after = "references.third={corpus: curated, after: later}"
    config = load(recipe, "train.arms.more={ratio: 0.5, references: {names: [second, third]}}", after)
    experiment = Experiment(config, tmp_path, tmp_path / "toy.jsonl")
    assert experiment.selected_by(["clm", "mixed"]) == set()
    assert experiment.selected_by(["more"]) == {"second", "third", "reference"}
    for power, name in enumerate(["train/slm-seed0", "train/later-seed0", *(f"reference{n}" for n in ("", "-second"))]):
        steps(tmp_path / name, 10.0**power)
    steps(tmp_path / "reference-third", 1e4)
    names = ["reference", "second", "third"]
    found = experiment.reference_seconds(names, counted=[])
    assert found == {"reference": 100.0, "second": 1001.0, "third": 10010.0}
    assert experiment.reference_seconds(["third"], counted=[]) == {"third": 10011.0}  # slm, later, and itself
    found = experiment.reference_seconds(names[1:], counted=[tmp_path / "train" / "slm-seed0"])
    assert found == {"second": 1000.0, "third": 10010.0}


def test_an_arm_that_the_recipe_has_not_is_named(recipe, tmp_path):
    with pytest.raises(ConfigError, match="no arm slmm in toy; found clm, slm, mixed, later"):
        Experiment(load(recipe), tmp_path / "run", tmp_path / "toy.jsonl").run(["clm", "slmm"])
    assert not (tmp_path / "run").exists()


def test_a_page_is_of_one_experiments_runs_alone(recipe, tmp_path):
    experiments = [
        Experiment(load(recipe, o), tmp_path, tmp_path / "toy.jsonl") for o in ("name=a", "train.arms.slm.ratio=0.3")
    ]
    runs = [("mixed", 0), ("slm", 1)]
    lines = [
        {"model": arm, "seed": seed, "identity": one.identity.run(arm, seed)}
        for one in experiments
        for arm, seed in runs
    ]
    lines.append({"model": "reference", "seed": 0, "identity": experiments[0].identity.reference("reference")})
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixed, slm, same, other, reference = lines
    assert experiments[0].lines() == [mixed, slm, same, reference]
    assert experiments[1].lines() == [mixed, same, other, reference]


def test_a_run_on_record_is_not_done_again_on_another_machine(recipe, tmp_path):
    config = load(recipe)
    line = {"model": "mixed", "identity": None}
    lines = [{**line, "seed": seed, "identity": Identity(config).run("mixed", seed)} for seed in (0, 1)]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Experiment(config, tmp_path / "run", tmp_path / "toy.jsonl").run(["mixed"])
    assert not (tmp_path / "run").exists()


def run(model: str, seed: int, losses: list[float], **more) -> dict:
    """A record by hand: 100 tokens, 50 of them selected, and 10 seconds to each checkpoint."""
    steps = range(1, len(losses) + 1)
    nats = [losses[-1] * 10, losses[-1] * 20 + seed]
    return {
        "experiment": "evidence-toy",
        "target": "target",
        "model": model,
        "seed": seed,
        "parameters": 1000,
        "train_tokens": 100 * len(losses),
        "ratio": 0.5,
        "curve": {
            "tokens": [100 * n for n in steps],
            "selected": [50 * n for n in steps],
            "seconds": [10.0 * n for n in steps],
            "loss": losses,
        },
        "final": {name: {"loss": losses[-1], "bits_per_byte": 1.0} for name in ("test-a", "general", "test-b")},
        "units": {name: {"nats": nats, "tokens": [10, 20]} for name in ("test-a", "general", "test-b")},
        "settings": {},
        "hashes": {"corpus": "c" * 64},
        "environment": {"device": "machine", "threads": 1},
        "clock": "CPU time",
        **more,
    }


def page_of(lines: list[dict], folder: Path) -> str:
    return write_page(lines, folder).read_text()


def test_what_it_takes_to_reach_the_baselines_loss():
    base = run("clm", 0, [5.0, 4.0, 3.0, 2.0])
    fast = run("slm", 0, [4.0, 1.0], reference_seconds={"a": 6.0}, scoring_seconds={"a": 4.0})
    found = to_target(fast, base)  # two thirds of the way from the first checkpoint to the second
    share = (1 + 2 / 3) / 4
    assert found == pytest.approx({"tokens": share, "selected": share, "seconds": share, "all": share + 10 / 40})
    assert to_target(run("slow", 0, [5.0, 2.1]), base) is None


def test_plain_training_may_be_at_its_final_loss_before_its_end():
    """It is there after two of its four checkpoints; the other after one."""
    base, fast = run("clm", 0, [5.0, 3.0, 2.9, 3.0]), run("slm", 0, [3.0, 1.0], reference_seconds={"a": 5.0})
    assert to_target(fast, base) == pytest.approx({"tokens": 0.5, "selected": 0.5, "seconds": 0.5, "all": 15 / 20})


def test_seconds_of_different_machines_are_not_compared(tmp_path):
    base, costs = run("clm", 0, [5.0, 4.0, 3.0, 2.0]), {"reference_seconds": {"a": 9.0}, "scoring_seconds": {"a": 1.0}}
    here, there = (run("slm", seed, [2.0, 1.0], **costs) for seed in (0, 1))
    there["environment"] = {"device": "another machine", "threads": 1}
    other = run("clm", 1, [5.0, 4.0, 3.0, 2.0])
    assert to_target(here, base) == pytest.approx({"tokens": 0.25, "selected": 0.25, "seconds": 0.25, "all": 0.5})
    assert to_target(there, other) == pytest.approx({"tokens": 0.25, "selected": 0.25})
    assert at_equal(there, other) == {"selected": 1.0 - 4.0, "seconds": None, "all": None}
    page = page_of([base, here, other, there], tmp_path)
    assert "| slm | ≤ 0.25 | ≤ 0.25 | ≤ 0.25 | ≤ 0.50 | -3.000 | - | - |" in page
    assert "0.50 (slm, 1 seed)" in page and "0.25 (slm, 2 seeds)" in page
    assert "| slm | ≤ 0.25 | ≤ 0.25 | - | - |" in page_of([other, there], tmp_path)


def test_an_arm_that_goes_on_after_another_has_no_share(tmp_path):
    """It may have been there in the arm before."""
    lines = [run("clm", 0, [5.0, 4.0]), run("later", 0, [3.0, 2.0], settings={"after": "clm", "corpus": "curated"})]
    assert "| later | - | - | - | - |" in page_of(lines, tmp_path)


def test_the_interval_over_seeds_is_students():
    assert over_seeds([1.0, 2.0]) is None
    assert over_seeds([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    assert over_seeds([0.0, 2.0] * 20) == pytest.approx(2.262 * statistics.stdev([0.0, 2.0] * 20) / 40**0.5)


def test_arms_stand_from_the_best_to_the_worst_seed_by_seed(tmp_path):
    lines = [run("clm", seed, [5.0 - seed]) for seed in (0, 1)]
    lines += [run("worse", seed, [5.5 - seed]) for seed in (0, 1)] + [run("better", 0, [4.9])]
    lines = [*lines[2:], *lines[:2], run("reference", 0, [1.0])]
    assert Runs(lines).ranked() == ["clm", "better", "worse"]
    heads = [row.split(" | ")[0] for row in page_of(lines, tmp_path).splitlines() if row.count(" | ") == 6]
    assert heads[:4] == ["| arm", "| clm", "| better", "| worse"]


def test_the_introduction_has_its_arms_with_all_their_seconds():
    lines = [run("clm", seed, [5.0, 4.0]) for seed in (0, 1)] + [run("other", 0, [5.0, 4.0])]
    lines.append(run("slm-06", 0, [4.5, 3.5], reference_seconds={"a": 6.0}, scoring_seconds={"a": 4.0}))
    rows = [line for line in introduction(Runs(lines)).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| arm", "| clm", "| slm-06"]
    assert rows[2].endswith("| 3.50 | -0.50 | 3.50 | 30 |")
    page = introduction(Runs(lines), Runs([*lines[:2], run("slm-04-step", 0, [5.0, 3.25])]))
    assert "the paper's 0.6 (-0.500)" in page and "kept nearly all (-0.750, 1 seed)" in page and "(not run)" in page


def test_a_curve_that_begins_below_the_goal_gives_an_upper_bound(tmp_path):
    lines = [run("clm", 0, [5.0, 4.0]), run("later", 0, [3.0, 2.0]), run("reached", 0, [4.5, 3.5])]
    page = page_of(lines, tmp_path)
    assert "| later | ≤ 0.50 | ≤ 0.50 | ≤ 0.50 | ≤ 0.50 |" in page
    assert "| reached | 0.75 | 0.75 | 0.75 | 0.75 |" in page
    assert "--size PATH/OF/THE/RECIPE/OF/evidence-toy.yaml" in page  # there is no such recipe in recipes/


def test_one_seed_that_begins_below_the_goal_makes_the_mean_a_bound(tmp_path):
    lines = [run(arm, seed, losses) for arm, of in CURVES.items() for seed, losses in enumerate(of)]
    assert "| slm | ≤ 0.62 (0.50-0.75) | ≤ 0.62 (0.50-0.75) |" in page_of(lines, tmp_path)


CURVES = {"clm": [[5.0, 4.0], [5.0, 4.0]], "slm": [[3.0, 2.0], [4.5, 3.5]]}


@pytest.mark.parametrize("sets", [("test-a", "general", "test-b"), ("test-a",), ("test-a", "noisy", "general")])
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(tmp_path, sets):
    lines = [run(arm, seed, losses) for arm, of in CURVES.items() for seed, losses in enumerate(of)]
    for line in lines:
        line["final"] = dict.fromkeys(sets, line["final"]["general"])
        line["units"] = dict.fromkeys(sets, line["units"]["general"])
    tables = [part.splitlines() for part in page_of(lines, tmp_path).split("\n\n") if part.startswith("|")]
    assert len(tables) >= 6
    assert all(len({row.count("|") for row in table}) == 1 for table in tables)


def test_an_arm_may_be_done_before_plain_training(tmp_path):
    page = page_of([run("slm", 0, [4.0, 1.0])], tmp_path)
    assert "| slm | - |  |  |  | - | - | - |" in page


def test_losses_at_equal_cost():
    base = run("clm", 0, [5.0, 4.0, 3.0, 2.0])
    cheap = run("slm", 0, [4.0, 1.0], reference_seconds={"a": 20.0}, scoring_seconds={"a": 5.0})
    assert at_equal(cheap, base) == pytest.approx({"selected": 1.0 - 4.0, "seconds": 1.0 - 2.0, "all": 2.5 - 2.0})
    dear = run("slm", 0, [4.0, 1.0], reference_seconds={"a": 31.0})
    assert at_equal(dear, base)["all"] is None  # no checkpoint that early


def test_a_difference_is_the_mean_over_the_seeds_of_all_tokens():
    pairs = [(run("slm", seed, [2.0 + seed]), run("clm", seed, [3.0])) for seed in (0, 1)]
    found = difference(pairs, ["test-a", "test-b"])
    assert found is not None
    assert found[0] == pytest.approx(-0.5)
    assert found[1] <= found[0] <= found[2]
    assert difference([], ["test-a"]) is None


def test_the_page_has_every_arm_the_reference_and_the_latest_of_two_runs(tmp_path):
    lines = [run("reference", 0, [1.5]), *(run("clm", seed, [5.0, 4.0]) for seed in (0, 1))]
    lines += [run("random", seed, [5.0, 4.5], settings={"score": "random", "ratio": 0.6}) for seed in (0, 1)]
    lines += [run("slm", seed, [4.5, 9.0 if again else 3.5]) for again in (1, 0) for seed in (0, 1)]
    page = page_of(lines, tmp_path)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in page.split("By set")[0].splitlines()}
    assert rows["clm"][1:3] == ["4.0167", "-"]  # seed 1 has a nat more in its 60 tokens
    assert rows["slm"][1].startswith("3.5167")
    assert (rows["slm"][3], rows["slm"][4]) == ("-0.500 -0.500", "-1.000 -1.000")
    assert rows["reference"][1] == "1.5000" and rows["reference"][3] == "-2.500 -2.533"
    assert "| random | reached by 0 of 2 |" in page
    assert "| random | 60% of each sequence, drawn at random | the noisy corpus | 0.0002 |" in page
    assert "| slm | 0.75 | 0.75 | 0.75 | 0.75 |" in page
    assert (tmp_path / "evidence-toy.svg").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "plain training"),
        (
            {"ratio": 0.4, "scope": "step", "references": {"names": ["a"]}},
            "40% of each step, highest excess loss against a",
        ),
        ({"after": "clm", "corpus": "curated"}, "`clm`, then plain training"),
        ({"weighting": "softmax"}, "all tokens, weighted (softmax) by highest excess loss"),
        (
            {"ratio": 0.7, "score": "ref_loss", "second": {"score": "ref_entropy", "ratio": 0.7}},
            "70% of each sequence, lowest reference loss, and what lowest reference entropy keeps as well",
        ),
    ],
)
def test_an_arm_is_said_in_words(tmp_path, settings, words):
    page = page_of([run("clm", 0, [5.0, 4.0]), run("arm", 0, [4.0, 3.0], settings=settings)], tmp_path)
    assert f"| arm | {words} | {settings.get('corpus', 'the noisy corpus')} | 0.0002 |" in page
    assert "loss below random's for every seed | all arms | not run yet |" in page


def test_settings_stand_side_by_side_over_the_seeds_that_their_arms_share(tmp_path):
    lines = [run("clm", seed, [5.0 + seed]) for seed in (0, 1, 2)]
    lines += [run("slm-06", seed, [4.0]) for seed in (0, 1, 2)]
    assert "side by side" not in page_of(lines, tmp_path)
    lines += [run("slm-05", seed, [3.0]) for seed in (0, 1)]
    lines += [run("soft", 2, [3.0])]
    lines[-1]["units"] |= {"general": {"nats": [80, 162], "tokens": [10, 20]}}  # one more a token than CLM's
    page = page_of(lines, tmp_path)
    assert "less CLM on `test` / `general`, means" in page
    rows = [row for row in page.splitlines() if re.match(r"\| .* \(\d seeds?\) \|", row)]
    assert rows == [
        "| share of each sequence (2 seeds) | slm-06 -1.500 / -1.500<br>slm-05 -2.500 / -2.500 |",
        "| weights (1 seed) | slm-06 -3.000 / -3.000<br>soft -4.000 / +1.000 |",
    ]


def test_a_recipe_says_what_its_arms_were_trained_on(tmp_path):
    """That of small-mixed has the mix as its corpus; a recipe of one's own is not looked for."""
    usual, own = run("clm", 0, [5.0, 4.0], experiment="evidence-small-mixed"), run("clm", 0, [5.0, 4.0])
    later = run("later", 0, [3.0, 2.0], settings={"corpus": "curated"})
    assert "| clm | plain training (CLM) | mixed |" in page_of([usual], tmp_path)
    page = page_of([own, later], tmp_path)
    assert "(CLM) | the noisy corpus |" in page and "| curated |" in page


def test_what_guessing_gives_is_that_of_the_questions_asked(tmp_path):
    [task] = [task for task in tasks_of("general") if task.name == "arc_easy"]
    write_jsonl(tmp_path / task.path, [{"choices": ["x"] * number} for number in (2, 4, 5, 5)])
    assert chance(task, tmp_path, limit=2) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert chance(task, tmp_path, limit=9) == pytest.approx((1 / 2 + 1 / 4 + 2 / 5) / 4)


def test_the_table_of_rankings_compares_means_over_the_tasks_seed_by_seed():
    def asked(model: str, seed: int, *values: float) -> dict:
        rows = [
            {"title": title, "value": value, "stderr": 0.02, "chance": chance}
            for title, value, chance in zip(("ARC-E", "PIQA"), values, (0.25, 0.5), strict=True)
        ]
        return {"experiment": "evidence-toy", "model": model, "seed": seed, "questions": 500, "rows": rows}

    page = ranking(
        [
            asked("clm", 0, 0.3, 0.5),
            asked("clm", 1, 0.2, 0.6),
            asked("slm", 0, 0.9, 0.7),  # done again
            asked("slm", 1, 0.3, 0.5),
            asked("slm", 0, 0.4, 0.5),
        ]
    )
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows == [
        "| arm | ARC-E | PIQA | mean | less CLM, each seed |",
        "| guessing | 25.0% | 50.0% | 37.5% | - |",
        "| clm | 25.0% | 55.0% | 40.0% | - |",
        "| slm | 35.0% | 50.0% | 42.5% | +5.0% +0.0% |",
    ]
    assert "is 2.0%,\nthat of the mean over the tasks 1.4%: a difference of two models of less than 3.9% says" in page
    assert "benchmarks/evidence_ranking.py --size" in page and "task, means over the seeds." in page
    assert "task, seed 1." in ranking([asked("clm", 1, 0.2, 0.6)])
    assert "can be told from guessing" not in page  # `slm` is 5 % above it, 3.5 standard errors
    assert "No model's mean can be told from guessing." in ranking([asked("clm", 0, 0.27, 0.53)])
