"""Benchmark suites: what is asked of lm_eval, and that its numbers are its own."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import evidence_ranking
import pytest

import rho.suites
from conftest import write_jsonl
from rho.errors import ConfigError, DataError
from rho.models import ModelConfig, ends_documents, make_model
from rho.runs import Manifest, read_manifest
from rho.suites import TASKS, Ask, LeaveOut, SuiteConfig, Task, ask, evaluate_suite, table, tasks_of
from rho.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data" / "eval"
CHOICE = Task(name="quiz", title="Quiz", template="choice", shots=2)
QUIZ = [{"question": f"What is {n} + {n}?", "choices": [str(n), str(2 * n), "7"], "gold": 1} for n in range(10, 18)]


def asked(task: Task, folder: Path) -> Ask:
    found = ask(task, folder)
    assert isinstance(found, Ask), found
    return found


def test_the_suites_are_the_papers() -> None:
    math = ["GSM8K", "MATH", "SVAMP", "ASDiv", "MAWPS", "TabMWP", "MathQA", "MMLU-STEM", "SAT"]
    assert [task.title for task in tasks_of("math")] == math
    assert [task.shots for task in tasks_of("math")] == [8, 4, 8, 8, 8, 8, 4, 4, 4]
    general = {task.title for task in tasks_of("general")}
    assert len(tasks_of("general")) == len(general) == 15
    assert {"MMLU", "BBH", "AGIEval", "HumanEval", "MBPP", "TydiQA", "HellaSwag"} < general
    for suite in ("math", "general", "extra"):
        for task in tasks_of(suite):
            assert task.lm_eval or task.template, task.name
            assert task.template is None or (TASKS / f"{task.template}.yaml").is_file(), task.name


def test_examples_are_spread_over_the_file_and_never_asked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "quiz.jsonl", QUIZ)
    spec: Any = asked(CHOICE, tmp_path).spec
    assert spec["fewshot_config"] == {"sampler": "first_n", "samples": [QUIZ[0], QUIZ[4]]}
    assert (spec["process_docs"], spec["num_fewshot"]) == (LeaveOut((0, 4)), 2)
    assert spec["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "quiz.jsonl")}


def test_examples_are_those_of_the_dev_file_where_there_is_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "quiz.jsonl", QUIZ[:3])
    write_jsonl(tmp_path / "quiz_dev.jsonl", QUIZ[3:])
    spec: Any = asked(CHOICE, tmp_path).spec
    assert spec["fewshot_config"]["samples"] == QUIZ[3:5] and spec["process_docs"] == LeaveOut(())


def test_examples_of_another_task(tmp_path: Path) -> None:
    task = CHOICE.model_copy(update={"examples": "other"})
    write_jsonl(tmp_path / "quiz.jsonl", QUIZ[:2])
    assert ask(task, tmp_path) == f"no other.jsonl in {tmp_path}, from which its examples are taken"
    write_jsonl(tmp_path / "other.jsonl", QUIZ)
    spec: Any = asked(task, tmp_path).spec
    assert spec["fewshot_config"]["samples"] == [QUIZ[0], QUIZ[4]] and spec["process_docs"] == LeaveOut(())


def test_records_without_choices_are_counted_and_left_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "quiz.jsonl", [{**QUIZ[0], "choices": []}, *QUIZ])
    found = asked(CHOICE, tmp_path)
    spec: Any = found.spec
    assert found.unusable == 1 and spec["process_docs"] == LeaveOut((0, 1, 5))


def test_why_a_task_can_not_be_asked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "few.jsonl", QUIZ[:2])
    reasons = {
        "no quiz.jsonl in": CHOICE,
        "no question is left": CHOICE.model_copy(update={"name": "few"}),
        "no form for task data, only lm_eval's own (bbh)": Task(name="bbh", title="BBH", lm_eval="bbh"),
        "runs the code": Task(name="code", title="Code", lm_eval="mbpp", runs_code=True),
    }
    for reason, task in reasons.items():
        found = ask(task, tmp_path)
        assert isinstance(found, str) and reason in found
    assert ask(CHOICE, None) == "not a task of lm_eval: give --task-data"
    assert ask(Task(name="a", title="A", lm_eval="arc_easy", shots=5), None) == Ask("arc_easy", 5)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "?", "gold": 0}', "line 2: expected the fields question, choices, gold, found no choices"),
        ("{", "line 2: not a JSON object"),
        ("7", "found no question, choices, gold"),
    ],
)
def test_a_record_that_is_none_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "quiz.jsonl").write_text(json.dumps(QUIZ[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        ask(CHOICE, tmp_path)


def test_the_table_lists_what_was_asked_and_what_was_not() -> None:
    row = {"task": "sat", "title": "SAT", "questions": 28, "shots": 4, "cut": 2, "unusable": 4, "metric": "acc"}
    other = {**row, "title": "GSM8K", "questions": 1319, "cut": 0, "unusable": 0, "stderr": "N/A", "value": 0.05}
    facts = {"rows": [{**row, "value": 0.25, "stderr": 0.0833}, other], "missing": {"mathqa": "no mathqa.jsonl in x"}}
    assert table(Manifest("suite", {"suite": "math"}, {}, facts=facts)).splitlines() == [
        "task          n  shots  metric  value  stderr",
        "SAT          28      4  acc     25.00    8.33  2 prompts cut to the model's context; 4 records can't be asked",
        "GSM8K      1319      4  acc      5.00",
        "mean of 2                       15.00",
        "missing: MathQA: no mathqa.jsonl in x",
    ]


def test_without_lm_eval_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(rho.suites, "version", absent)
    with pytest.raises(ConfigError, match=r"needs lm_eval.*rho-lm\[eval\]"):
        evaluate_suite(SuiteConfig(suite="math"), ["model"], tmp_path)


# With lm_eval


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra `eval`)")
    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # takes seconds a call
    return module


third_party = pytest.mark.filterwarnings("ignore")  # of lm_eval and what it imports
SOLUTION = "Half of four. The answer is $\\boxed{\\frac{1}{2}}$."
DATA: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "How many?", "answer": "1,234"}, {"question": "And now?", "answer": "-5"}],
    "math500": [{"question": "What is $1/2$?", "solution": SOLUTION, "answer": "\\frac{1}{2}"}] * 2,
    "tabmwp_test1k": [
        {"question": "Which?", "answer": "a cat", "table": "A | B", "table_title": None, "choices": ["a cat", "a dog"]},
        {"question": "How many?", "answer": "8", "table": "A | B", "table_title": "Pets", "choices": None},
    ],
    "mathqa": QUIZ,
    "mmlu_stem": QUIZ,
    "sat_math": QUIZ[:3],
    "hellaswag": QUIZ,
    "winogrande": [
        {"context_options": ["Ann was late so Ann", "Ann was late so Bo"], "continuation": "waited.", "gold": 1},
        {"context_options": ["A cat", "A dog"], "continuation": "purrs.", "gold": 0},
    ],
    "simple_arithmetic": [{"context": f"{n} + 1 =", "continuation": f" {n + 1}"} for n in range(12)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task data with a record of each kind."""
    out = tmp_path_factory.mktemp("data")
    for name, records in DATA.items():
        write_jsonl(out / f"{name}.jsonl", [{"id": str(n), **record} for n, record in enumerate(records)])
    return out


