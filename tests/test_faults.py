"""Damaged, swapped and foreign stores are noticed before anything of them is used; a failing disk is one message."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import rho.score
import rho.store
from rho import cli, runs
from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.data import TrainingBlocks
from rho.engines import Work, run_workers
from rho.errors import MismatchError, RhoError
from rho.models import ModelConfig, make_model, save_model
from rho.runs import MANIFEST
from rho.score import ScoreConfig, score_corpus
from rho.store import SCORES, ScoreStore
from rho.tokenizer import Tokenizer
from rho.verify import verify

SHARDS = ("train-00000.parquet", "train-00001.parquet", "train-00002.parquet")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, text_file: Path, tokenizer_folder: Path) -> Corpus:
    """6 blocks in 3 shards."""
    config = CorpusConfig(sources=[str(text_file)], block_length=16, shard_blocks=2, max_tokens=6 * 16)
    build_corpus(config, Tokenizer.load(tokenizer_folder), out := tmp_path_factory.mktemp("text") / "text")
    return Corpus(out)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, text: Corpus, reference: Path) -> dict[str, Path]:
    """Its scores: by two references, and by the first of them in another precision."""
    folder = tmp_path_factory.mktemp("stores")
    other = make_model(ModelConfig(path=str(reference)), 300)
    torch.nn.init.constant_(other.model.norm.weight, 0.5)
    save_model(other, folder / "model")
    made = {"one": (reference, "float16"), "other": (folder / "model", "float16"), "again": (reference, "float32")}
    for name, (model, dtype) in made.items():
        score_corpus(ScoreConfig(dtype=dtype), text, ModelConfig(path=str(model)), folder / name)
    return {name: folder / name for name in made}


def as_training_reads(store: Path, text: Corpus) -> Iterator[bytes]:
    """The scores of each block."""
    blocks = TrainingBlocks(text, ScoreStore(store), columns=SCORES)
    for block in range(len(blocks)):
        yield b"".join(blocks[block][name].numpy().tobytes() for name in SCORES)


def assert_noticed(store: Path, text: Corpus, files: tuple[str, ...], whole: list[bytes]) -> None:
    """Training stops at one of the bad files, having read nothing that is wrong, and `verify` names them all."""
    with pytest.raises(RhoError, match="|".join(re.escape(str(store / file)) for file in files)):
        for found, expected in zip(as_training_reads(store, text), whole, strict=True):
            assert found == expected
    lines = [line for _, wrong in verify(store) for line in wrong]
    assert [file for file in files if not any(file in line for line in lines)] == []


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damages(files: dict[str, bytes], flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Bits flipped anywhere in the files, and files cut anywhere."""
    draw = random.Random(0)
    for number in range(flips + cuts):
        file, content = draw.choices(list(files.items()), weights=[len(content) for content in files.values()])[0]
        if number < flips:
            yield file, flipped(content, draw.randrange(8 * len(content)))
        else:
            yield file, content[: draw.randrange(len(content))]


def test_a_manifest_without_its_last_byte_is_noticed(text: Corpus, stores: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stores["one"], tmp_path / "cut")
    manifest = tmp_path / "cut" / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert_noticed(tmp_path / "cut", text, (MANIFEST,), list(as_training_reads(stores["one"], text)))


def test_1000_flipped_bits_and_200_truncations_are_noticed_before_use(
    text: Corpus, stores: dict[str, Path], tmp_path: Path
) -> None:
    files = {file: (stores["one"] / file).read_bytes() for file in (*SHARDS, MANIFEST)}
    whole = list(as_training_reads(stores["one"], text))
    for number, (file, damaged) in enumerate(damages(files, 1000, 200)):
        copy = tmp_path / str(number)  # a new path: what was verified is not verified again
        copy.mkdir()
        for name, content in files.items():
            (copy / name).write_bytes(damaged if name == file else content)
        assert_noticed(copy, text, (file,), whole)


@pytest.mark.parametrize("a", SHARDS[:2])
def test_swapped_shards_are_noticed(a: str, text: Corpus, stores: dict[str, Path], tmp_path: Path) -> None:
    b = SHARDS[2]
    copy = shutil.copytree(stores["one"], tmp_path / "copy")
    shutil.copy(stores["one"] / a, copy / b)
    shutil.copy(stores["one"] / b, copy / a)
    assert_noticed(copy, text, (a, b), list(as_training_reads(stores["one"], text)))


@pytest.mark.parametrize(("store", "from_"), list(permutations(["one", "other", "again"], 2)))
@pytest.mark.parametrize("files", [(MANIFEST,), SHARDS[:1], SHARDS[2:], SHARDS])
def test_files_of_another_store_of_the_same_corpus_are_noticed(
    store: str, from_: str, files: tuple[str, ...], text: Corpus, stores: dict[str, Path], tmp_path: Path
) -> None:
    """An older manifest over newer shards, newer shards under an older manifest, one shard of another reference."""
    copy = shutil.copytree(stores[store], tmp_path / "copy")
    for file in files:
        shutil.copy(stores[from_] / file, copy / file)
    wrong = SHARDS if files == (MANIFEST,) else files
    assert_noticed(copy, text, wrong, list(as_training_reads(stores[store], text)))


