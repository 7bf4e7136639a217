"""The weights do not depend on how an optimizer step is cut into micro-batches and ranks: two real gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distributed_worker import by_fully_shard
from rho.corpus import Corpus
from rho.models import ModelConfig
from rho.references.model import mean_loss
from rho.store import ScoreStore
from rho.train import TrainConfig, train

WORKER = Path(__file__).parent / "distributed_worker.py"
# per-device batch x accumulation x ranks; 8 rows a step
CUTS = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)]


def largest_relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)


SELECTIONS = {
    "excess-sequence": {"score": "excess", "scope": "sequence"},
    "excess-step": {"score": "excess", "scope": "step"},
    "random-step": {"score": "random", "scope": "step"},
    "intersection-step": {
        "score": "excess",
        "scope": "step",
        "second": {"score": "ref_entropy", "ratio": 0.7, "scope": "step"},
    },
    "entropy-dataset": {"score": "ref_entropy", "scope": "dataset"},
    "softmax-sequence": {"score": "excess", "scope": "sequence", "weighting": "softmax"},
    "excess-batch": {"score": "excess", "scope": "batch"},
    "retention-sequence": {"score": "excess", "scope": "sequence", "retention": 0.3},
}
EPOCH = {"num_train_epochs": 1}  # its last step has fewer rows than the others
STEPS = {"max_steps": 4}


def settings(cut: tuple[int, int, int], selection: dict, length: dict) -> dict:
    size, accumulation, _ = cut
    arguments = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "use_cpu": True,
    }
    return {"ratio": 0.6, **selection, "arguments": {**arguments, **length}}


# 5 rows do not divide the evaluation set
EVALUATED = settings((4, 1, 2), SELECTIONS["random-step"], {"max_steps": 1})
EVALUATED["arguments"] |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 5}
EVALUATED["arguments"] |= {"save_strategy": "steps", "save_steps": 1}


def name_of(selection: str, cut: tuple[int, int, int], length: dict) -> str:
    return "-".join([selection, *map(str, cut), *length])


@pytest.fixture(scope="module")
def weights(
    corpus: Path, scores: Path, architecture: dict, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, torch.Tensor]]:
    """Weights of a selection trained with a cut; everything that needs two processes is trained in one launch."""
    out = tmp_path_factory.mktemp("distributed")
    base = {"corpus": str(corpus), "scores": str(scores), "architecture": architecture}
    jobs = []
    for name, selection in SELECTIONS.items():
        for cut in CUTS:
            for length in (STEPS, EPOCH) if name == "excess-step" else (STEPS,):
                if cut[2] == 2:
                    config = settings(cut, selection, length)
                    jobs.append(
                        {**base, "how": "trainer", "config": config, "out": str(out / name_of(name, cut, length))}
                    )
    jobs.append({**base, "how": "trainer", "config": EVALUATED, "target": True, "out": str(out / "evaluated")})
    for scope in ("sequence", "step"):
        jobs.append({**base, "how": "fully_shard", "scope": scope, "out": str(out / f"sharded-{scope}")})
    (out / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TRANSFORMERS_VERBOSITY": "error"}
    command = [*launcher, str(WORKER), str(out / "jobs.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]

    def of(selection: str, cut: tuple[int, int, int], length: dict = STEPS) -> dict[str, torch.Tensor]:
        folder = out / name_of(selection, cut, length)
        if not folder.exists():
            config = TrainConfig.model_validate(settings(cut, SELECTIONS[selection], length))
            train(config, Corpus(corpus), ModelConfig(architecture=architecture), folder, ScoreStore(scores))
        return load_file(folder / "model" / "model.safetensors")

    of.folder = out  # type: ignore[attr-defined]
    return of


@pytest.mark.parametrize("name", [name for name in SELECTIONS if name != "excess-batch"])
def test_an_invariant_scope_trains_to_the_same_weights_for_every_cut(name: str, weights: Callable) -> None:
    for cut in CUTS[1:]:
        assert largest_relative_difference(weights(name, cut), weights(name, CUTS[0])) < 1e-6, cut


def test_a_ragged_last_window_is_no_exception(weights: Callable) -> None:
    for cut in CUTS[1:]:
        whole = weights("excess-step", CUTS[0], EPOCH)
        assert largest_relative_difference(weights("excess-step", cut, EPOCH), whole) < 1e-6, cut


def test_two_ranks_evaluate_each_row_once(weights: Callable, corpus: Path) -> None:
    checkpoint = weights.folder / "evaluated" / "checkpoints" / "checkpoint-1"  # type: ignore[attr-defined]
    [logged] = [
        entry
        for entry in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        if "eval_loss" in entry
    ]
    held_out = Corpus(corpus, "validation")
    assert len(held_out) % 10, "the ranks must not come out even"
    expected = mean_loss(AutoModelForCausalLM.from_pretrained(checkpoint), held_out)
    assert logged["eval_tokens"] == expected.tokens
    assert logged["eval_loss"] == pytest.approx(expected.nats_per_token, rel=1e-5)


def test_scope_batch_is_not_invariant(weights: Callable) -> None:
    assert largest_relative_difference(weights("excess-batch", CUTS[1]), weights("excess-batch", CUTS[0])) > 1e-5


@pytest.mark.parametrize("scope", ["sequence", "step"])
def test_fully_sharded_ranks_train_to_the_same_weights_as_one_process(
    scope: str, weights: Callable, corpus: Path, scores: Path, architecture: dict, tmp_path: Path
) -> None:
    job = {"corpus": str(corpus), "scores": str(scores), "architecture": architecture, "scope": scope}
    by_fully_shard({**job, "out": str(tmp_path / "one")})
    two = load_file(weights.folder / f"sharded-{scope}" / "weights.safetensors")  # type: ignore[attr-defined]
    assert largest_relative_difference(two, load_file(tmp_path / "one" / "weights.safetensors")) < 1e-6


LEAVES = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from rho.distributed import leave

def of_group():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)

leave()  # there is no group yet
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
model(torch.ones(2, 4)).sum().backward()
model.trainer = [model]  # a cycle, as trainers and their callbacks are
before = of_group()
del model
leave()
print(before > 0, of_group(), dist.is_initialized())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="names of threads are read from /proc")
def test_leaving_ends_the_threads_of_the_group(tmp_path: Path) -> None:
    """One that still freed a tensor while the interpreter ends would abort the process."""
    command = [sys.executable, "-c", LEAVES, str(tmp_path / "meeting")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("True 0 False\n", 0), done.stderr
