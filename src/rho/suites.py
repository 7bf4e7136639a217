"""Benchmark suites: the paper's tasks, asked and judged by lm_eval; from the Hub, or from a folder of task data.

What a suite holds is in `tasks/suites.yaml`, how a record of a folder is asked in the templates beside it, in lm_eval's
own terms. Nothing is scored here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from rho.errors import ConfigError, DataError
from rho.models import ModelConfig, device, make_model, model_folder, source_hash
from rho.progress import say
from rho.runs import Manifest, atomic_write, hash_file, hash_json, open_stage

TASKS = files("rho") / "tasks"
Suite = Literal["math", "general", "extra"]
Record = dict[str, Any]


class SuiteConfig(BaseModel):
    """Settings of an evaluation by benchmarks.

    Attributes:
        suite: `math` (the paper's Table 1), `general` (its Figure 5) or `extra`.
        limit: questions of each task; all unless given.
        max_gen_toks: the longest answer that is written out, in tokens; lm_eval's default unless given.
        batch_size: questions, or choices, a forward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: Suite
    limit: int | None = Field(None, ge=1)
    max_gen_toks: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)


class Task(BaseModel):
    """One line of `tasks/suites.yaml`, which says what the fields are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    lm_eval: str | None = None
    template: str | None = None
    file: str = ""
    shots: int | None = None
    examples: str = ""
    metric: str = ""
    runs_code: bool = False

    @property
    def path(self) -> str:
        """The name of its file in a folder of task data."""
        return f"{self.file or self.name}.jsonl"

    @property
    def examples_path(self) -> str:
        """The file whose records are shown as examples."""
        return f"{self.examples}.jsonl" if self.examples else self.path


@dataclass(frozen=True)
class Ask:
    """A task as lm_eval takes it: the name of its own task, or a configuration."""

    spec: str | dict[str, Any]
    shots: int | None
    unusable: int = 0  # records that lack what is asked for


@dataclass(frozen=True)
class LeaveOut:
    """Of a data set, all but the records with these numbers (lm_eval's `process_docs`)."""

    numbers: tuple[int, ...]

    def __call__(self, dataset: Any) -> Any:
        return dataset.select([n for n in range(len(dataset)) if n not in set(self.numbers)])


def tasks_of(suite: Suite) -> list[Task]:
    """The tasks of a suite, in the paper's order."""
    return [Task(name=name, **fields) for name, fields in _yaml("suites")[suite].items()]


def _yaml(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def ask(task: Task, folder: str | os.PathLike[str] | None) -> Ask | str:
    """How to ask a task of lm_eval; or, in words, why it can't be asked.

    Args:
        task: which.
        folder: of task data; without one the data is the Hub's.

    Raises:
        DataError: a file of the folder is not what a file of this task should be.
    """
    if task.runs_code:
        return "runs the code that a model writes: use lm_eval itself, which asks for your consent"
    if folder is None:
        return Ask(task.lm_eval, task.shots) if task.lm_eval else "not a task of lm_eval: give --task-data"
    if task.template is None:
        return f"has no form for task data, only lm_eval's own ({task.lm_eval})"
    path = Path(folder) / task.path
    if not path.is_file():
        return f"no {task.path} in {folder}"
    template = _yaml(task.template)
    needs, worked = template.pop("needs"), template.pop("worked_examples", None)
    records = read_records(path, needs)
    shots = task.shots or 0
    left_out = {n for n, record in enumerate(records) if any(record[key] in (None, "", []) for key in needs)}
    unusable = len(left_out)
    if shots and worked is not None:
        examples = worked_examples(worked)
    elif shots:
        source = Path(folder) / task.examples_path
        if not source.is_file():
            return f"no {source.name} in {folder}, from which its examples are taken"
        examples, numbers = file_examples(source, needs, shots)
        left_out |= numbers if source == path else set()
    if len(left_out) == len(records):
        return f"no question is left in {path} without those that are its examples"
    config = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "process_docs": LeaveOut(tuple(sorted(left_out))),
        "num_fewshot": shots,
        **template,
    }
    if shots:
        config["fewshot_config"] = {"sampler": "first_n", "samples": examples[:shots]}
    if task.template == "competition":
        config |= _competition(config["process_docs"])
    return Ask(config, None, unusable)


def read_records(path: Path, needs: Sequence[str]) -> list[Record]:
    """The records of a file of task data; a `DataError` for one without the fields that it `needs`."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not a JSON object ({error}). Restore the file.") from error
        absent = [key for key in needs if not isinstance(record, dict) or key not in record]
        if absent:
            raise DataError(
                f"{path}, line {number}: expected the fields {', '.join(needs)}, found no {', '.join(absent)}. "
                "docs/evaluation.md describes the records of each task."
            )
        records.append(record)
    if not records:
        raise DataError(f"{path}: expected a JSON object a line, found an empty file.")
    return records


def file_examples(path: Path, needs: Sequence[str], shots: int) -> tuple[list[Record], set[int]]:
    """Examples from beside a task, and which records of the task's own file they are.

    The first ones of `NAME_dev.jsonl` where there is such a file; else ones at equal distances over the file.
    """
    dev = path.with_name(f"{path.stem}_dev.jsonl")
    if dev.is_file():
        return read_records(dev, needs)[:shots], set()
    records = read_records(path, needs)
    whole = [n for n, record in enumerate(records) if all(record[key] not in (None, "", []) for key in needs)]
    numbers = whole[:: max(len(whole) // shots, 1)][:shots]
    return [records[n] for n in numbers], set(numbers)


def worked_examples(name: str) -> list[Record]:
    """Worked-out examples that lm_eval has: the usual eight word problems, or four problems of the MATH set."""
    import lm_eval.tasks

    if name == "minerva_math":
        from lm_eval.tasks.minerva_math.utils import list_fewshot_samples

        return list(list_fewshot_samples())
    task = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml"
    return list(yaml.safe_load(task.read_text(encoding="utf-8"))["fewshot_config"]["samples"])


def _competition(left_out: LeaveOut) -> dict[str, Any]:
    """What lm_eval's own MATH task does with a record and an answer, for our name of the problem."""
    from lm_eval.tasks.minerva_math import utils

    def process_docs(dataset: Any) -> Any:
        return utils.process_docs(left_out(dataset).rename_column("question", "problem"))

    return {"process_docs": process_docs, "process_results": utils.process_results}


def evaluate_suite(
    config: SuiteConfig,
    models: Sequence[str],
    out: str | os.PathLike[str],
    task_data: str | os.PathLike[str] | None = None,
    tokenizer: str | None = None,
) -> Manifest:
    """Write lm_eval's results of every task that there is, `NAME.json`, into the stage folder `out`.

    The manifest's fact `rows` is the table: name, title, questions, shots, prompts that were cut to the model's
    context, records that could not be asked, metric, value and standard error; `missing` says why a task was not
    asked. An interrupted evaluation goes on after the last task.

    Args:
        config: settings.
        models: one folder or Hugging Face name.
        out: output folder.
        task_data: folder of task data; the Hub is not asked for anything.
        tokenizer: folder or name, for a model that comes without one.

    Raises:
        ConfigError: lm_eval is not installed, or the model has no tokenizer or too small a context.
        DataError: there is no data for any task of the suite, or a file is damaged.
    """
    if len(models) != 1:
        raise ConfigError(f"--suite: expected one model, found {len(models)}. Evaluate each into a folder of its own.")
    [model] = models
    inputs = {"lm_eval": _lm_eval_version(), "model": source_hash(ModelConfig(path=model))}
    if task_data is not None and not Path(task_data).is_dir():
        raise DataError(f"{task_data}: no such folder of task data (seen from {Path.cwd()}).")
    asked = {task: ask(task, task_data) for task in tasks_of(config.suite)}
    missing = {task.name: found for task, found in asked.items() if isinstance(found, str)}
    if len(missing) == len(asked):
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in missing.items())
        raise DataError(f"no task of the suite {config.suite} can be asked:\n{reasons}")
    inputs |= _hashes({task: found for task, found in asked.items() if isinstance(found, Ask)}, task_data)
    settings = {**config.model_dump(exclude={"batch_size"}), "from": "folder" if task_data else "hub"}
    settings["tokenizer"] = tokenizer
    with open_stage(out, "suite", settings, inputs) as stage:
        if stage.fresh:
            return stage.manifest
        lm, rows = None, []
        for task, found in asked.items():
            path = stage.folder / f"{task.name}.json"
            if isinstance(found, Ask) and not path.is_file():
                lm = lm or load_lm(model, tokenizer, config)
                say(f"{config.suite}: {task.name}")
                try:
                    results = _evaluate_task(lm, model, task, found, config)
                except OSError as error:
                    missing[task.name] = f"its data could not be had from the Hub ({type(error).__name__})"
                    continue
                except _TooLong as error:
                    missing[task.name] = str(error)
                    continue
                with atomic_write(path) as file:
                    file.write(json.dumps(results, indent=1, default=str, ensure_ascii=False).encode())
            if path.is_file():
                stage.add_output(path.name)
                rows.append(json.loads(path.read_bytes())["rho"])
        return stage.finish(rows=rows, missing=missing)


