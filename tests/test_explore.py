"""Any text as two models see it: the numbers of each token, whatever the models' tokenizers and windows."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rho.errors import ConfigError, DataError, MismatchError
from rho.explore import ExploreConfig, Pair, Seen, explore, pairs_of, read_texts, token_rows
from rho.models import ModelConfig, make_model
from rho.objective import token_labels, token_loss
from rho.rows import TokenRow, read_rows, write_rows
from rho.tokenizer import Tokenizer, train_tokenizer

TEXT = "The shift by one.\nStraße, 東京 and 🙂 take several bytes.\n\tx = 1  "


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of one text."""
    (tmp_path / "note.md").write_text(TEXT)
    return str(tmp_path / "note.md")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, architecture: dict) -> str:
    """A new model with the reference's tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "mine"
    own = Tokenizer.load(tokenizer_folder)
    make_model(ModelConfig(architecture=architecture), own.vocab_size, seed=1).save_pretrained(folder)
    own.save(folder)
    return str(folder)


def plainly(folder: str, ids: list[int], start: int) -> list[float]:
    """The losses of some tokens after a start token, by Transformers' own forward."""
    read = torch.tensor([[start, *ids]])
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        loss = token_loss(network(read).logits, token_labels(read, torch.arange(read.shape[1])[None]))
    return loss[0, 1:].tolist()


def test_every_token_has_the_losses_that_its_models_give_it(text: str, model: str, reference: Path) -> None:
    rows = explore(ExploreConfig(ratio=0.5), text, [Pair(model, str(reference))])
    own = Tokenizer.load(model)
    [(ids, _)] = own.encode([TEXT])
    assert "".join(row.text for row in rows) == TEXT
    assert [row.position for row in rows] == list(range(len(ids)))
    assert {(row.arm, row.seed, row.document, row.source) for row in rows} == {
        ("mine against reference", None, text, "note")
    }
    np.testing.assert_allclose([row.loss for row in rows], plainly(model, ids.tolist(), own.eos_id), rtol=1e-4)
    expected = plainly(str(reference / "model"), ids.tolist(), own.eos_id)
    np.testing.assert_allclose([row.ref_loss for row in rows], expected, rtol=1e-4)
    assert sum(row.selected for row in rows) == round(0.5 * len(ids))
    assert min(r.excess for r in rows if r.selected) >= max(r.excess for r in rows if not r.selected)


def test_ranks_and_excess_are_the_literal_ones_and_leave_out_what_is_not_eligible() -> None:
    loss, ref_loss = torch.tensor([1.0, 5.0, 2.0, 9.0]), torch.tensor([0.5, 1.0, 2.5, 0.0])
    seen = Seen(loss, ref_loss, torch.tensor([True, True, True, False]), torch.tensor([False, True, False, False]))
    rows = token_rows("a", 3, [("d", "s")] * 4, list("wxyz"), seen, ["code", None, None, None])
    assert rows[0] == TokenRow("a", 3, "d", "s", 0, "w", 1.0, 0.5, 0.5, 0.5, False, "code")
    assert [row.excess for row in rows[:3]] == [0.5, 4.0, -0.5]
    assert [row.rank for row in rows[:3]] == [0.5, 1.0, 0.0]
    assert math.isnan(rows[3].excess) and math.isnan(rows[3].rank) and rows[3].loss == 9.0
    assert [row.selected for row in rows] == [False, True, False, False]


def test_a_text_longer_than_the_model_reads_is_read_in_windows(text: str, model: str, reference: Path) -> None:
    Path(text).write_text(TEXT * 5)  # the models read 64 tokens
    rows = explore(ExploreConfig(), text, [Pair(model, str(reference))])
    assert len(rows) > 128 and "".join(row.text for row in rows) == TEXT * 5
    assert all(math.isfinite(row.excess) for row in rows)
    short = explore(ExploreConfig(context=8), text, [Pair(model, str(reference))])
    assert [row.loss for row in short[:7]] == pytest.approx([row.loss for row in rows[:7]], rel=1e-4)
    assert [row.loss for row in short] != pytest.approx([row.loss for row in rows], rel=1e-4)


