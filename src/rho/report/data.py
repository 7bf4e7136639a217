"""What the report reads from a run directory, as typed records."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rho.compare import BLOCKS, BlockSums, read_blocks
from rho.errors import DataError
from rho.rows import TokenRow, read_classes, read_rows
from rho.runs import MANIFEST, Manifest, hash_file, read_manifest

REFERENCE = "reference"
CONFIG = "config.yaml"
DOMAINS = "domains.jsonl"
Record = TypeVar("Record")


@dataclass(frozen=True)
class Evaluation:
    """One model's loss on one set; the reference model's seed is 0."""

    arm: str
    seed: int
    step: int
    tokens_seen: int
    tokens_selected: int
    set: str
    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class Domain(Evaluation):
    """One model's loss on the tokens of one source, or of one label, in a set."""

    by: str
    domain: str
    tokens: int


@dataclass(frozen=True)
class Step:
    """One logged optimizer step; a value that the step does not have is NaN or missing from its mapping."""

    step: int
    tokens_seen: int
    eligible: int
    selected: int
    loss_selected: float
    loss_unselected: float
    loss_all: float
    excess: dict[str, float]
    labels: dict[str, tuple[int, int]]
    tokens_per_second: float
    seconds: float  # since the entry before
    filtered: dict[str, float]  # cosine and norm ratio of a filtered gradient to the exact one, where compared


@dataclass(frozen=True)
class ArmDynamics:
    """What `rho.dynamics_summary.summarise` made of one trained model."""

    arm: str
    seed: int
    summary: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything the report shows. `stages` maps a stage's folder to its manifest, None where it is not finished.

    `domains` and `blocks` are of the last checkpoint of each arm and seed, on each set. `after` names the arm that an
    arm goes on after, `before` the stage folders that come before these trainings: the references', their scores.
    """

    name: str
    config: str
    stages: dict[str, Manifest | None]
    target: str
    evaluations: list[Evaluation]
    steps: dict[tuple[str, int], list[Step]]
    tokens: list[TokenRow]
    dynamics: list[ArmDynamics]
    blocks: dict[tuple[str, int, str], BlockSums] = field(default_factory=dict)
    domains: list[Domain] = field(default_factory=list)
    after: dict[str, str] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """The trained arms, those evaluated first, in the config's order."""
        names = [row.arm for row in self.evaluations] + [arm for arm, _ in self.steps]
        return [name for name in dict.fromkeys(names) if not is_reference(name)]

    @property
    def references(self) -> list[str]:
        """The references that were evaluated: `reference`, or several as `reference-NAME`."""
        return list(dict.fromkeys(row.arm for row in self.evaluations if is_reference(row.arm)))

    def seeds(self, arm: str) -> list[int]:
        """The seeds for which `arm` was evaluated or has logged steps."""
        evaluated = {row.seed for row in self.evaluations if row.arm == arm}
        return sorted(evaluated | {seed for name, seed in self.steps if name == arm})

    def curve(self, arm: str, seed: int, name: str) -> list[Evaluation]:
        """The evaluations of one trained model on the set `name`, by step."""
        by_step = {row.step: row for row in self.evaluations if (row.arm, row.seed, row.set) == (arm, seed, name)}
        return [by_step[step] for step in sorted(by_step)]

    def selective(self, arm: str) -> bool:
        """Whether `arm` left out any eligible token in a logged step."""
        return any(s.selected < s.eligible for (name, _), steps in self.steps.items() if name == arm for s in steps)


def is_reference(arm: str) -> bool:
    """Whether an evaluated model is a reference, no arm: references are called `reference` or `reference-NAME`."""
    return arm == REFERENCE or arm.startswith(f"{REFERENCE}-")


def read_run(run: Path) -> Run:
    """Read the run directory; a `DataError` if no evaluate stage in it is finished or a file is damaged."""
    stages = _stages(run)
    evaluated = {name: made for name, made in stages.items() if made and name.split("/")[0] == "evaluate"}
    if not evaluated:
        raise DataError(
            f"{run}: the report needs a finished evaluate stage, found none in {run / 'evaluate'}. "
            "Run that stage first, then the report."
        )
    config = run / CONFIG
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    target = _target(config, text, list(evaluated.values()))
    tree = _tree(text) or {}
    asked = _asked(tree)
    if asked is not None:
        evaluated = {
            f"evaluate/{name}": evaluated[f"evaluate/{name}"] for name in asked if f"evaluate/{name}" in evaluated
        }
    return Run(
        name=str(tree.get("name") or run.resolve().name),
        config=text,
        stages=stages,
        target=target,
        evaluations=[
            row for name, made in evaluated.items() for row in _lines(run, name, "losses.jsonl", made, _evaluation)
        ],
        steps=_steps(run, stages, asked),
        tokens=[row for name in evaluated for row in _tokens(run, name, stages)],
        dynamics=_dynamics(run, stages, asked),
        blocks=_blocks(run, evaluated),
        domains=[row for name, made in evaluated.items() for row in _domains(run, name, made)],
        after=_after(tree),
        before=_before(tree, stages),
    )


