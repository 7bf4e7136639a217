"""A whole run, end to end: its report, freshness, one more arm, and interruption in every stage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from conftest import CLOCK, example_records, write_jsonl
from rho import cli, corpus, dynamics, evaluate, pipeline, score, tokenizer, train
from rho.config import load_config
from rho.errors import ConfigError, MismatchError, RhoError
from rho.models import ModelConfig, source_hash
from rho.runs import read_manifest

ROOT = Path(__file__).parents[1]
ARMS = {"clm": {}, "slm": {"ratio": 0.6}, "random": {"ratio": 0.6, "score": "random"}}
STEPS = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, architecture) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    sources = {
        name: str(write_jsonl(folder / f"{name}.jsonl", example_records(number, seed)))
        for seed, (name, number) in enumerate({"curated": 30, "noisy": 60, "target": 10}.items())
    }
    tree = {
        "name": "toy",
        "tokenizer": {"vocab_size": 300, "corpora": ["curated", "noisy"]},
        "corpora": {
            "curated": {"sources": [sources["curated"]], "block_length": 16},
            "noisy": {"sources": [sources["noisy"]], "block_length": 16, "heldout_fraction": 0.2, "shard_blocks": 60},
            "target": {"sources": [sources["target"]], "block_length": 16, "heldout_fraction": 1.0},
        },
        "model": {"architecture": architecture},
        "reference": {"corpus": "curated", "arguments": STEPS},
        "corpus": "noisy",
        "target": "target",
        "train": {"arms": ARMS, "seeds": [0, 1], "arguments": STEPS},
        "evaluate": {"sets": ["target", "noisy"], "explore": "noisy"},
        "dynamics": {"set": "noisy", "max_tokens": 160, "arms": ["clm", "slm"]},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(tree))
    return folder / "toy.yaml"


@pytest.fixture(scope="module")
def finished(config_file) -> Path:
    """The run directory of a run without any trouble."""
    folder = config_file.parent / "run"
    pipeline.run(load_config(config_file), folder)
    return folder


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_run_has_every_stage_and_ends_in_a_report(finished):
    arms = [f"{arm}-seed{seed}" for arm in ARMS for seed in (0, 1)]
    stages = ["tokenizer", *(f"corpus/{name}" for name in ("curated", "noisy", "target")), "reference"]
    stages += ["scores/reference", *(f"train/{arm}" for arm in arms)]
    stages += ["evaluate/reference", *(f"evaluate/{arm}" for arm in arms)]
    stages += [f"dynamics/{arm}" for arm in arms if not arm.startswith("random")]
    for stage in stages:
        assert read_manifest(finished / stage).status == "complete"
    page = (finished / "report" / "index.html").read_text()
    assert all(arm in page for arm in ARMS)
    assert 'id="dynamics"' in page and "slm, seed 0: what each checkpoint would select" in page
    assert json.loads((finished / "report" / "summary.json").read_text())
    assert load_config(finished / "config.yaml").name == "toy"


def test_every_checkpoint_of_every_arm_is_evaluated_on_every_set(finished):
    for arm in ARMS:
        lines = (finished / "evaluate" / f"{arm}-seed1" / "losses.jsonl").read_text().splitlines()
        found = [(row["arm"], row["seed"], row["step"], row["set"]) for row in map(json.loads, lines)]
        assert found == [(arm, 1, step, name) for step in (2, 4) for name in ("target", "noisy")]


def test_seeds_and_arms_give_different_models(finished):
    models = {p.read_bytes() for p in (finished / "train").glob("*/model/model.safetensors")}
    assert len(models) == 6


def test_a_second_run_says_that_all_is_fresh_and_changes_no_file(finished, config_file, monkeypatch, capsys):
    before = state(finished)
    monkeypatch.setattr(sys, "argv", ["rho", "run", str(config_file), "--out", str(finished)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    shown = capsys.readouterr()
    assert exit_.value.code in (0, None)
    assert f"every stage in {finished} is fresh: nothing to do" in shown.err
    assert shown.err.count(": fresh\n") == len(list(finished.rglob("manifest.json"))) - 1  # all but the report
    assert "done" not in shown.err
    assert state(finished) == before


def test_an_online_reference_needs_no_store(finished, config_file):
    folder = config_file.parent / "online"
    arms = ["train.arms={clm: {}, slm: {ratio: 0.6}}", "train.seeds=[0]"]
    pipeline.run(load_config(config_file, ["reference.online=true", *arms]), folder)
    assert not (folder / "scores").exists()
    inputs = read_manifest(folder / "train" / "slm-seed0").inputs
    assert inputs["reference"] == read_manifest(finished / "scores" / "reference").inputs["reference"]


def test_stages_can_be_run_one_by_one(finished, config_file):
    folder = config_file.parent / "one-by-one"
    config = load_config(config_file, ["train.seeds=[0]"])
    for stage in ("corpus", "reference", "scores/reference", "train/slm-seed0", "train", "evaluate", "dynamics"):
        assert pipeline.run(config, folder, [stage]) == folder
        if stage == "train/slm-seed0":
            assert [path.name for path in (folder / "train").iterdir()] == ["slm-seed0"]
    before = state(folder)
    assert pipeline.run(config, folder) == folder / "report" / "index.html"
    changed = {name for name, content in state(folder).items() if before.get(name) != content}
    assert {name.partition("/")[0] for name in changed} == {"report", "config.yaml"}
    for arm in ARMS:
        model = f"train/{arm}-seed0/model/model.safetensors"
        assert (folder / model).read_bytes() == (finished / model).read_bytes()


def test_only_reference_and_training_are_for_several_processes(config_file, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started; corpus is for one"):
        pipeline.run(load_config(config_file), tmp_path / "run")
    with pytest.raises(ConfigError, match="scores/reference is for one"):
        pipeline.run(load_config(config_file), tmp_path / "run", ["reference", "scores"])
    assert not (tmp_path / "run").exists()


def test_two_processes_train_what_one_has_prepared_and_one_goes_on(config_file):
    """As docs/full-scale.md has it; the reference is online, so that one launch does all that is for two."""
    folder = config_file.parent / "launched"
    halves = ["reference.arguments.per_device_train_batch_size=2", "train.arguments.per_device_train_batch_size=2"]
    settings = [*halves, "reference.online=true", "train.seeds=[0]", "train.arms={clm: {}, slm: {ratio: 0.6}}"]
    config = load_config(config_file, settings)
    pipeline.run(config, folder, ["corpus"])
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", pipeline.DEMO.parent / "accelerate" / "ddp.yaml", "--main_process_port", "0"]
    launch += ["--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no"]
    command = [*launch, "-m", "rho", "run", config_file, "--out", folder, "--only", "reference", "--only", "train"]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    for stage in ("reference", "train/clm-seed0", "train/slm-seed0"):
        rows = [json.loads(line) for line in (folder / stage / "steps.jsonl").read_text().splitlines()]
        assert [row["tokens_seen"] for row in rows] == [64, 128, 192, 256]  # 2 processes of 2 blocks of 16 tokens
    assert pipeline.run(config, folder).is_file()


def test_references_of_another_size_and_of_a_later_round(finished, config_file):
    """`small` has a model of its own; `later` starts from what the arm `slm` learned, with `small` as its reference."""
    tree = yaml.safe_load(config_file.read_text())
    reference = tree.pop("reference")
    small = {**tree["model"]["architecture"], "hidden_size": 8, "intermediate_size": 16}
    tree["references"] = {
        "small": {**reference, "model": {"architecture": small}},
        "later": {**reference, "after": "slm"},
    }
    weights = {"small": 1.0, "later": -0.5}
    tree["train"] |= {
        "seeds": [1],
        "allow_weak_reference": True,
        "arms": {
            "clm": {},
            "slm": {"ratio": 0.6, "references": {"names": ["small"]}},
            "mean": {"ratio": 0.6},
            "difference": {"ratio": 0.6, "references": {"combine": "weights", "weights": weights}},
        },
    }
    file = config_file.parent / "references.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    folder = config_file.parent / "references"
    pipeline.run(load_config(file), folder)
    sizes = {name: parameters(folder / f"reference-{name}") for name in tree["references"]}
    assert sizes["small"] < sizes["later"] == parameters(folder / "train" / "slm-seed1")
    made_from = {path.parent.name: read_manifest(path.parent) for path in (folder / "train").glob("*/manifest.json")}
    assert {name for name in made_from["slm-seed1"].inputs if "scores" in name} == {"scores:small"}
    assert {name for name in made_from["mean-seed1"].inputs if "scores" in name} == {"scores:small", "scores:later"}
    slm = source_hash(ModelConfig(path=str(folder / "train" / "slm-seed1")))
    assert read_manifest(folder / "reference-later").inputs["model"] == slm
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert set(summary["references"]) == {"reference-small", "reference-later"}
    assert summary["reference_loss"] == min(r["final"]["target"]["loss"] for r in summary["references"].values())
    assert set(summary["arms"]) == {"clm", "slm", "mean", "difference"}
    before = state(folder)
    pipeline.run(load_config(file), folder)
    assert state(folder) == before


def test_an_arm_on_another_corpus_and_one_that_goes_on_after_another(config_file):
    """`later` is named before the arm that it goes on after; neither `mixed` nor `later` is scored."""
    arms = "{clm: {}, later: {after: slm, corpus: curated, arguments: {max_steps: 2}}, slm: {ratio: 0.6}"
    arms += ", mixed: {corpus: both}}"
    curated, noisy = (str(config_file.parent / f"{name}.jsonl") for name in ("curated", "noisy"))
    both = f"corpora.both={{sources: [{curated}, {noisy}], block_length: 16}}"
    followed = "dynamics.arms=[slm, mixed]"
    config = load_config(config_file, [f"train.arms={arms}", both, "train.seeds=[1]", followed])
    folder = config_file.parent / "departures"
    page = pipeline.run(config, folder)
    made = {path.parent.name: read_manifest(path.parent) for path in (folder / "train").glob("*/manifest.json")}
    corpora = {name: read_manifest(folder / "corpus" / name).fingerprint for name in config.corpora}
    trained_on = {arm: made[f"{arm}-seed1"].inputs["corpus"] for arm in config.train.arms}
    asked = {"clm": "noisy", "later": "curated", "slm": "noisy", "mixed": "both"}
    assert trained_on == {arm: corpora[on] for arm, on in asked.items()}
    unscored = {arm for arm in config.train.arms if not any("scores" in name for name in made[f"{arm}-seed1"].inputs)}
    assert unscored == {"later", "mixed"}
    slm = source_hash(ModelConfig(path=str(folder / "train" / "slm-seed1")))
    assert made["later-seed1"].inputs["model"] == slm
    summary = json.loads((page.parent / "summary.json").read_text())
    seen = {arm: summary["arms"][arm]["1"]["tokens_seen"] for arm in config.train.arms}
    assert seen == {"clm": 256, "later": 256 + 128, "slm": 256, "mixed": 256}
    selected = {arm: summary["arms"][arm]["1"]["tokens_selected"] for arm in ("slm", "later")}
    assert 0 < selected["slm"] < selected["later"]
    assert "mixed" in page.read_text()
    before = state(folder)
    pipeline.run(config, folder)
    assert state(folder) == before


def parameters(stage: Path) -> int:
    return sum(weight.numel() for weight in load_file(stage / "model" / "model.safetensors").values())


DEMO_DATA = ROOT / ".." / "shared" / "data" / "demo"


@pytest.mark.skipif(not DEMO_DATA.is_dir(), reason="the recipes' texts (../shared/data/demo) are not here")
@pytest.mark.parametrize(
    "name",
    ["math-demo", "self-reference", "weak-to-strong", "iterated-reference", "selection-rules", "cross-tokenizer"],
)
def test_a_recipe_runs(tmp_path, monkeypatch, name):
    """With small models, little text and two steps; that its settings go together is what is seen here."""
    monkeypatch.chdir(ROOT)
    tree = yaml.safe_load((pipeline.DEMO.parent / f"{name}.yaml").read_text())
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    steps = {"max_steps": 2, "save_steps": 1, "warmup_steps": 0}
    for model in (tree["model"], *(one.get("model") for one in tree.get("references", {}).values())):
        if model is not None:
            model["architecture"] |= small
    for section in (*tree.get("references", {}).values(), tree.get("reference", tree["train"]), tree["train"]):
        section["arguments"] = section["arguments"] | steps
    for corpus_ in tree["corpora"].values():
        corpus_["max_tokens"] = 4000
    tree["train"]["allow_weak_reference"] = True
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    config = load_config(tmp_path / "recipe.yaml")
    assert pipeline.run(config, tmp_path / "run").is_file()
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert set(summary["arms"]) == set(config.train.arms)


class Interrupt:
    """Raise KeyboardInterrupt, once, at the call number `at` of a function."""

    def __init__(self, at: int) -> None:
        self.at, self.calls, self.done = at, 0, False

    def __call__(self, function):
        def wrapped(*arguments, **options):
            self.calls += 1
            if self.calls == self.at and not self.done:
                self.done = True
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return wrapped


INTERRUPTED = [  # where, what, at which call
    (tokenizer.Tokenizer, "save", 1),
    (corpus, "write_shard", 2),
    (train.SelectiveTrainer, "training_step", 3),  # the reference's: between its checkpoints
    (train, "save_model", 1),
    (score, "write_shard", 2),
    (train.SelectiveTrainer, "training_step", 4),  # an arm's
    (train.SelectiveTrainer, "_save_checkpoint", 1),
    (train, "save_model", 1),
    (evaluate, "block_losses", 3),
    (evaluate, "_write_tokens", 1),
    (dynamics, "_losses_of", 2),
    (pipeline, "write_report", 1),
]


def test_a_run_interrupted_in_every_stage_ends_like_one_that_was_not(finished, config_file, monkeypatch, capsys):
    folder = config_file.parent / "interrupted"
    config = load_config(config_file, ["train.seeds=[0]", "evaluate.token_blocks=2"])
    for place, name, at in INTERRUPTED:
        interrupt = Interrupt(at)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupt(getattr(place, name)))
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(config, folder)
        assert interrupt.done
    pipeline.run(config, folder)
    assert "going on from step 2" in capsys.readouterr().err
    compared = 0
    for path in sorted(folder.rglob("*")):
        if path.name == "blocks.parquet":  # it names the models by their folders
            here, there = (pq.read_table(run / path.relative_to(folder)).drop("model") for run in (folder, finished))
            assert here.equals(there), path
        elif path.suffix in (".parquet", ".safetensors") and path.name != "tokens.parquet":
            assert path.read_bytes() == (finished / path.relative_to(folder)).read_bytes(), path
            compared += 1
    assert compared > 10
    for arm in ARMS:
        for name in ("steps.jsonl", "losses.jsonl"):
            stage = "train" if name == "steps.jsonl" else "evaluate"
            rows = [
                [json.loads(line) for line in (run / stage / f"{arm}-seed0" / name).read_text().splitlines()]
                for run in (folder, finished)
            ]
            for row in rows[0] + rows[1]:
                for key in ("model", *CLOCK):
                    row.pop(key, None)
            assert rows[0] == rows[1]


def test_an_arm_that_was_given_up_halfway_does_not_stop_the_others(config_file, monkeypatch):
    folder = config_file.parent / "given-up"
    one_seed = ["train.seeds=[0]", "train.arguments.max_steps=2", "reference.arguments.max_steps=2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        step = train.SelectiveTrainer.training_step
        patch.setattr(train.SelectiveTrainer, "training_step", Interrupt(4)(step))  # the first arm's second
        pipeline.run(load_config(config_file, one_seed), folder)
    config = load_config(config_file, one_seed)
    rest = config.model_copy(
        update={
            "train": config.train.model_copy(update={"arms": {"random": config.train.arms["random"]}}),
            "dynamics": None,
        }
    )
    assert pipeline.run(rest, folder).is_file()
    assert read_manifest(folder / "train" / "random-seed0").status == "complete"


def test_one_more_arm_trains_that_arm_only(finished, config_file):
    before = state(finished)
    more = ["train.arms.slm30.ratio=0.3", "train.seeds=[0, 1]"]
    pipeline.run(load_config(config_file, more), finished)
    after = state(finished)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name.split("/")[0] for name in changed} == {"train", "evaluate", "report", "config.yaml"}
    assert all("/slm30-seed" in name for name in changed if name.startswith(("train/", "evaluate/")))
    assert before.keys() <= after.keys()
    assert "slm30" in (finished / "report" / "index.html").read_text()


def test_a_run_is_still_fresh_when_it_was_moved_and_its_checkpoints_were_deleted(finished, config_file):
    moved = config_file.parent / "moved"
    shutil.copytree(finished, moved)
    for checkpoints in moved.glob("train/*/checkpoints"):
        shutil.rmtree(checkpoints)
    for report in ("report/index.html", "report/summary.json", "report/manifest.json"):
        (moved / report).unlink()
    before = state(moved)
    pipeline.run(load_config(config_file), moved)
    made = {name for name, content in state(moved).items() if before.get(name) != content}
    assert {name.split("/")[0] for name in made} == {"report", "config.yaml"}


def test_the_report_shows_the_arms_of_the_config_only(finished, config_file):
    folder = config_file.parent / "fewer"
    shutil.copytree(finished, folder)
    config = load_config(config_file, ["train.seeds=[1]", "train.arms={clm: {}, slm: {ratio: 0.6}}"])
    pipeline.run(config, folder)
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert {arm: list(seeds) for arm, seeds in summary["arms"].items()} == {"clm": ["1"], "slm": ["1"]}
    assert "random" not in (folder / "report" / "index.html").read_text().partition("<details>")[0]


def test_a_weak_reference_is_refused_before_anything_is_trained(config_file):
    folder = config_file.parent / "weak"
    config = load_config(config_file, ["reference.arguments.learning_rate=1e-9"])
    with pytest.raises(MismatchError, match=r"selects noise.*allow.weak.reference"):
        pipeline.run(config, folder)
    assert not (folder / "train").exists()
    assert load_config(folder / "config.yaml") == config  # the config is there from the start


def test_a_file_is_no_run_directory(config_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RhoError, match=r"file: the folder can't be made \(it is a file\)"):
        pipeline.run(load_config(config_file), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
