"""The `rho` command: what a user can do wrong ends in one clear message, a code, and nothing lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from conftest import example_records, write_jsonl
from rho import cli, runs, score
from rho import corpus as corpus_module
from rho.models import ModelConfig, make_model, save_model
from rho.runs import read_manifest
from rho.tokenizer import Tokenizer
from rho.train import TrainConfig

STAGES = [
    *(
        "demo",
        "run",
        "plan",
        "tokenizer",
        "corpus",
        "reference",
        "score",
        "train",
        "evaluate",
        "tokens",
        "dynamics",
        "report",
    )
]
GOOD = '{"text": "1234567890123456"}\n'


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def rho(monkeypatch, capsys):
    """Run the command in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["rho", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return Result(int(exit_.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def failure(rho):
    """The one message of a command that a user's mistake stops."""

    def run(*arguments: object) -> str:
        result = rho(*arguments)
        assert result.code == 1
        assert result.out == ""
        assert result.err.count("error: ") == 1
        return result.err.partition("error: ")[2]

    return run


@pytest.fixture
def make_corpus(rho, tmp_path, tokenizer_folder):
    """Arguments of `rho corpus` on some text."""

    def arguments(content: str | bytes | None, *options: object, out: str = "out") -> list[object]:
        source = tmp_path / "text.jsonl"
        source.unlink(missing_ok=True)
        if content is not None:
            source.write_bytes(content.encode() if isinstance(content, str) else content)
        return [
            "corpus",
            source,
            "--tokenizer",
            tokenizer_folder,
            "--out",
            tmp_path / out,
            "--block-length",
            16,
            *options,
        ]

    return arguments


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# The command itself


def test_help_shows_one_command_a_stage():
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-c", "from rho.cli import main; main()", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0
    listed = [
        line.strip("│ ").split()[0] for line in result.stdout.partition("Commands")[2].splitlines()[1:] if "│" in line
    ]
    assert [name for name in listed if name in STAGES] == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_every_command_explains_itself(rho, stage):
    result = rho(stage, "--help")
    assert result.code == 0
    assert "Usage" in result.out


@pytest.mark.parametrize(
    "arguments", [["trian"], ["corpus"], ["train", "--ratio", "half"], ["score", "--speed", "9"], ["run", "a", "b"]]
)
def test_a_wrong_usage_is_explained_with_code_2(rho, arguments):
    result = rho(*arguments)
    assert result.code == 2
    assert "Usage" in result.err


def test_results_go_to_stdout_and_all_else_to_stderr(rho, make_corpus, tmp_path):
    result = rho(*make_corpus(GOOD * 3))
    assert result.code == 0
    assert result.out == f"{tmp_path / 'out'}\n"
    assert "corpus out: done" in result.err


# Bad text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "text.jsonl: expected a file, folder or glob, found nothing there"),
        ("", "text.jsonl: expected at least one record, found an empty file"),
        (GOOD + "not json\n", "text.jsonl:2: expected one JSON object a line, found something that is not JSON"),
        (GOOD + "[1]\n", "text.jsonl:2: expected a JSON object, found list"),
        (GOOD * 2 + '{"body": "x"}\n', "text.jsonl:3: expected the text in field 'text', found the fields 'body'"),
        (GOOD + '{"text": 3}\n', "text.jsonl:2: expected a string in field 'text', found int"),
        (GOOD.encode() + b'{"text": "\xff"}\n', "text.jsonl:2: expected UTF-8 text, found byte 0xff at 10"),
        ('{"text": "123"}\n', "4 tokens in 1 documents are shorter than one block of 16"),
        ('{"text": ""}\n', "0 tokens in 0 documents are shorter than one block of 16"),
    ],
)
def test_bad_text_is_named_and_the_corrected_command_works_in_the_same_folder(
    rho, failure, make_corpus, tmp_path, text, message
):
    assert message in failure(*make_corpus(text))
    if (tmp_path / "out").exists():
        assert set(content(tmp_path / "out")) <= {"manifest.json"}
    assert rho(*make_corpus(GOOD * 3)).code == 0


def test_bad_records_are_skipped_counted_and_listed_where_asked(rho, make_corpus, tmp_path):
    text = (GOOD + "not json\n" + '{"body": "x"}\n').encode() + b'{"text": "\xff"}\n' + GOOD.encode()
    assert rho(*make_corpus(text, "--skip-bad-records")).code == 0
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["where"].rpartition(":")[2] for entry in skipped] == ["2", "3", "4"]
    assert all(entry["reason"] for entry in skipped)
    assert read_manifest(tmp_path / "out").facts["skipped_records"] == 3


