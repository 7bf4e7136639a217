"""What scoring costs: its speed and memory against a bare forward of the same model, and its store.

    python benchmarks/scoring.py [PART ...]

`speed` and `memory` run on the accelerator where there is one (a 1.1 B Llama with random weights, 2,048 tokens, bf16),
else on the CPU (the demo's model and a wider one). `store` trains the demo's reference, scores the demo's noisy corpus
with it, and reads that as training does; it belongs on a CPU. The result is written, part by part, to
benchmarks/results/scoring-MACHINE.json; `python benchmarks/write_results.py` makes docs/results.md of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rho.models import ModelConfig, Precision, device, hidden_states, make_model
from rho.objective import IGNORE_INDEX, predictors, token_labels
from rho.references.model import score_batch
from rho.runs import environment, write_json

RESULTS = Path(__file__).parent / "results"
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16


class Size(NamedTuple):
    """A model and the batches it scores."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    rows: int
    tokens: int
    batches: int
    tied: bool = True
    precision: Precision = "float32"

    def model(self) -> PreTrainedModel:
        """With random weights, ready to score."""
        architecture = {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.tokens,
            "tie_word_embeddings": self.tied,
        }
        with device():
            model = make_model(ModelConfig(architecture=architecture), self.vocab, precision=self.precision)
        return model.eval().requires_grad_(False)

    def batch(self, seed: int) -> dict[str, Tensor]:
        """Random tokens, on the device."""
        ids = torch.randint(self.vocab, (self.rows, self.tokens), generator=torch.Generator().manual_seed(seed))
        positions = torch.arange(self.tokens).expand_as(ids)
        return {"input_ids": ids.to(device()), "position_ids": positions.to(device())}

    def flops_a_token(self, model: PreTrainedModel) -> float:
        """Of a forward with head: two for each weight that is multiplied, and causal attention."""
        inner = sum(p.numel() for p in model.base_model.parameters()) - self.vocab * self.hidden
        return 2 * (inner + self.vocab * self.hidden) + 2 * self.layers * self.tokens * self.hidden


SIZES = {
    "cpu": {
        "demo": Size(128, 4, 4, 4, 352, 4096, rows=4, tokens=256, batches=16),
        "256 wide, 8 layers": Size(256, 8, 8, 8, 704, 32_000, rows=4, tokens=512, batches=2),
    },
    "cuda": {
        "llama 1.1B": Size(2048, 22, 32, 4, 5632, 32_000, 8, tokens=2048, batches=8, tied=False, precision="bfloat16"),
    },
}
Batch = dict[str, Tensor]
Work = Callable[[PreTrainedModel, Batch], Any]


@torch.no_grad()
def bare(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A forward to the logits, and nothing done with them."""
    return model(**batch, use_cache=False).logits


@torch.no_grad()
def usual(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The recipe that one finds: all logits, their log-probabilities in float32, those of the tokens."""
    labels = token_labels(batch["input_ids"], batch["position_ids"])
    log_p = predictors(bare(model, batch)).float().log_softmax(-1)
    return -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == IGNORE_INDEX, torch.nan)