def test_a_store_of_another_corpus_or_tokenizer_is_refused_before_a_row_is_read(
    text_file: Path, tokenizer_folder: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    backend = Tokenizer.load(tokenizer_folder).backend
    backend.add_tokens(["shift"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = CorpusConfig(sources=[str(text_file)], block_length=16, shard_blocks=2, max_tokens=6 * 16, seed=1)
    for what, tokenizer in (("corpus", tokenizer_folder), ("tokenizer", tmp_path / "tokenizer.json")):
        build_corpus(config, Tokenizer.load(tokenizer), tmp_path / what)
        with pytest.raises(MismatchError, match=f"{stores['one']}: these are scores of another {what}"):
            next(as_training_reads(stores["one"], Corpus(tmp_path / what)))


def test_a_store_of_another_reference_is_not_taken_for_fresh(
    text: Corpus, reference: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    """Every run goes through the score stage; `rho train --scores` alone is not told which reference to expect."""
    copy = shutil.copytree(stores["other"], tmp_path / "copy")
    with pytest.raises(MismatchError, match=rf"{copy}: was made otherwise\. inputs\.reference"):
        score_corpus(ScoreConfig(), text, ModelConfig(path=str(reference)), copy)


# A disk that fails while a store is made


@contextmanager
def full(out: Path) -> Iterator[None]:
    """No space left for the second shard."""
    partial = out / f".{SHARDS[1]}.partial"
    if not partial.is_symlink():
        partial.symlink_to("/dev/full")
    yield


@contextmanager
def after_one_shard(fault: Callable[[], None]) -> Iterator[None]:
    real = rho.store.atomic_write

    def fail_and_write(path: Path) -> AbstractContextManager[Any]:
        if path.name == SHARDS[1]:
            fault()
        return real(path)

    with mock.patch.object(rho.store, "atomic_write", fail_and_write):
        yield


@contextmanager
def read_only(out: Path) -> Iterator[None]:
    """Nothing can be opened for writing any more."""
    real, real_low = open, os.open

    def refuse(path: Any, writes: bool) -> None:
        if writes and str(path).startswith(str(out)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        refuse(path, "w" in mode)
        return real(path, mode, *more, **options)

    def opened_low(path: Any, flags: int, *more: Any, **options: Any) -> int:
        refuse(path, bool(flags & (os.O_WRONLY | os.O_RDWR)))
        return real_low(path, flags, *more, **options)

    def remounted() -> None:
        runs.open = opened
        os.open = opened_low

    with after_one_shard(remounted):
        yield
    os.open = real_low
    vars(runs).pop("open", None)


@contextmanager
def no_descriptors(out: Path) -> Iterator[None]:
    """Nothing can be opened any more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def used_up() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))

    with after_one_shard(used_up):
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


Fault = Callable[[Path], AbstractContextManager[None]]
FAULTS = {full: errno.ENOSPC, read_only: errno.EROFS, no_descriptors: errno.EMFILE}


@dataclass
class InWorker:
    """The fault in each worker process."""

    fault: Fault
    out: Path
    work: Work

    def __call__(self, number: int) -> None:
        with self.fault(self.out):
            self.work(number)


@pytest.fixture
def score(text: Corpus, reference: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Any:
    """Run `rho score` in this process: its exit code and what it told."""

    def run(out: Path, workers: int) -> tuple[int, str]:
        arguments = ["--corpus", text.folder, "--reference", reference, "--out", out, "--workers", workers]
        monkeypatch.setattr(sys, "argv", ["rho", "score", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0), capfd.readouterr().err

    return run


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_failing_disk_is_one_message_that_names_the_file_and_a_rerun_ends_in_the_same_bytes(
    fault: Fault, workers: int, score: Any, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if workers == 1:
        with fault(out):
            code, told = score(out, 1)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(
                rho.score, "run_workers", lambda e, work, n, p: run_workers(e, InWorker(fault, out, work), n, p)
            )
            code, told = score(out, 2)
    assert code == 1 and "Traceback" not in told and "starting another" not in told
    message = told.partition("error: ")[2]
    assert re.match(rf"{out}/.*{SHARDS[1]}.*{os.strerror(FAULTS[fault])}.*run the same command again", message)
    assert message.count("\n") == 1
    assert score(out, workers)[0] == 0
    for shard in SHARDS:
        assert (out / shard).read_bytes() == (stores["one"] / shard).read_bytes()
    assert runs.read_manifest(out).fingerprint == runs.read_manifest(stores["one"]).fingerprint