def test_documents_of_one_token_are_no_problem(rho, make_corpus, tmp_path):
    assert rho(*make_corpus('{"text": "1"}\n' * 8)).code == 0
    assert read_manifest(tmp_path / "out").facts["splits"]["train"]["documents"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block-length", 1], "block_length: Input should be greater than or equal to 2, found 1"),
        (["--heldout-fraction", 1.5], "heldout_fraction: Input should be less than or equal to 1, found 1.5"),
        (["--heldout-fraction", "nan"], "heldout_fraction: "),
        (["--max-tokens", 0], "max_tokens: Input should be greater than or equal to 1, found 0"),
        (["--tokenizer", "no/such-tokenizer"], "no/such-tokenizer: no tokenizer could be loaded from here"),
        (["--eos", "<end>"], "its vocabulary has no <end>"),
    ],
)
def test_a_setting_out_of_range_is_named(failure, make_corpus, options, message):
    assert message in failure(*make_corpus(GOOD * 3, *options))


def test_too_little_text_for_a_tokenizer_is_an_error(failure, tmp_path, text_file):
    assert "too little text" in failure("tokenizer", text_file, "--out", tmp_path / "t", "--vocab-size", 9999)


# What does not belong together


@pytest.fixture
def model_file(tmp_path, architecture) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(architecture))
    return path


@pytest.fixture
def train(model_file, corpus, tmp_path):
    """Arguments of `rho train`."""
    arguments = ["--set", "max_steps=2", "--set", "per_device_train_batch_size=2", "--out", tmp_path / "model"]
    return ["train", "--corpus", corpus, "--model", model_file, *arguments]


