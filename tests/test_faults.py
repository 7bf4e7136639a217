"""Damaged, swapped and foreign stores are noticed before anything of them is used."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch

from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.data import TrainingBlocks
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
