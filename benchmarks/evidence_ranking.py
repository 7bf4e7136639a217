"""The evidence's multiple-choice questions: how often a model finds the right answer the likeliest.

    python benchmarks/evidence_ranking.py [FOLDER] [--size small] [--questions 500] [--out runs]

Asks every finished model of benchmarks/evidence.py that is in the run's folder, arms and references, and adds a JSON
line for each to benchmarks/results/ranking-evidence-SIZE.jsonl. Those that are there already are left out: the same
command goes on. FOLDER is the one given to benchmarks/evidence.py; its folder `eval` holds a file of questions for each
task (`rho evaluate --suite`, docs/evaluation.md). Asked are the tasks of all suites that rank the choices themselves: a
small model tells the letters A to D from each other by chance. Needs the extra `eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from evidence import DATA, Identity, find_recipe, is_complete, load_experiment
from evidence_results import RESULTS, read_lines

from rho.errors import RhoError
from rho.pipeline import Pipeline
from rho.progress import say
from rho.report.data import reference_folder
from rho.suites import Suite, SuiteConfig, Task, evaluate_suite, read_records, tasks_of

# The templates that rank, and the field of what is ranked.
CHOICES = {"choice": "choices", "continuation": "choices", "winograd": "context_options"}


def ask(model: Path, questions: Path, out: Path, limit: int) -> list[dict[str, Any]]:
    """The rows of all ranking tasks that there are questions for, each once, with what guessing would give."""
    rows: dict[str, dict[str, Any]] = {}
    for suite in get_args(Suite):
        wanted = [task for task in tasks_of(suite) if task.template in CHOICES and task.name not in rows]
        tasks = {task.name: task for task in wanted if (questions / task.path).is_file()}
        if not tasks:
            continue
        with TemporaryDirectory() as folder:  # what is not in the folder is not asked
            for task in tasks.values():
                (Path(folder) / task.path).symlink_to((questions / task.path).resolve())
            config = SuiteConfig(suite=suite, limit=limit, max_gen_toks=1)  # nothing is written out
            made = evaluate_suite(config, [str(model)], out / suite, folder)
        for row in made.facts["rows"]:
            rows[row["task"]] = {**row, "chance": chance(tasks[row["task"]], questions, limit)}
    return list(rows.values())


def chance(task: Task, questions: Path, limit: int) -> float:
    """How often guessing is right, of the questions asked: the first `limit`."""
    field = CHOICES[str(task.template)]
    numbers = [len(record[field]) for record in read_records(questions / task.path, [field])][:limit]
    return sum(1 / number for number in numbers if number) / len(numbers)


def main() -> None:
    """Ask every model that is there and was not asked yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help=f"where the texts are, instead of {' or '.join(DATA)}")
    parser.add_argument("--size", default="small", help="of recipes/evidence-SIZE.yaml, or the path of a recipe")
    parser.add_argument("--questions", type=int, default=500, help="of each task, at most")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    options = parser.parse_args()
    config = load_experiment(find_recipe(options.size), options.folder, [])
    pipeline, identity = Pipeline(config, options.out / config.name), Identity(config)
    models = [
        (arm, seed, pipeline.train_folder(arm, seed), identity.run(arm, seed))
        for seed in config.train.seeds
        for arm in config.train.arms
    ]
    for name, reference in config.references.items():
        label = reference_folder(name)
        models.append((label, reference.seed, pipeline.folder / label, identity.reference(name)))
    questions, results = Path(options.folder or DATA[0]) / "eval", options.results / f"ranking-{config.name}.jsonl"
    for model, seed, folder, made in models:
        of = (model, seed, made, options.questions)
        known = [tuple(line[key] for key in ("model", "seed", "identity", "questions")) for line in read_lines(results)]
        if of in known or not is_complete(folder):
            continue
        rows = ask(folder, questions, pipeline.folder / "ranking" / folder.name, options.questions)
        line = {"experiment": config.name, "model": model, "seed": seed, "identity": made, "rows": rows}
        with results.open("a") as file:
            file.write(json.dumps({**line, "questions": options.questions}) + "\n")
        say(f"{model}, seed {seed}: " + ", ".join(f"{row['title']} {row['value']:.3f}" for row in rows))


if __name__ == "__main__":
    try:
        main()
    except RhoError as error:
        sys.exit(f"error: {error}")