def answer(doc: dict[str, Any], right: bool) -> str:
    if "solution" in doc:
        return f"Final Answer: The final answer is ${doc['answer'] if right else 7}$. I hope it is correct."
    return f"2 and 3 are 5. The answer is {doc['answer'] if right else 7}.\nI am sure."


def likely(doc: dict[str, Any], context: str, continuation: str) -> bool:
    if "context_options" in doc:
        return context.endswith(doc["context_options"][doc["gold"]])
    if "continuation" in doc:
        return continuation == " " + doc["continuation"].strip()
    return continuation in (" " + doc["choices"][doc["gold"]], " " + "ABC"[doc["gold"]])


@third_party
@pytest.mark.parametrize("suite", ["math", "general", "extra"])
def test_right_answers_are_right_and_wrong_ones_wrong(lm_eval: Any, data: Path, suite: Any) -> None:
    """A model that knows the answers is right in every task of every template, one that avoids them is in none."""
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Oracle(LM):
        right = True

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [answer(request.doc, self.right) for request in requests]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            good = [likely(request.doc, *request.args) == self.right for request in requests]
            return [(-1.0 if one else -50.0, one) for one in good]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise AssertionError

    for task in tasks_of(suite):
        if not (data / task.path).is_file():
            continue
        for right in (True, False):
            lm = Oracle()
            lm.right = right
            found = lm_eval.simple_evaluate(
                lm, tasks=[asked(task, data).spec], task_manager=TaskManager(include_defaults=False)
            )
            values = found["results"][task.name].items()
            metrics = [value for key, value in values if key.split(",")[0] in ("acc", "exact_match")]
            assert metrics == [float(right)], (task.name, right)