def scored(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the score stage does: loss and entropy."""
    return score_batch(model, batch, entropy=True)


def loss_only(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The loss alone."""
    return score_batch(model, batch)[0]


@torch.no_grad()
def without_head(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The forward to the hidden states."""
    return hidden_states(model, **{f"{name}_BT": ids for name, ids in batch.items()})


WORKS: dict[str, Work] = {"bare forward": bare, "loss and entropy": scored, "loss": loss_only, "usual recipe": usual}


def synchronize() -> None:
    """Wait for the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(work: Work, model: PreTrainedModel, batches: list[Batch]) -> float:
    """How long one pass over the batches takes: of CPU time on a CPU, which a busy machine disturbs least."""
    clock = time.process_time if device().type == "cpu" else time.perf_counter
    synchronize()
    started = clock()
    for batch in batches:
        work(model, batch)
    synchronize()
    return clock() - started


def speed(size: Size, rounds: int) -> dict[str, Any]:
    """Each way of scoring against the bare forward, interleaved: A B C D, D C B A ..."""
    model, batches = size.model(), [size.batch(seed) for seed in range(size.batches)]
    for work in WORKS.values():
        seconds(work, model, batches[:1])  # warm
    took: dict[str, list[float]] = {name: [] for name in WORKS}
    for number in range(rounds):
        for name in list(WORKS) if number % 2 else reversed(WORKS):
            took[name].append(seconds(WORKS[name], model, batches))
    tokens = size.rows * size.tokens * size.batches
    found: dict[str, Any] = {}
    for name, times in took.items():
        ratios = [base / own for base, own in zip(took["bare forward"], times, strict=True)]
        found[name] = {
            "tokens_per_second": round(tokens / statistics.median(times)),
            "of_bare_forward": spread(ratios),
        }
        if (peak := peak_flops()) is not None:
            found[name]["mfu"] = round(tokens / statistics.median(times) * size.flops_a_token(model) / peak, 4)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def peak_flops() -> float | None:
    """What the accelerator can do, where that is known."""
    if device().type != "cuda":
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before:
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def peak_memory(work: Work, model: PreTrainedModel, batch: Batch) -> int:
    """Bytes at the peak, the weights among them."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work(model, batch)
        return torch.cuda.max_memory_allocated()
    with LiveBytes() as live:
        work(model, batch)
    return live.peak + sum(parameter.nbytes for parameter in model.parameters())


def memory(size: Size) -> dict[str, Any]:
    """Peak memory of each way of scoring against that of the hidden states' forward."""
    model, batch = size.model(), size.batch(0)
    scored(model, batch)  # what is made once
    base = peak_memory(without_head, model, batch)
    found: dict[str, Any] = {"hidden states": {"mib": round(base / 2**20, 1)}}
    for name, work in WORKS.items():
        peak = peak_memory(work, model, batch)
        found[name] = {"mib": round(peak / 2**20, 1), "of_hidden_states": round(peak / base, 3)}
    return found


def store(steps: int, folder: Path) -> dict[str, Any]:
    """Size and reading speed of a real store, against the speed at which the demo's model trains."""
    from rho.config import load_config
    from rho.corpus import Corpus, build_corpus
    from rho.pipeline import DEMO
    from rho.score import score_corpus
    from rho.store import ScoreStore
    from rho.tokenizer import Tokenizer, train_tokenizer
    from rho.train import TrainConfig, train

    config = load_config(DEMO)
    sources = [part.source for name in config.tokenizer.corpora for part in config.corpora[name].parts]
    train_tokenizer(sources, config.tokenizer.vocab_size or 0, folder / "tokenizer", max_characters=3_000_000)
    tokenizer = Tokenizer.load(folder / "tokenizer" / "tokenizer")
    for name in ("curated", "noisy"):
        build_corpus(config.corpora[name], tokenizer, folder / name)
    reference = config.references["reference"]
    settings = TrainConfig(arguments={**reference.arguments, "max_steps": steps, "save_steps": steps})
    train(settings, Corpus(folder / "curated"), config.model, folder / "reference")
    noisy = Corpus(folder / "noisy")
    scored = score_corpus(config.score, noisy, ModelConfig(path=str(folder / "reference")), folder / "scores")
    trained = config.train.arm("slm", 0).arguments | {"max_steps": 30, "save_steps": 30, "logging_steps": 1}
    arm = config.train.arm("slm", 0).model_copy(update={"arguments": trained})
    train(arm, noisy, config.model, folder / "slm", ScoreStore(folder / "scores"))
    steps_made = [json.loads(line) for line in (folder / "slm" / "steps.jsonl").read_text().splitlines()]
    consumed = statistics.median(step["tokens_per_second"] for step in steps_made if "tokens_per_second" in step)
    found = {"tokens": len(noisy) * noisy.block_length, "training_tokens_per_second": round(consumed)}
    found["bytes_a_token"] = bytes_a_token(folder / "scores", list(scored.outputs), found["tokens"])
    found["reading"] = reading(folder / "noisy", folder / "scores")
    for way in found["reading"].values():
        way["times_training"] = round(way["tokens_per_second"] / consumed, 1)
    return found


def bytes_a_token(folder: Path, files: list[str], tokens: int) -> dict[str, float]:
    """What each column takes, and a whole file."""
    sizes = {"file": sum((folder / file).stat().st_size for file in files)}
    for file in files:
        metadata = pq.ParquetFile(folder / file).metadata
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                name = column.path_in_schema.partition(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return {name: round(size / tokens, 4) for name, size in sizes.items()}


def reading(corpus: Path, scores: Path) -> dict[str, dict[str, float]]:
    """Tokens a second: the scores alone in order, and what training reads, in its order.

    *cold*: nothing kept from one row to the next, so that each decodes its whole row group, as in a corpus far larger
    than what is kept. Opening (and hashing) the shards is in every figure.
    """
    from rho import store as module
    from rho.corpus import Corpus
    from rho.data import RowOrder, TrainingBlocks
    from rho.store import ScoreStore

    blocks = TrainingBlocks(Corpus(corpus), ScoreStore(scores))
    in_order, shuffled = list(range(len(blocks))), list(RowOrder(len(blocks), 1, 0))
    alone = blocks.stores["reference"]

    def forget() -> None:
        module._row_group.cache_clear()

    def forget_all() -> None:
        for cached in (module._open, module._verify, module._group_starts, module._row_group):
            cached.cache_clear()

    def read(order: list[int], row: Callable[[int], Any], between: Callable[[], None]) -> dict[str, float]:
        forget_all()
        started = time.perf_counter()
        for block in order:
            row(block)
            between()
        return {"tokens_per_second": round(len(order) * blocks.corpus.block_length / (time.perf_counter() - started))}

    return {
        "scores alone": read(in_order, lambda block: alone.row(block, ("ref_loss",)), lambda: None),
        "as training": read(shuffled, blocks.__getitem__, lambda: None),
        "as training, cold": read(shuffled, blocks.__getitem__, forget),
    }


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["speed", "memory", "store", []], default=["speed", "memory"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300, help="of the reference whose scores are stored")
    parser.add_argument("--out", type=Path, help="the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = device().type
    name = torch.cuda.get_device_name() if where == "cuda" else where
    out = args.out or RESULTS / f"scoring-{name.lower().replace(' ', '-')}.json"
    result = json.loads(out.read_bytes()) if out.exists() else {}
    for part in args.parts:
        if part == "store":
            with tempfile.TemporaryDirectory() as folder:
                result[part] = store(args.steps, Path(folder))
            continue
        for model, size in SIZES[where].items():
            found = speed(size, args.rounds) if part == "speed" else memory(size)
            result.setdefault(part, {})[model] = found
            print(model, json.dumps(found, indent=1), flush=True)
    result |= {"device": name, "platform": platform.platform(), "threads": torch.get_num_threads(), **environment()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