def _lm_eval_version() -> str:
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise ConfigError("--suite: needs lm_eval. Install it with `pip install rho-lm[eval]`.") from None


def _hashes(asked: Mapping[Task, Ask], task_data: str | os.PathLike[str] | None) -> dict[str, str]:
    """Of all that decides what is asked: the tasks, and the files of the folder."""
    tasks = {task.name: [task.model_dump(), task.template and _yaml(task.template)] for task in asked}
    if task_data is None:
        return {"tasks": hash_json(tasks)}
    names = {name for task in asked for name in (task.path, task.examples_path)}
    names |= {name.replace(".jsonl", "_dev.jsonl") for name in names}
    paths = [path for name in sorted(names) if (path := Path(task_data) / name).is_file()]
    return {"tasks": hash_json(tasks), **{f"data:{path.name}": hash_file(path) for path in paths}}


class _TooLong(Exception):
    """A choice has more tokens than the model reads at once."""


def load_lm(model: str, tokenizer: str | None, config: SuiteConfig) -> Any:
    """The model as lm_eval's `HFLM`."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    class Reader(HFLM):
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            longest = max(len(choice) for _, _, choice in requests)
            if longest > self.max_length:  # lm_eval only asserts that there is none
                raise _TooLong(f"a choice of {longest} tokens, and the model reads {self.max_length} at once")
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant so
    source = tokenizer or model_folder(model)
    if Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file():
        raise ConfigError(f"{source}: no tokenizer.json here. Name the model's tokenizer with --tokenizer.")
    network = make_model(ModelConfig(path=model), 0).to(device()).eval()
    lm = Reader(pretrained=network, tokenizer=AutoTokenizer.from_pretrained(source), batch_size=config.batch_size)
    longest = config.max_gen_toks or lm.max_gen_toks
    if longest >= lm.max_length:
        raise ConfigError(
            f"{model}: reads {lm.max_length} tokens at once, so it can't write answers of {longest} to a question. "
            "Give a smaller --max-gen-toks."
        )
    return lm


def _evaluate_task(lm: Any, model: str, task: Task, asked: Ask, config: SuiteConfig) -> dict[str, Any]:
    """lm_eval's results of one task, with the row of the table added under `rho`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        lm,
        tasks=[asked.spec],
        task_manager=TaskManager(include_defaults=isinstance(asked.spec, str)),  # reading its own takes long
        num_fewshot=asked.shots,
        limit=config.limit,
        gen_kwargs={"max_gen_toks": config.max_gen_toks} if config.max_gen_toks else None,
    )
    results["config"]["model_args"] = {"pretrained": model}
    prompts = [sample["arguments"] for samples in results.pop("samples").values() for sample in samples]
    room = config.max_gen_toks or lm.max_gen_toks
    name = asked.spec if isinstance(asked.spec, str) else asked.spec["task"]
    metrics: dict[str, Any] = results["results"][name]
    metric = next(key for key in metrics if key.split(",")[0] == task.metric or (not task.metric and "," in key))
    results["rho"] = {
        "task": task.name,
        "title": task.title,
        "questions": sum(count["effective"] for count in results["n-samples"].values()),
        "shots": max(results["n-shot"].values()),
        "cut": sum(_is_cut(lm, arguments, room) for arguments in prompts),
        "unusable": asked.unusable,
        "metric": metric.removesuffix(",none"),
        "value": metrics[metric],
        "stderr": metrics.get(metric.replace(",", "_stderr,")),
    }
    return results