@third_party
def test_the_prompt_of_each_kind(lm_eval: Any, data: Path) -> None:
    """Literally what a model reads, with no examples."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    prompts = {}
    for task in [*tasks_of("math"), *tasks_of("general"), *tasks_of("extra")]:
        if (data / task.path).is_file():
            [made] = manager.load(asked(task.model_copy(update={"shots": 0}), data).spec)["tasks"].values()
            made.build_all_requests()
            prompts[task.name] = made.instances[0].args[0]
    assert prompts == {
        "gsm8k": "Question: How many?\nAnswer:",
        "math": "Problem:\nWhat is $1/2$?\n\nSolution:",
        "tabmwp": "Question: A | B\nWhich? Options: a cat, a dog\nAnswer:",
        "mathqa": "Question: What is 10 + 10?\nAnswer:",
        "mmlu_stem": "Question: What is 10 + 10?\nA. 10\nB. 20\nC. 7\nAnswer:",
        "sat": "Question: What is 10 + 10?\nA. 10\nB. 20\nC. 7\nAnswer:",
        "hellaswag": "What is 10 + 10?",
        "winogrande": "Ann was late so Ann",
        "simple_arithmetic": "0 + 1 =",
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, architecture: dict) -> str:
    """A model folder with a context of 4096 tokens, and its tokenizer."""
    out = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer.load(tokenizer_folder)
    settings = {**architecture, "max_position_embeddings": 4096}
    model = make_model(ModelConfig(architecture=settings), tokenizer.vocab_size)
    ends_documents(model, tokenizer.eos_id)
    model.save_pretrained(out)
    tokenizer.save(out)
    return str(out)


def by_hand(lm_eval: Any, task: Task, folder: Path, model: str, limit: int) -> dict[str, Any]:
    """lm_eval's own results of a task."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32", "device": "cpu", "batch_size": 4},
        tasks=[asked(task, folder).spec],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        gen_kwargs={"max_gen_toks": 8},
    )
    return dict(found["results"][task.name])


@third_party
def test_the_numbers_are_those_of_lm_eval_called_by_hand(lm_eval: Any, data: Path, tiny: str, tmp_path: Path) -> None:
    config = SuiteConfig(suite="math", limit=3, max_gen_toks=8, batch_size=4)
    made = evaluate_suite(config, [tiny], tmp_path / "out", data)
    assert [row["task"] for row in made.facts["rows"]] == ["gsm8k", "math", "tabmwp", "mathqa", "mmlu_stem", "sat"]
    assert list(made.facts["missing"]) == ["svamp", "asdiv", "mawps"]
    rows = {row["task"]: row for row in made.facts["rows"]}
    assert (rows["gsm8k"]["questions"], rows["gsm8k"]["shots"], rows["sat"]["questions"]) == (2, 8, 3)
    for task in tasks_of("math"):
        if task.name in rows:
            own = json.loads((tmp_path / "out" / f"{task.name}.json").read_text())["results"][task.name]
            assert own == by_hand(lm_eval, task, data, tiny, 3), task.name
            assert rows[task.name]["value"] in own.values()


@third_party
def test_the_evidence_asks_each_ranking_task_once(lm_eval: Any, data: Path, tiny: str, tmp_path: Path) -> None:
    rows = {row["task"]: row for row in evidence_ranking.ask(Path(tiny), data, tmp_path, 3)}
    assert {name: row["questions"] for name, row in rows.items()} == {"mathqa": 3, "hellaswag": 3, "winogrande": 2}
    assert {name: round(row["chance"], 3) for name, row in rows.items()} == {
        "mathqa": 0.333,
        "hellaswag": 0.333,
        "winogrande": 0.5,
    }