def _stages(run: Path) -> dict[str, Manifest | None]:
    folders = {path.parent for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}") for path in run.glob(pattern)}
    stages: dict[str, Manifest | None] = {}
    for folder in sorted(folders - {run / "report"}):
        try:
            stages[folder.relative_to(run).as_posix()] = read_manifest(folder)
        except DataError:
            stages[folder.relative_to(run).as_posix()] = None
    return stages


def _tree(config: str) -> dict[str, Any] | None:
    """The config's settings; None if it is not YAML."""
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return None
    return tree if isinstance(tree, dict) else {}


def _asked(tree: dict[str, Any]) -> list[str] | None:
    """Folder names of the references and trained models that the config names, in its order; None if it names none.

    Others are of an earlier config of the run.
    """
    train, references = tree.get("train"), tree.get("references")
    if not isinstance(train, dict) or not isinstance(train.get("arms"), dict):
        return None
    names = references if isinstance(references, dict) else {REFERENCE: None}
    models = [f"{arm}-seed{seed}" for arm in train["arms"] for seed in train.get("seeds", [0])]
    return [*map(reference_folder, names), *models]


def reference_folder(name: str) -> str:
    """A reference's folder, and its name in the report."""
    return REFERENCE if name == REFERENCE else f"{REFERENCE}-{name}"


def _target(path: Path, config: str, evaluated: list[Manifest]) -> str:
    """The target set's name: as an evaluate stage noted it, else the config's, else `target`."""
    if noted := [made.facts["target"] for made in evaluated if "target" in made.facts]:
        return str(noted[0])
    if (tree := _tree(config)) is None:
        raise DataError(f"{path}: is not YAML. Restore the file that the run wrote.")
    return str(tree.get("target", "target"))


def _steps(run: Path, stages: dict[str, Manifest | None], asked: list[str] | None) -> dict[tuple[str, int], list[Step]]:
    steps = {}
    for path in [*sorted(run.glob(f"{REFERENCE}*/steps.jsonl")), *sorted(run.glob("train/*/steps.jsonl"))]:
        folder = path.parent.relative_to(run).as_posix()
        if asked is not None and path.parent.name not in asked:
            continue
        name = re.fullmatch(r"train/(.+)-seed(\d+)", folder, re.DOTALL)
        if name or is_reference(folder):
            key = (name[1], int(name[2])) if name else (folder, 0)
            steps[key] = _lines(run, folder, path.name, stages.get(folder), _step)
    return steps


def _dynamics(run: Path, stages: dict[str, Manifest | None], asked: list[str] | None) -> list[ArmDynamics]:
    found = []
    for folder, manifest in stages.items():
        name = re.fullmatch(r"dynamics/(.+)-seed(\d+)", folder, re.DOTALL)
        if name is None or manifest is None or (asked is not None and folder.split("/")[1] not in asked):
            continue
        path = run / folder / "summary.json"
        try:
            _intact(path, manifest)
            found.append(ArmDynamics(name[1], int(name[2]), json.loads(path.read_bytes())))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: can't be read ({error}). Run the dynamics stage again.") from error
    return found


def _intact(path: Path, manifest: Manifest | None) -> None:
    """Refuse a file that is not the one its finished stage recorded."""
    recorded = manifest.outputs.get(path.name) if manifest else None
    if recorded and hash_file(path) != recorded["sha256"]:
        raise DataError(f"{path}: changed since its stage wrote it. Restore it or run that stage again.")


def _lines(
    run: Path, folder: str, name: str, manifest: Manifest | None, parse: Callable[[dict[str, Any]], Record]
) -> list[Record]:
    path = run / folder / name
    if not path.is_file():
        raise DataError(f"{path}: expected a file of JSON lines, found none. Run the stage of this folder again.")
    _intact(path, manifest)
    *lines, tail = path.read_bytes().split(b"\n")
    if manifest:  # of a stage still at work, the last line may be half written
        lines.append(tail)
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(parse(json.loads(line)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: not a record of this file ({type(error).__name__}: {error}). "
                "Restore the file or run its stage again."
            ) from error
    return records


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _evaluation(row: dict[str, Any]) -> Evaluation:
    return Evaluation(**_measured(row))


def _domain(row: dict[str, Any]) -> Domain:
    name = row["domain"]
    return Domain(
        **_measured(row), by=str(row["by"]), domain="" if name is None else str(name), tokens=int(row["tokens"])
    )


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "arm": str(row["arm"]),
        "seed": 0 if is_reference(str(row["arm"])) else int(row["seed"]),
        "step": int(row["step"] or 0),
        "tokens_seen": int(row["tokens_seen"] or 0),
        "tokens_selected": int(row["tokens_selected"] or 0),
        "set": str(row["set"]),
        "loss": _number(row["loss"]),
        "bits_per_byte": _number(row["bits_per_byte"]),
    }


