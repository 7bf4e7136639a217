"""The evidence: selective training against its controls on real text, arm by arm and seed by seed.

    python benchmarks/evidence.py [FOLDER] [--size small] [--minutes 60] [--arms NAME ...] [--out runs]

Does the runs of recipes/evidence-SIZE.yaml (or of a recipe of your own) that are not in the results yet, arms in the
recipe's order, each with all seeds, and adds a JSON line for each to benchmarks/results/evidence-SIZE.jsonl. After so
many minutes, or on Ctrl-C, it stops; the same command goes on, on another machine too if the results travel. FOLDER is
where the recipe's texts are, in the place of ../shared/data; for texts of your own recipes/evidence-own.yaml says what
to put there. Once the references are there, several processes may do different arms. Ends with a page of tables and a
plot in the run's folder; `python benchmarks/write_results.py` puts the same into docs/results.md.

Seconds are CPU time of this process on a CPU, which a busy machine disturbs least (use OMP_NUM_THREADS=1), and wall
time on an accelerator.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from evidence_page import RECIPES, write_page
from evidence_results import RESULTS, UNIT, read_lines
from filelock import FileLock
from pydantic import BaseModel

from rho.compare import BlockSums, read_blocks
from rho.config import RunConfig, load_config, save_config
from rho.corpus import Corpus, CorpusConfig
from rho.errors import ConfigError, RhoError
from rho.evaluate import Checkpoint, EvaluateConfig, checkpoints_of, evaluate
from rho.models import source_hash
from rho.pipeline import Pipeline
from rho.progress import say
from rho.report.data import CONFIG, reference_folder
from rho.runs import MANIFEST, Manifest, atomic_write, environment, hash_json, make_folder, read_manifest, write_json
from rho.settings import validated
from rho.sources import source_hashes
from rho.tokenizer import Tokenizer
from rho.train import DEFAULT_ARGUMENTS

DATA = ("../shared/data", "my-texts")  # in the recipes
WALL = torch.accelerator.is_available()
SECONDS = "seconds" if WALL else "cpu_seconds"  # in a step record


def find_recipe(size: str) -> Path:
    """The recipe of a size, or at a path."""
    return Path(size) if size.endswith((".yaml", ".yml")) else RECIPES / f"evidence-{size}.yaml"


def load_experiment(recipe: Path, folder: str | None, overrides: Sequence[str]) -> RunConfig:
    """A recipe, with its texts in `folder`."""
    config = load_config(recipe, overrides)
    if folder is None:
        return config
    moved = f"{json.dumps(str(Path(folder)))[:-1]}/"
    tree = re.sub("|".join(f'"{re.escape(place)}/' for place in DATA), lambda _: moved, json.dumps(_set(config)))
    return validated(RunConfig, json.loads(tree), str(recipe))


class Identity:
    """What decides a run's result, as one hash: settings and texts, wherever they are; neither machine nor version.

    Settings left at their defaults are left out, so that a new one does not make old runs strange.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def run(self, arm: str, seed: int) -> str:
        """Hash of one arm and seed, with all that it goes on after."""
        config, section = self.config, self.config.train.arms[arm]
        return hash_json(
            {
                "train": _set(config.train.arm(arm, seed)),
                "seed": seed,
                "text": self.text(section.corpus or config.corpus),
                "start": self.run(section.after, seed) if section.after else self.start(),
                "references": {name: self.reference(name) for name in config.references_of(arm)},
                "sets": self.sets(),
            }
        )

    def reference(self, name: str) -> str:
        """Hash of one reference and its scores."""
        config = self.config.references[name]
        after = config.after and self.run(config.after, self.config.train.seeds[0])
        places = {"corpus": config.corpus and self.text(config.corpus), "after": after, "start": self.start()}
        return hash_json({**_set(config), **places, "score": _set(self.config.score), "sets": self.sets()})

    def start(self) -> Any:
        """What the arms start from."""
        model = self.config.model
        return source_hash(model) if model.path is not None else model.architecture

    def sets(self) -> dict[str, str]:
        """Hashes of the held-out sets."""
        return {name: self.text(name) for name in self.config.evaluate.sets}

    def text(self, name: str) -> str:
        """Hash of a corpus: its tokenizer, settings and content."""
        return _text(self.config.corpora[name], self.tokenizer())

    def tokenizer(self) -> str:
        """Hash of the tokenizer, or of what it is trained on."""
        config = self.config.tokenizer
        if config.path is not None:
            return Tokenizer.load(config.path, config.eos).fingerprint
        return hash_json([_set(config), [_text(self.config.corpora[name], "") for name in config.corpora]])