@pytest.fixture
def small_model(tmp_path, architecture) -> Path:
    """A model of 256 tokens that comes without a tokenizer."""
    save_model(make_model(ModelConfig(architecture=architecture), 256), tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def other_model(tmp_path, architecture, tokenizer_folder) -> Path:
    """A model of as many tokens that comes with another tokenizer."""
    backend = Tokenizer.load(tokenizer_folder).backend
    backend.add_tokens(["shift"])
    save_model(make_model(ModelConfig(architecture=architecture), 301), tmp_path / "other")
    Tokenizer(backend, "<|endoftext|>").save(tmp_path / "other")
    return tmp_path / "other"


def test_a_model_with_a_smaller_vocabulary_than_the_corpus_is_refused(failure, train, small_model, corpus, tmp_path):
    message = f"the vocabularies differ: {corpus} has token ids up to 299, model {small_model} has 256 embeddings"
    assert message in failure("score", "--corpus", corpus, "--reference", small_model, "--out", tmp_path / "scores")
    assert message in failure(*train, "--model", small_model)


def test_a_model_with_another_tokenizer_is_refused(failure, train, other_model, corpus, tmp_path):
    for message in (
        failure("score", "--corpus", corpus, "--reference", other_model, "--out", tmp_path / "scores"),
        failure(*train, "--model", other_model),
        failure("evaluate", other_model, "--held-out", f"held={corpus}", "--out", tmp_path / "evaluate"),
        failure("dynamics", other_model, other_model, "--held-out", corpus, "--out", tmp_path / "dynamics"),
    ):
        assert f"the tokenizers differ: {corpus} was made with " in message
        assert f"{other_model} comes with " in message


def test_scores_of_another_corpus_are_refused(rho, failure, train, make_corpus, scores, tmp_path):
    assert rho(*make_corpus(GOOD * 3, out="another")).code == 0
    message = failure(*train, "--ratio", 0.5, "--scores", scores, "--corpus", tmp_path / "another")
    assert f"{scores}: these are scores of another corpus" in message
    assert str(tmp_path / "another") in message


def test_scores_with_another_tokenizer_are_refused(rho, failure, train, make_corpus, scores, other_model, tmp_path):
    assert rho(*make_corpus(GOOD * 3, "--tokenizer", other_model, out="another")).code == 0
    message = failure(*train, "--ratio", 0.5, "--scores", scores, "--corpus", tmp_path / "another")
    assert f"{scores}: these are scores of another tokenizer" in message


@pytest.mark.parametrize("ratio", ["0", "1.5", "-0.5", "nan", "inf"])
def test_a_ratio_outside_zero_to_one_is_refused(failure, train, scores, tmp_path, ratio):
    message = failure(*train, "--scores", scores, "--ratio", ratio)
    assert "ratio: Input should be " in message
    assert f"found {float(ratio)}" in message
    assert not (tmp_path / "model").exists()


def test_selection_without_scores_is_refused(failure, train):
    assert "ratio 0.5 with score 'excess' needs --scores" in failure(*train, "--ratio", 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_stepz=3"], "max_stepz: no field of transformers.TrainingArguments"),
        (["--set", "learning_rate=fast"], "learning_rate: Input should be a valid number"),
        (["--set", "max_steps"], "--set max_steps: expected name=value"),
        (["--select", "best"], "score: Input should be 'excess'"),
        (["--model", "none.yaml"], "none.yaml: not a model config"),
        (["--model", "no/such-model"], "no/such-model: no model could be loaded from here"),
        (["--corpus", "nowhere"], "nowhere: no manifest.json here"),
        (["--scores", "nowhere"], "nowhere: no manifest.json here"),
        (["--scores", "a", "--scores", "b"], "--scores: expected name=folder, each name once, found a b"),
        (["--scores", "a=x", "--scores", "a=y"], "--scores: expected name=folder, each name once"),
        (["--selection", "retention"], "--selection retention: expected name=value"),
        (["--selection", "retension=1"], "retension: no such setting"),
        (["--selection", "schedule.points=[[1, 0.5]]"], "schedule: a schedule's steps must rise from 0"),
        (["--selection", "second.ratio=2"], "second: ratio must be in (0, 1], found 2.0"),
        (["--selection", "weighting=soft"], "weighting: Input should be 'mask', 'softmax'"),
        (["--selection", "temperature=0"], "temperature and clip must be above 0"),
        (["--selection", "retention=-1"], "retention must be 0 or more"),
        (["--selection", "references.combine=sum"], "references.combine: Input should be 'mean', 'min', 'max'"),
        (["--selection", "lora.rank=3"], "lora: "),
        (["--selection", "early_stopping=0"], "early_stopping: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_argument_of_train_is_named(failure, train, arguments, message):
    assert message in failure(*train, *arguments)


SELECTIONS = {
    "schedule": ["schedule={points: [[0, 1.0], [1, 0.5]], kind: linear}"],
    "intersection": ["second={score: ref_entropy, ratio: 0.7}", "combine=intersection"],
    "softmax": ["weighting=softmax", "temperature=2.0"],
    "exponential": ["weighting=exponential", "clip=4"],
    "retention": ["retention=0.1"],
    "lora": ["lora.r=2", "lora.target_modules=[q_proj]"],
    "skip": ["skip_nonfinite=2"],
}


@pytest.mark.parametrize(("given", "steps"), [("stop", 0), ("skip=3", 3)])
def test_steps_that_are_not_finite_stop_the_training_or_are_left_out(rho, train, tmp_path, given, steps):
    assert rho(*train, "--on-nonfinite", given).code == 0
    assert read_manifest(tmp_path / "model").config["skip_nonfinite"] == steps


@pytest.mark.parametrize("given", ["skip", "skip=-1", "skip=many", "go"])
def test_what_to_do_about_them_is_checked(failure, train, given):
    assert "--on-nonfinite: expected stop, or skip=N" in failure(*train, "--on-nonfinite", given)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize("settings", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_every_setting_of_a_selection_can_be_given(rho, train, scores, tmp_path, architecture, settings):
    options = [word for setting in settings for word in ("--selection", setting)]
    if "lora" in settings[0]:
        save_model(make_model(ModelConfig(architecture=architecture), 300, seed=1), tmp_path / "base")
        options += ["--model", tmp_path / "base"]
    result = rho(*train, "--scores", scores, "--ratio", 0.6, *options)
    assert result.code == 0, result.err
    found = read_manifest(tmp_path / "model").config
    assert found["ratio"] == 0.6
    for setting in settings:
        name = setting.partition("=")[0].partition(".")[0]
        assert found[name] not in (None, TrainConfig.model_fields[name].default) or name == "combine"


@pytest.mark.parametrize("scope", ["sequence", "batch", "step", "running", "dataset"])
def test_every_scope_can_be_asked_for(rho, train, scores, tmp_path, scope):
    result = rho(*train, "--scores", scores, "--ratio", 0.6, "--scope", scope, "--select", "ref_loss")
    assert result.code == 0, result.err
    assert read_manifest(tmp_path / "model").config["scope"] == scope


def test_training_stops_early_on_the_target(rho, train, scores, corpus, tmp_path):
    often = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0}
    often |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    options = [word for name, value in often.items() for word in ("--set", f"{name}={value}")]
    result = rho(*train, "--target", corpus, "--selection", "early_stopping=2", *options)
    assert result.code == 0, result.err
    last = json.loads((tmp_path / "model" / "steps.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3  # the first loss is the best: two more without a better one


def test_several_references_are_given_by_name(rho, failure, train, scores, tmp_path):
    two = ["--scores", f"wanted={scores}", "--scores", f"other={scores}", "--ratio", 0.6]
    weights = ["--selection", "references={combine: weights, weights: {wanted: 1.5, other: -0.5}}"]
    assert rho(*train, *two, *weights).code == 0
    made_from = read_manifest(tmp_path / "model").inputs
    assert made_from["scores:wanted"] == made_from["scores:other"]
    assert "weights are for references wanted" in failure(
        *train, *two, "--selection", "references={combine: weights, weights: {wanted: 1}}", "--out", tmp_path / "other"
    )
    assert "references.names: no scores of third, found wanted, other" in failure(
        *train, *two, "--selection", "references.names=[third]", "--out", tmp_path / "other"
    )


def test_a_stage_folder_of_another_stage_is_refused(failure, train, scores):
    message = failure(*train, "--corpus", scores)
    assert f"{scores}: expected the output of stage 'corpus', found that of stage 'score'" in message


def test_other_mistakes_are_explained(failure, corpus, reference, tmp_path):
    assert "none.yaml: no such config file" in failure("run", tmp_path / "none.yaml")
    assert "--held-out: expected name=folder" in failure(
        "evaluate", reference, "--held-out", corpus, "--out", tmp_path / "e"
    )
    assert str(tmp_path / "nowhere") in failure("report", tmp_path / "nowhere")
    follow = ("dynamics", "--held-out", corpus, "--out", tmp_path / "d")
    assert "need two checkpoints or more" in failure(*follow, reference)
    assert "folder that `rho train` wrote" in failure(*follow, reference, reference, "--reference", reference)
    assert "threshold" in failure(*follow, reference, "--threshold", -1)


# What is there is kept


def test_a_folder_made_with_another_setting_is_refused_with_the_key_named(rho, failure, make_corpus, tmp_path):
    assert rho(*make_corpus(GOOD * 3)).code == 0
    before = content(tmp_path / "out")
    assert "config.seed: asked for 1, found 0" in failure(*make_corpus(GOOD * 3, "--seed", 1))
    assert f"inputs.{tmp_path / 'text.jsonl'}: " in failure(*make_corpus(GOOD * 4))
    assert content(tmp_path / "out") == before


def test_a_run_directory_made_with_another_config_is_refused_with_the_key_named(failure, tmp_path, text_file):
    config = {
        "name": "toy",
        "tokenizer": {"vocab_size": 300, "corpora": ["all"]},
        "corpora": {"all": {"sources": [str(text_file)], "block_length": 16, "heldout_fraction": 0.2}},
        "model": {"architecture": {"model_type": "no-such-type"}},
        "reference": {"corpus": "all"},
        "corpus": "all",
        "target": "all",
        "train": {"arms": {"clm": {}}},
        "evaluate": {"sets": ["all"]},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    run = ["run", tmp_path / "toy.yaml", "--out", tmp_path / "run"]
    assert "no-such-type" in failure(*run)
    before = content(tmp_path / "run")
    message = failure(*run, "--set", "corpora.all.block_length=8")
    assert "run/corpus/all: was made otherwise. config.block_length: asked for 8, found 16" in message
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_reported_and_a_rerun_goes_on(rho, failure, make_corpus, tmp_path, monkeypatch, call):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert rho(*make_corpus(GOOD * 50, out="whole")).code == 0
    write = corpus_module.write_shard

    def write_on_a_full_disk(path, columns):
        with monkeypatch.context() as full:
            full.setattr(runs.os, call, no_space)
            write(path, columns)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "write_shard", write_on_a_full_disk)
        message = failure(*make_corpus(GOOD * 50))
    assert "out/train-00000.parquet: could not be written (No space left on device)" in message
    assert set(content(tmp_path / "out")) == {"manifest.json"}
    assert rho(*make_corpus(GOOD * 50)).code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole") | {
        "manifest.json": (tmp_path / "out" / "manifest.json").read_bytes()
    }


def test_a_file_that_the_system_refuses_is_one_message(failure, train, monkeypatch):
    def refuse(folder, split="train"):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), f"{folder}/manifest.json")

    monkeypatch.setattr(corpus_module, "Corpus", refuse)
    assert "/manifest.json: Too many open files. What was finished is kept" in failure(*train)


def test_ctrl_c_ends_with_code_130_and_a_rerun_goes_on(rho, scores, corpus, reference, tmp_path, monkeypatch):
    command = ["score", "--corpus", corpus, "--reference", reference, "--target", corpus, "--dtype", "float32"]
    command += ["--out", tmp_path / "scores"]
    write, written = score.write_shard, []

    def interrupted(path, columns):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, columns)

    with monkeypatch.context() as patch:
        patch.setattr(score, "write_shard", interrupted)
        result = rho(*command)
    assert result.code == 130
    assert "interrupted. Nothing finished is lost: run the same command again to go on." in result.err
    result = rho(*command)
    assert result.code == 0
    assert "going on after 2 of 7 shards" in result.err
    shards = {name: raw for name, raw in content(scores).items() if name.endswith(".parquet")}
    assert {name: content(tmp_path / "scores")[name] for name in shards} == shards


def test_a_damaged_shard_is_reported_and_made_anew_when_removed(
    rho, failure, scores, corpus, reference, train, tmp_path
):
    copy = shutil.copytree(scores, tmp_path / "copy")
    damaged = copy / "train-00001.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    message = failure(*train, "--ratio", 0.5, "--scores", copy, "--set", "num_train_epochs=1", "--set", "max_steps=-1")
    assert f"{damaged}: damaged shard" in message
    damaged.unlink()
    command = ["score", "--corpus", corpus, "--reference", reference, "--target", corpus, "--dtype", "float32"]
    assert rho(*command, "--out", copy).code == 0
    assert damaged.read_bytes() == whole


def test_every_stage_runs_alone_and_is_fresh_the_second_time(rho, tmp_path, model_file):
    text = write_jsonl(tmp_path / "text.jsonl", example_records(40))
    tokenizer, corpus, reference, scores, model, losses, dynamics = (tmp_path / name for name in "tcrsmed")
    built = ["--tokenizer", tokenizer / "tokenizer", "--block-length", 16, "--heldout-fraction", 0.2]
    small = ["--corpus", corpus, "--model", model_file, "--set", "max_steps=3", "--set", "learning_rate=1e-2"]
    selective = ["--scores", scores, "--target", corpus, "--ratio", 0.6, "--scope", "batch", "--set", "save_steps=1"]
    for arguments in (
        ["tokenizer", text, "--out", tokenizer, "--vocab-size", 300],
        ["corpus", text, "--out", corpus, *built],
        ["reference", "--out", reference, *small],
        ["score", "--corpus", corpus, "--reference", reference, "--target", corpus, "--out", scores],
        ["train", "--out", model, *small, *selective],
        ["evaluate", model, "--held-out", f"own={corpus}", "--out", losses],
        ["dynamics", model, "--held-out", corpus, "--reference", reference, "--out", dynamics],
    ):
        first, second = rho(*arguments), rho(*arguments)
        assert (first.code, second.code) == (0, 0), first.err + second.err
        assert "fresh" not in first.err
        assert "fresh" in second.err
        assert first.out == second.out != ""
        if arguments[0] == "evaluate":
            assert json.loads(first.out)["set"] == "own"
    assert [line.split()[0] for line in first.out.splitlines()] == ["H->H", "L->H", "H->L", "L->L"]
    shares = json.loads((dynamics / "summary.json").read_text())["selection"]["share"]
    assert shares == pytest.approx([0.6] * 3, abs=0.01)


# tokens


def test_tokens_prints_a_text_or_writes_a_page(rho, reference, tmp_path):
    (tmp_path / "note.md").write_text("The shift by one.")
    models = ["--model", reference / "model", "--reference", reference]
    shown = rho("tokens", tmp_path / "note.md", *models, "--ratio", "1.0", "--colour", "rank")
    assert shown.code == 0 and shown.out.startswith("⟦The shift by one.⟧\n")
    page = tmp_path / "page.html"
    assert rho("tokens", tmp_path / "note.md", *models, "--out", page).out == f"{page}\n"
    assert "<title>note.md: token by token</title>" in page.read_text()


def test_what_tokens_needs_is_asked_for(failure, reference, tmp_path):
    (tmp_path / "note.md").write_text("The shift by one.")
    models = ["--model", reference, "--reference", reference]
    assert "either a text, --model and --reference, or --run" in failure("tokens", tmp_path / "note.md")
    assert "either a text, --model and --reference, or --run" in failure("tokens", *models, "--run", tmp_path)
    assert "ratio: Input should be less than or equal to 1" in failure("tokens", "-", *models, "--ratio", 2)
    assert "found nothing there" in failure("tokens", tmp_path / "other.md", *models)
    message = failure("tokens", tmp_path / "note.md", *models, "--colour", "difference")
    assert "expected one of excess, loss, reference, rank for this text, found difference" in message