def _step(row: dict[str, Any]) -> Step:
    return Step(
        step=int(row["step"]),
        tokens_seen=int(row.get("tokens_seen") or 0),
        eligible=int(row["eligible"]),
        selected=int(row["selected"]),
        loss_selected=_number(row.get("loss_selected")),
        loss_unselected=_number(row.get("loss_unselected")),
        loss_all=_number(row.get("loss_all")),
        excess={key: _number(value) for key, value in (row.get("excess") or {}).items()},
        labels={key: (int(n["eligible"]), int(n["selected"])) for key, n in (row.get("labels") or {}).items()},
        tokens_per_second=_number(row.get("tokens_per_second")),
        seconds=_number(row.get("seconds")),
        filtered={key: _number(value) for key, value in (row.get("filtered") or {}).items()},
    )


def _tokens(run: Path, name: str, stages: dict[str, Manifest | None]) -> list[TokenRow]:
    """The token rows of one evaluated model, with their classes where its dynamics were followed on the same text."""
    path, made = run / name / "tokens.parquet", stages[name]
    if not path.is_file():
        return []
    _intact(path, made)
    rows = read_rows(path)
    folder = name.replace("evaluate", "dynamics", 1)
    followed = stages.get(folder)
    if made is None or followed is None or followed.inputs.get("set") != made.inputs.get("explore", ""):
        return rows
    _intact(run / folder / "tokens.parquet", followed)
    classes = read_classes(run / folder / "tokens.parquet", {row.block for row in rows})
    return [replace(row, dynamics=classes.get((row.block, row.position))) for row in rows]


def _domains(run: Path, folder: str, made: Manifest) -> list[Domain]:
    """Of the last checkpoint; of a run made before there was such a file, none."""
    rows = _lines(run, folder, DOMAINS, made, _domain) if DOMAINS in made.outputs else []
    last = {(row.arm, row.seed, row.set): row.step for row in sorted(rows, key=lambda row: row.step)}
    return [row for row in rows if row.step == last[row.arm, row.seed, row.set]]


def _after(tree: dict[str, Any]) -> dict[str, str]:
    arms = (tree.get("train") or {}).get("arms") or {}
    return {arm: settings["after"] for arm, settings in arms.items() if (settings or {}).get("after")}


def _before(tree: dict[str, Any], stages: dict[str, Manifest | None]) -> dict[str, list[str]]:
    """For each arm of the config the stage folders of this run that come before it and those it goes on after.

    An arm whose selection reads no column of scores needs none. Those of a reference are its training (and that of the
    arm that it goes on after) and its scores.
    """
    train, references, after = tree.get("train") or {}, tree.get("references"), _after(tree)
    arms, seed = train.get("arms") or {}, train.get("seeds", [0])[0]
    if not isinstance(references, dict):
        references = {REFERENCE: tree.get(REFERENCE) or {}}

    def folders(arm: str) -> list[str]:
        found = folders(after[arm]) if arm in after else []
        made = next((stages[name] for name in stages if _is_training(name, arm)), None)
        if made is None or not made.facts.get("columns", True):
            return found
        for name in ((arms[arm] or {}).get("references") or {}).get("names") or references:
            trained = (references.get(name) or {}).get("after")
            found += [*folders(trained), f"train/{trained}-seed{seed}"] if trained else []
            found += [reference_folder(name), f"scores/{name}"]
        return [name for name in dict.fromkeys(found) if name in stages]

    return {arm: folders(arm) for arm in arms}


def _is_training(folder: str, arm: str) -> bool:
    return re.fullmatch(rf"train/{re.escape(arm)}-seed\d+", folder) is not None


def _blocks(run: Path, evaluated: dict[str, Manifest]) -> dict[tuple[str, int, str], BlockSums]:
    """Of the last checkpoints; of a run made before there was such a file, none."""
    last: dict[tuple[str, int, str], BlockSums] = {}
    for name, made in evaluated.items():
        for row in read_blocks(run / name, made) if BLOCKS in made.outputs else []:
            key = (row.arm, 0 if is_reference(row.arm) else row.seed, row.set)
            if key not in last or (row.step or 0) >= (last[key].step or 0):
                last[key] = row
    return last