@cache
def _contents(sources: tuple[str, ...]) -> list[str]:
    return list(source_hashes(sources).values())


def _text(config: CorpusConfig, tokenizer: str) -> str:
    settings = {key: value for key, value in _set(config).items() if key not in ("sources", "shard_blocks")}
    own = [part.model_dump(exclude={"source"}, exclude_defaults=True) for part in config.parts]
    if any(own):  # a mix
        settings["parts"] = own
    return hash_json([tokenizer, settings, _contents(tuple(part.source for part in config.parts))])


def _set(config: BaseModel) -> dict[str, Any]:
    """The settings that are not left at their defaults."""
    return config.model_dump(mode="json", exclude_defaults=True)


class Experiment:
    """The runs of one recipe, and the file of their results.

    Args:
        config: the recipe.
        folder: the run directory.
        results: the file with a line for each run.
    """

    def __init__(self, config: RunConfig, folder: Path, results: Path) -> None:
        self.config, self.folder, self.results = config, folder, results
        self.pipeline, self.identity = Pipeline(config, folder), Identity(config)
        self.ready: set[str] = set()  # references
        self.sets = [name for name in config.evaluate.sets if name != config.target] or [config.target]

    def recorded(self, model: str, seed: int, identity: str) -> bool:
        """Whether the results have a run of just these settings and texts."""
        of = (model, seed, identity)
        return any((line["model"], line["seed"], line["identity"]) == of for line in read_lines(self.results))

    def lines(self) -> list[dict[str, Any]]:
        """The results of just these settings and texts; the file may hold others of the same name."""
        seeds, arms = self.config.train.seeds, self.config.train.arms
        own = {(arm, seed, self.identity.run(arm, seed)) for arm in arms for seed in seeds}
        for name, reference in self.config.references.items():
            own.add((reference_folder(name), reference.seed, self.identity.reference(name)))
        return [one for one in read_lines(self.results) if (one["model"], one["seed"], one["identity"]) in own]

    def run(self, arms: Sequence[str]) -> None:
        """Every run of these arms that is not recorded."""
        if unknown := [arm for arm in arms if arm not in self.config.train.arms]:
            raise ConfigError(
                f"no arm {', '.join(unknown)} in {self.config.name}; found {', '.join(self.config.train.arms)}."
            )
        seeds = self.config.train.seeds
        left = [
            (arm, seed) for arm in arms for seed in seeds if not self.recorded(arm, seed, self.identity.run(arm, seed))
        ]
        say(f"{self.config.name}: {len(left)} of {len(arms) * len(seeds)} runs to do")
        if left:
            self.pipeline.begin()
            self.pipeline.corpora()
            save_config(self.config, self.folder / CONFIG)
        for arm, seed in left:
            self.train(arm, seed)

    def train(self, arm: str, seed: int) -> None:
        """Do one run, after the references that it needs, and add it to the results."""
        lineage = self.config.lineage(arm)
        self.prepare(lineage)
        self.pipeline.train(arm, seed)
        names = sorted(self.selected_by(lineage))
        folders = [self.pipeline.train_folder(one, seed) for one in lineage]
        self.add(
            arm,
            seed,
            self.identity.run(arm, seed),
            folders,
            self.pipeline.checkpoints(arm, seed),
            settings=_set(self.config.train.arms[arm]),
            reference_seconds=self.reference_seconds(names, folders),
            scoring_seconds={name: self.spent().get(name, 0.0) for name in names},
        )

    def selected_by(self, arms: Sequence[str]) -> set[str]:
        """The references that these arms cost: those that select for them, or an arm they go on after."""
        selecting = [arm for arm in arms if self.config.train.arms[arm].selector.columns]
        names = {name for arm in selecting for name in self.config.references_of(arm)}
        before = [after for name in names if (after := self.config.references[name].after) is not None]
        return names.union(*(self.selected_by(self.config.lineage(arm)) for arm in before))

    def reference_seconds(self, names: Sequence[str], counted: Sequence[Path]) -> dict[str, float]:
        """What the trainings of some references took, with the arms that they go on after; each folder counts once."""
        found, counted, first = {}, [*counted], self.config.train.seeds[0]
        for name in names:
            reference = self.config.references[name]
            if reference.corpus is None:  # a finished model
                continue
            arms = [] if reference.after is None else self.config.lineage(reference.after)
            folders = [self.pipeline.train_folder(arm, first) for arm in arms] + [self.folder / reference_folder(name)]
            found[name] = _seconds([folder for folder in folders if folder not in counted])[-1][1]
            counted += folders
        return found

    def prepare(self, arms: Sequence[str]) -> None:
        """Make the references that these arms need."""
        for arm in arms:
            for name in self.config.references_of(arm):
                self.reference(name)

    def reference(self, name: str) -> None:
        """Train a reference, record what it is itself worth, and let it score."""
        config = self.config.references[name]
        if name in self.ready:
            return
        if config.after is not None:
            self.prepare(self.config.lineage(config.after))
            self.pipeline.train(config.after, self.config.train.seeds[0])
        if config.corpus is not None:
            self.pipeline.reference(name)
        label, identity = reference_folder(name), self.identity.reference(name)
        if config.corpus is not None and not self.recorded(label, config.seed, identity):
            folder = self.folder / label
            self.add(label, config.seed, identity, [folder], checkpoints_of(folder, label), settings=_set(config))
        if not config.online:
            with self.timed(name, self.pipeline.scores_folder(name)):
                self.pipeline.scores(name)
        self.ready.add(name)

    @contextmanager
    def timed(self, name: str, stage: Path) -> Iterator[None]:
        """Add the seconds of a stage to those that an interrupted call spent on it."""
        began, finished = _clock(), is_complete(stage)
        try:
            yield
        finally:
            if not finished:
                spent = self.spent()
                write_json(self.folder / "spent.json", {**spent, name: spent.get(name, 0.0) + _clock() - began})

    def spent(self) -> dict[str, float]:
        """Seconds of scoring, by reference."""
        file = self.folder / "spent.json"
        return json.loads(file.read_bytes()) if file.is_file() else {}

    def add(
        self, model: str, seed: int, identity: str, folders: list[Path], checkpoints: list[Checkpoint], **more: Any
    ) -> None:
        """Evaluate a training's checkpoints on the target, the last one on every other set, and add its line."""
        corpora = self.pipeline.sets()
        config = EvaluateConfig(**self.config.evaluate.model_dump(exclude={"sets", "explore"}))
        made_with = read_manifest(folders[-1], "train").config["arguments"]
        every = made_with.get("save_steps", DEFAULT_ARGUMENTS["save_steps"])  # an interruption leaves others between
        last = replace(checkpoints[-1], model=str(folders[-1] / "model"), content=None)
        regular = [one for one in checkpoints[:-1] if (one.step or 0) % every == 0 and Path(one.model).is_dir()]
        out = self.folder / "evidence" / folders[-1].name
        target = {self.config.target: corpora[self.config.target]}
        curve = _lines(evaluate(config, [*regular, last], target, out), out)
        out = out.with_name(f"{out.name}-last")
        made = evaluate(config, [last], {name: corpora[name] for name in self.sets}, out)
        steps = [json.loads(line) for line in (folders[-1] / "steps.jsonl").read_text().splitlines()]
        logged, seconds = zip(*_seconds(folders), strict=True)
        line = {
            "experiment": self.config.name,
            "target": self.config.target,
            "model": model,
            "seed": seed,
            "identity": identity,
            "parameters": _parameters(folders[-1] / "model"),
            "train_tokens": last.tokens_seen,
            "ratio": round(sum(one["selected"] for one in steps) / sum(one["eligible"] for one in steps), 4),
            "curve": {
                "tokens": [row["tokens_seen"] for row in curve],
                "selected": [row["tokens_selected"] for row in curve],
                "seconds": np.interp([row["step"] for row in curve], logged, seconds).round(1).tolist(),
                "loss": [round(row["loss"], 5) for row in curve],
            },
            "final": {
                row["set"]: {key: round(row[key], 5) for key in ("loss", "bits_per_byte")} for row in _lines(made, out)
            },
            "units": {sums.set: _units(sums, corpora[sums.set]) for sums in read_blocks(out, made)},
            **more,
            "hashes": _hashes(folders[-1]),
            "environment": {**environment(), "device": _device(), "threads": torch.get_num_threads()},
            "clock": "wall time" if WALL else "CPU time",
        }
        with FileLock(f"{self.results}.lock"):  # another process may be doing other arms
            found = self.results.read_bytes() if self.results.is_file() else b""
            with atomic_write(self.results) as file:
                file.write(found + json.dumps(line).encode() + b"\n")
        shutil.rmtree(folders[-1] / "checkpoints", ignore_errors=True)  # a hundred runs are many gigabytes
        say(f"{model}, seed {seed}: {self.sets[0]} {line['final'][self.sets[0]]['loss']:.4f}, in {self.results}")