def _is_cut(lm: Any, arguments: Sequence[tuple[Any, ...]], room: int) -> bool:
    """Whether lm_eval had to cut a prompt on the left, so that the model did not see all of its examples."""
    for prompt, rest, *_ in arguments:
        length = len(lm.tok_encode(prompt))
        if isinstance(rest, str) and length + len(lm.tok_encode(rest)) > lm.max_length + 1:
            return True
        if not isinstance(rest, str) and length > lm.max_length - room:
            return True
    return False


def table(manifest: Manifest) -> str:
    """The results as text: a line a task, the mean, and why a task is missing."""
    rows, missing = manifest.facts["rows"], manifest.facts["missing"]
    lines = [["task", "n", "shots", "metric", "value", "stderr", ""]]
    for row in rows:
        notes = [f"{row['cut']} prompts cut to the model's context"] * bool(row["cut"])
        notes += [f"{row['unusable']} records can't be asked"] * bool(row["unusable"])
        numbers = [_percent(row["value"]), _percent(row["stderr"])]
        lines.append(
            [row["title"], str(row["questions"]), str(row["shots"]), row["metric"], *numbers, "; ".join(notes)]
        )
    mean = sum(row["value"] for row in rows) / max(len(rows), 1)
    lines.append([f"mean of {len(rows)}", "", "", "", _percent(mean), "", ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(width) if n in (1, 2, 4, 5) else cell.ljust(width) for n, (cell, width) in enumerate(cells)
        )
        for cells in (zip(line, widths, strict=True) for line in lines)
    ]
    titles = {task.name: task.title for task in tasks_of(manifest.config["suite"])}
    return "\n".join([*map(str.rstrip, aligned), *(f"missing: {titles[name]}: {missing[name]}" for name in missing)])


def _percent(value: float | str | None) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else ""  # lm_eval writes N/A where there is none