@third_party
def test_an_interrupted_suite_goes_on_after_the_last_task(
    lm_eval: Any, data: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SuiteConfig(suite="extra", limit=2)
    whole = rho.suites._evaluate_task

    def cut(*args: Any) -> Any:
        raise KeyboardInterrupt

    write_jsonl(tmp_path / "simple_arithmetic.jsonl", DATA["simple_arithmetic"])
    write_jsonl(tmp_path / "copa.jsonl", QUIZ)
    monkeypatch.setattr(rho.suites, "_evaluate_task", lambda *a: cut() if a[2].name == "copa" else whole(*a))
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(config, [tiny], tmp_path / "out", tmp_path)
    before = (tmp_path / "out" / "simple_arithmetic.json").stat().st_mtime_ns
    monkeypatch.setattr(rho.suites, "_evaluate_task", whole)
    made = evaluate_suite(config, [tiny], tmp_path / "out", tmp_path)
    assert [row["task"] for row in made.facts["rows"]] == ["simple_arithmetic", "copa"]
    assert (tmp_path / "out" / "simple_arithmetic.json").stat().st_mtime_ns == before
    assert evaluate_suite(config, [tiny], tmp_path / "out", tmp_path).facts == made.facts  # fresh
    assert set(read_manifest(tmp_path / "out", "suite").outputs) == {"simple_arithmetic.json", "copa.json"}


@third_party
def test_prompts_longer_than_the_context_are_counted(
    lm_eval: Any, data: Path, architecture: dict, tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    make_model(ModelConfig(architecture=architecture), tokenizer.vocab_size).save_pretrained(tmp_path / "short")
    config = SuiteConfig(suite="math", limit=2, max_gen_toks=8)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json here"):
        evaluate_suite(config, [str(tmp_path / "short")], tmp_path / "out", data)
    made = evaluate_suite(config, [str(tmp_path / "short")], tmp_path / "out2", data, str(tokenizer_folder))
    assert [row["cut"] for row in made.facts["rows"]] == [2] * 6  # 64 tokens hold no example
    with pytest.raises(ConfigError, match=r"reads 64 tokens at once.*Give a smaller --max-gen-toks"):
        evaluate_suite(
            SuiteConfig(suite="math"), [str(tmp_path / "short")], tmp_path / "o", data, str(tokenizer_folder)
        )


@third_party
def test_a_choice_longer_than_the_context_leaves_the_task_out(
    lm_eval: Any, architecture: dict, tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    make_model(ModelConfig(architecture=architecture), tokenizer.vocab_size).save_pretrained(tmp_path / "short")
    write_jsonl(tmp_path / "copa.jsonl", [{**QUIZ[0], "choices": ["20", "many " * 65]}])
    write_jsonl(tmp_path / "winograd_wsc.jsonl", DATA["winogrande"])
    config = SuiteConfig(suite="extra", max_gen_toks=1)
    made = evaluate_suite(config, [str(tmp_path / "short")], tmp_path / "out", tmp_path, str(tokenizer_folder))
    assert [row["task"] for row in made.facts["rows"]] == ["winograd_wsc"]
    assert re.fullmatch(r"a choice of \d+ tokens, and the model reads 64 at once", made.facts["missing"]["copa"])


def test_no_data_is_an_error(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rho.suites, "version", lambda name: "0")
    with pytest.raises(DataError, match=r"no task of the suite math can be asked:\n  gsm8k: no gsm8k.jsonl in"):
        evaluate_suite(SuiteConfig(suite="math"), [tiny], tmp_path / "out", tmp_path)
    with pytest.raises(DataError, match="no such folder of task data"):
        evaluate_suite(SuiteConfig(suite="math"), [tiny], tmp_path / "out", tmp_path / "none")
    with pytest.raises(ConfigError, match="expected one model, found 2"):
        evaluate_suite(SuiteConfig(suite="math"), [tiny, tiny], tmp_path / "out", tmp_path)


@third_party
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no task data in {SHARED}")
def test_the_whole_suite_on_real_data(lm_eval: Any, tiny: str, tmp_path: Path) -> None:
    made = evaluate_suite(SuiteConfig(suite="math", limit=1, max_gen_toks=8), [tiny], tmp_path / "out", SHARED)
    assert len(made.facts["rows"]) == 9 and made.facts["missing"] == {}
    assert {row["task"]: row["unusable"] for row in made.facts["rows"] if row["unusable"]} == {"sat": 4}
    for task in tasks_of("math"):
        own = json.loads((tmp_path / "out" / f"{task.name}.json").read_text())["results"][task.name]
        assert own == by_hand(lm_eval, task, SHARED, tiny, 1), task.name