def _clock() -> float:
    return time.monotonic() if WALL else time.process_time()


def is_complete(stage: Path) -> bool:
    """Whether a stage is there and finished."""
    return (stage / MANIFEST).is_file() and json.loads((stage / MANIFEST).read_bytes())["status"] == "complete"


def _seconds(folders: Sequence[Path]) -> list[tuple[int, float]]:
    """(step, seconds of training so far) of the last of some trainings, each after the other."""
    so_far, found = 0.0, []
    for folder in folders:
        found = []
        for line in (folder / "steps.jsonl").read_text().splitlines():
            record = json.loads(line)
            so_far += record[SECONDS]
            found.append((record["step"], so_far))
    return found


def _lines(made: Manifest, folder: Path) -> list[dict[str, Any]]:
    assert made.status == "complete"
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def _units(sums: BlockSums, corpus: Corpus) -> dict[str, list[float]]:
    """Sums over about `UNIT` tokens of neighbouring blocks."""
    starts = np.arange(0, len(sums.tokens_B), max(UNIT // corpus.block_length, 1))
    nats, tokens = (np.add.reduceat(values, starts) for values in (sums.nats_B, sums.tokens_B))
    return {"nats": np.round(nats, 2).tolist(), "tokens": tokens.tolist()}


def _hashes(folder: Path) -> dict[str, Any]:
    """Of what the training read, and of its weights."""
    made = read_manifest(folder, "train")
    weights = {name: of["sha256"] for name, of in made.outputs.items() if name.endswith(".safetensors")}
    return {**made.inputs, "weights": weights}


def _parameters(folder: Path) -> int:
    """Numbers in a model's weights; tied ones count once."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return total


def _device() -> str:
    """What a reader calls it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Do what there is time for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help=f"where the texts are, instead of {' or '.join(DATA)}")
    parser.add_argument("--size", default="small", help="of recipes/evidence-SIZE.yaml, or the path of a recipe")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--arms", nargs="+", help="those of the recipe unless given")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="key.of.it=value in the recipe")
    options = parser.parse_args()
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes: expected more than 0, found {options.minutes}")
    if options.minutes is not None:  # Ctrl-C is what training answers with a checkpoint
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    config = load_experiment(find_recipe(options.size), options.folder, options.overrides)
    folder, results = options.out / config.name, options.results / f"{config.name}.jsonl"
    make_folder(options.results)
    experiment = Experiment(config, folder, results)
    try:
        experiment.run(options.arms or list(config.train.arms))
    except KeyboardInterrupt:
        say("stopped. What is finished is recorded, what is not goes on with the same command.")
    signal.setitimer(signal.ITIMER_REAL, 0)
    if lines := experiment.lines():
        print(write_page(lines, folder))


if __name__ == "__main__":
    try:
        main()
    except RhoError as error:
        sys.exit(f"error: {error}")