def test_the_text_is_cut_at_the_limit_and_the_user_is_told(
    text: str, model: str, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = explore(ExploreConfig(max_tokens=5), text, [Pair(model, str(reference))])
    assert len(rows) == 5 and TEXT.startswith("".join(row.text for row in rows))
    assert "cut after 5 tokens" in capsys.readouterr().err


def test_documents_are_ranked_each_by_itself(model: str, reference: Path, tmp_path: Path) -> None:
    records = [{"text": "The shift by one.", "id": "a"}, {"text": "", "id": "empty"}, {"text": "Sums.", "id": "b"}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = explore(ExploreConfig(ratio=0.5), str(tmp_path / "two.jsonl"), [Pair(model, str(reference))])
    for name in ("a", "b"):
        of_one = [row for row in rows if row.document == name]
        assert sum(row.selected for row in of_one) == round(0.5 * len(of_one))
        assert {0.0, 1.0} <= {row.rank for row in of_one}
    assert {row.document for row in rows} == {"a", "b"}


def test_a_reference_with_another_tokenizer_is_mapped_onto_the_models_tokens(
    text: str, text_file: Path, model: str, architecture: dict, tmp_path: Path
) -> None:
    train_tokenizer([str(text_file)], 290, tmp_path / "tok")
    other = Tokenizer.load(tmp_path / "tok" / "tokenizer")
    make_model(ModelConfig(architecture=architecture), other.vocab_size).save_pretrained(tmp_path / "other")
    other.save(tmp_path / "other")
    rows = explore(ExploreConfig(), text, [Pair(model, str(tmp_path / "other"))])
    [(ids, _)] = other.encode([TEXT])
    read = plainly(str(tmp_path / "other"), [other.eos_id, *ids.tolist()], other.eos_id)
    alone = plainly(str(tmp_path / "other"), ids.tolist(), other.eos_id)
    total = sum(row.ref_loss for row in rows)
    assert total == pytest.approx(sum(alone), rel=1e-4) and total != pytest.approx(sum(read), rel=1e-4)
    assert len(ids) != len(rows)


def test_a_comparison_is_the_same_text_seen_twice(text: str, model: str, reference: Path) -> None:
    assert pairs_of("m", "r") == [("m", "r")]
    assert pairs_of("m", "r", "n") == [("m", "r"), ("n", "r")]
    assert pairs_of("m", "r", None, "q") == [("m", "r"), ("m", "q")]
    rows = explore(ExploreConfig(), text, pairs_of(model, str(reference), str(reference), model))
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [row.text for row in first] == [row.text for row in second]
    assert [row.excess for row in first] == [-row.excess for row in second]
    assert (first[0].view, second[0].view) == ("mine against reference", "reference against mine")


def test_two_models_of_one_name_are_told_apart(text: str, model: str, reference: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(model, tmp_path / name / "model")
    pairs = pairs_of(str(tmp_path / "a/model"), str(reference), str(tmp_path / "b/model"))
    assert {row.view for row in explore(ExploreConfig(), text, pairs)} == {
        f"a/model against {'/'.join(reference.parts[-2:])}",
        f"b/model against {'/'.join(reference.parts[-2:])}",
    }


def test_a_model_against_itself_is_pointed_out(text: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    explore(ExploreConfig(), text, [Pair(model, model)])
    assert "every token the same loss" in capsys.readouterr().err


def test_a_checkpoint_is_read_with_the_tokenizer_that_its_training_left(text: str, reference: Path) -> None:
    checkpoint = str(reference / "checkpoints" / "checkpoint-12")
    [row, *_] = explore(ExploreConfig(), text, [Pair(checkpoint, str(reference))])
    assert row.arm == "checkpoint-12 against reference"


def test_a_model_without_tokenizer_needs_one_named(text: str, model: str, reference: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(bare)
    with pytest.raises(ConfigError, match=r"comes without a tokenizer\. Say with --tokenizer"):
        explore(ExploreConfig(), text, [Pair(str(bare), str(reference))])
    named = explore(ExploreConfig(), text, [Pair(str(bare), str(reference))], tokenizer=model)
    own = explore(ExploreConfig(), text, [Pair(model, str(reference))])
    assert [row.loss for row in named] == [row.loss for row in own]


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(
    text: str, model: str, architecture: dict, tmp_path: Path
) -> None:
    make_model(ModelConfig(architecture=architecture), 100).save_pretrained(tmp_path / "small")
    with pytest.raises(MismatchError, match="small has 100 embeddings, its tokenizer has token ids up to 299"):
        explore(ExploreConfig(), text, [Pair(model, str(tmp_path / "small"))])


def test_text_comes_from_the_standard_input(model: str, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(raw: bytes) -> list[TokenRow]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return explore(ExploreConfig(), "-", [Pair(model, str(reference))])

    assert "".join(row.text for row in given(TEXT.encode())) == TEXT
    with pytest.raises(DataError, match="standard input: expected UTF-8 text, found byte 0xff at 2"):
        given(b"ab\xff")
    with pytest.raises(DataError, match="expected some text"):
        given(b"")


def test_special_tokens_in_a_text_are_never_selected(model: str, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.<|endoftext|>Two.")
    rows = explore(ExploreConfig(ratio=1.0), str(tmp_path / "a.txt"), [Pair(model, str(reference))])
    assert [row.text for row in rows if not row.selected] == ["<|endoftext|>"]


def test_a_character_of_several_tokens_stands_at_the_first(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a🙂b")
    [found] = read_texts(str(tmp_path / "a.txt"), Tokenizer.load(tokenizer_folder), 100)
    assert "".join(found.pieces) == "a🙂b" and found.pieces.count("") == len(found.pieces) - 3
    assert found.num_bytes.sum() == 6


def test_rows_are_written_and_read_again(tmp_path: Path) -> None:
    numbers = {"loss": 1.5, "ref_loss": 0.5, "excess": 1.0, "rank": 0.25}
    rows = [
        TokenRow("a", 0, "d", "s", 0, "x", **numbers, selected=True, label="code", dynamics="H->L"),
        TokenRow("b", None, "d", "s", 1, "", **numbers, selected=False),
    ]
    write_rows(rows, tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == rows
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="can't be read as token rows"):
        read_rows(tmp_path / "rows.parquet")
