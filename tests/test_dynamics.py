"""The dynamics stage: what it writes of a tiny run, and that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import rho.dynamics
from rho.corpus import Corpus
from rho.dynamics import DynamicsConfig, checkpoints_in, follow, read_accuracies, selection_of
from rho.errors import ConfigError, DataError, MismatchError
from rho.evaluate import Checkpoint, Exploration, checkpoints_of
from rho.models import ModelConfig, make_model, source_hash
from rho.references.model import mean_loss, score_batch
from rho.references.scorer import as_batch
from rho.runs import open_stage
from rho.score import Source
from rho.selection import Selector
from rho.store import ScoreStore
from rho.train import TrainConfig, train
from rho.trajectories import PREFERENCES, class_shares, losses_of_selected, preferences, token_dynamics

BLOCKS = 20
CONFIG = DynamicsConfig(max_tokens=BLOCKS * 16 + 15, batch_size=8, top=3)  # not all of another block
WANTED = ("input_ids", "document", "num_bytes", "label", "document_id", "source")


@pytest.fixture(scope="module")
def arm(tmp_path_factory, corpus: Path, scores: Path, architecture: dict) -> Path:
    """A train stage of ratio 0.5 with a checkpoint after each of four steps."""
    out = tmp_path_factory.mktemp("train") / "slm"
    arguments = {"per_device_train_batch_size": 8, "max_steps": 4, "save_steps": 1, "learning_rate": 1e-2}
    model = ModelConfig(architecture=architecture)
    train(TrainConfig(ratio=0.5, arguments=arguments), Corpus(corpus), model, out, ScoreStore(scores))
    return out


@pytest.fixture(scope="module")
def explore(corpus: Path, reference: Path) -> Exploration:
    text = Corpus(corpus, "validation")
    return Exploration(text, {"reference": Source(ModelConfig(path=str(reference)))}, Selector("excess", 0.5))


@pytest.fixture(scope="module")
def made(tmp_path_factory, arm: Path, explore: Exploration) -> Path:
    out = tmp_path_factory.mktemp("dynamics") / "slm"
    follow(CONFIG, checkpoints_of(arm, "slm"), explore.corpus, out, explore, {1: 0.1, 2: 0.2, 4: 0.3})
    return out


def columns(folder: Path) -> dict[str, list]:
    return pq.read_table(folder / "tokens.parquet").to_pydict()


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_one_row_a_token_of_blocks_spread_over_the_set(made: Path, corpus: Path) -> None:
    text, table = Corpus(corpus, "validation"), columns(made)
    blocks = [n * len(text) // BLOCKS for n in range(BLOCKS)]
    assert len(text) > 2 * BLOCKS
    assert table["block"] == [block for block in blocks for _ in range(16)]
    assert table["position"] == [*range(16)] * BLOCKS
    rows = [text.row(block, WANTED) for block in blocks]
    assert table["token"] == [token for row in rows for token in row["input_ids"].tolist()]
    assert list(zip(table["document"], table["source"], strict=True)) == [o for row in rows for o in text.origins(row)]
    assert table["text"] == text.tokenizer.pieces(table["token"])
    assert set(table["label"]) == {"code", None}


def test_the_losses_are_those_of_each_checkpoint(made: Path, corpus: Path, arm: Path) -> None:
    text, table = Corpus(corpus, "validation"), columns(made)
    losses = np.array(table["losses"], np.float32)
    batch = as_batch(text, [text.row(block, WANTED) for block in dict.fromkeys(table["block"])])
    for c, entry in enumerate(checkpoints_of(arm, "slm")):
        model = make_model(ModelConfig(path=entry.model), text.vocab_size).eval()
        expected = score_batch(model, batch)[0].masked_fill(batch["labels"] == -100, torch.nan)
        np.testing.assert_allclose(losses[:, c], expected.flatten().numpy(), rtol=1e-4)
    assert np.isnan(losses[::16]).all()  # first tokens
    assert np.isnan(losses[np.isin(table["token"], text.special_ids)]).all()


def test_classes_and_shares_are_those_of_the_losses(made: Path) -> None:
    table, told = columns(made), summary(made)
    losses = np.array(table["losses"], np.float32)
    found = token_dynamics(losses)
    shares = class_shares(found.class_N)
    assert {name: one["share"] for name, one in told["classes"].items()} == shares
    assert [name is None for name in table["class"]] == np.isnan(losses).any(1).tolist()
    for name, one in told["classes"].items():
        inside = np.array([of == name for of in table["class"]])
        assert one["tokens"] == inside.sum()
        if inside.any():
            np.testing.assert_allclose(one["losses"], losses[inside].mean(0), rtol=1e-5)
    for what, column in (("source", table["source"]), ("label", table["label"])):
        for group, one in told["classes_by"][what].items():
            of_group = found.class_N[np.array([value == group for value in column])]
            assert one == {"tokens": int((of_group >= 0).sum()), **class_shares(of_group)}
    np.testing.assert_allclose(table["change"], found.change_N)
    np.testing.assert_allclose(table["fluctuation"], found.fluctuation_N)
    assert [(one["step"], one["arm"]) for one in told["checkpoints"]] == [(step, "slm") for step in (1, 2, 3, 4)]


def test_what_would_be_selected_is_what_training_ranks(made: Path, explore: Exploration) -> None:
    table, told = columns(made), summary(made)["selection"]
    losses, selected = np.array(table["losses"], np.float32), np.array(table["selected"])
    ref_loss = np.array(table["ref_loss"], np.float32)
    eligible = np.isfinite(ref_loss)
    assert told["eligible"] == eligible.sum() == np.isfinite(losses[:, 0]).sum()
    for row in range(BLOCKS):
        block = slice(16 * row, 16 * row + 16)
        for c in range(4):
            excess, mask = (losses[block, c] - ref_loss[block])[eligible[block]], selected[block, c][eligible[block]]
            assert mask.sum() == round(0.5 * len(mask)) and not selected[block, c][~eligible[block]].any()
            assert excess[mask].min() >= excess[~mask].max()
    code = eligible & np.array([label == "code" for label in table["label"]])
    np.testing.assert_allclose(told["by"]["label"]["code"]["share"], selected[code].mean(0))
    above = (losses > ref_loss[:, None])[code].mean(0)
    np.testing.assert_allclose(told["by"]["label"]["code"]["excess_above_0"], above)
    assert set(told["by"]["source and label"]) <= {f"site-{n}: code" for n in range(3)}
    assert table["times_selected"] == selected.sum(1).tolist()
    assert told["times_selected"] == np.bincount(selected[eligible].sum(1), minlength=5).tolist()
    assert table["preference"] == [PREFERENCES[code] for code in preferences(selected)]
    matrix = losses_of_selected(losses[eligible], selected[eligible])
    np.testing.assert_allclose(told["losses_of_selected"], matrix)
    np.testing.assert_allclose(told["loss_selected"], matrix.diagonal())
    others = losses_of_selected(losses[eligible], ~selected[eligible])
    np.testing.assert_allclose(told["loss_unselected"], others.diagonal())
    assert sum(told["preference"]["all"].values()) == pytest.approx(1)
    assert told["accuracy"]["steps"] == [1, 2, 4]
    np.testing.assert_allclose(told["accuracy"]["unselected"]["losses"], others[-1][[0, 1, 3]])


def test_tokens_that_stand_out_come_with_their_context(made: Path) -> None:
    table, told = columns(made), summary(made)
    losses = np.array(table["losses"], np.float32)
    lowest = np.nan_to_num(losses.min(1), nan=-1)
    assert [one["lowest_loss"] for one in told["persistent"]] == sorted(lowest.tolist(), reverse=True)[:3]
    [first, *_] = told["persistent"]
    where = int(lowest.argmax())
    block = slice(where - where % 16, where - where % 16 + 16)
    assert first["before"] + first["text"] + first["after"] == "".join(table["text"][block])
    assert (first["text"], first["class"]) == (table["text"][where], table["class"][where])
    for name, tokens in told["fluctuating"].items():
        inside = [f for f, of in zip(table["fluctuation"], table["class"], strict=True) if of == name]
        np.testing.assert_allclose([one["fluctuation"] for one in tokens], sorted(inside, reverse=True)[:3])


def test_plots_are_files_of_their_own(made: Path) -> None:
    names = {path.stem for path in made.glob("*.svg")}
    assert {"classes", "selected-by-class", "selected-losses", "selected-perplexity", "accuracy"} <= names
    assert all(b"</svg>" in path.read_bytes() for path in made.glob("*.svg"))
    assert not list(made.glob(".losses-*"))  # all in tokens.parquet


def test_without_a_reference_there_is_no_selection(arm: Path, corpus: Path, tmp_path: Path) -> None:
    models = checkpoints_in([str(path) for path in sorted((arm / "checkpoints").glob("checkpoint-*"))[:2]])
    follow(CONFIG, models, Corpus(corpus, "validation"), tmp_path)
    assert summary(tmp_path)["selection"] is None
    assert "selected" not in columns(tmp_path)
    assert {path.stem for path in tmp_path.glob("selected*.svg")} == set()


def test_every_token_of_a_small_set_is_followed(arm: Path, corpus: Path, tmp_path: Path) -> None:
    text = Corpus(corpus, "validation")
    follow(DynamicsConfig(), checkpoints_in([str(arm)]), text, tmp_path)
    told = summary(tmp_path)
    last = mean_loss(make_model(ModelConfig(path=str(arm)), text.vocab_size), text)
    assert told["tokens"] == last.tokens
    assert told["border"] == pytest.approx(last.nats_per_token, rel=1e-5)
    assert told["checkpoints"][-1]["loss"] == pytest.approx(told["border"])


def test_an_interrupted_stage_goes_on_after_the_last_checkpoint(
    arm: Path, explore: Exploration, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    whole = rho.dynamics.load_checkpoint

    def load(entry: Checkpoint, corpus: Corpus) -> object:
        if len(scored) == 2:
            scored.append("killed")
            raise KeyboardInterrupt
        scored.append(str(entry.step))
        return whole(entry, corpus)

    monkeypatch.setattr(rho.dynamics, "load_checkpoint", load)
    inputs = (CONFIG, checkpoints_of(arm, "slm"), explore.corpus, tmp_path, explore, {1: 0.1, 2: 0.2, 4: 0.3})
    with pytest.raises(KeyboardInterrupt):
        follow(*inputs)
    follow(*inputs)
    assert scored == ["1", "2", "killed", "3", "4"]
    for name in ("tokens.parquet", "summary.json", "classes.svg"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
    monkeypatch.setattr(rho.dynamics, "load_checkpoint", None)
    follow(*inputs)  # fresh


def test_another_set_or_setting_is_refused_in_the_same_folder(arm: Path, explore: Exploration, made: Path) -> None:
    with pytest.raises(MismatchError, match=r"threshold: asked for 0\.5, found 0\.2"):
        follow(
            CONFIG.model_copy(update={"threshold": 0.5}),
            checkpoints_of(arm, "slm"),
            explore.corpus,
            made,
            explore,
            {1: 0.1, 2: 0.2, 4: 0.3},
        )


def test_what_cannot_be_followed_is_refused(
    arm: Path, corpus: Path, reference: Path, architecture: dict, tmp_path: Path
) -> None:
    text, models = Corpus(corpus, "validation"), checkpoints_of(arm, "slm")
    with pytest.raises(DataError, match=r"two checkpoints or more .*, found 1"):
        follow(CONFIG, models[:1], text, tmp_path / "a")
    with pytest.raises(DataError, match="give a reference as well"):
        follow(CONFIG, models, text, tmp_path / "b", accuracies={1: 0.5})
    explore = selection_of([str(arm)], str(reference), text)
    assert explore.selector == Selector("excess", 0.5)
    with pytest.raises(DataError, match="no checkpoint of step 7; there are steps 1, 2, 3, 4"):
        follow(CONFIG, models, text, tmp_path / "c", explore, {1: 0.1, 2: 0.2, 7: 0.3})
    with pytest.raises(ConfigError, match="found a b"):
        selection_of(["a", "b"], str(reference), text)
    model = make_model(ModelConfig(architecture={**architecture, "tie_word_embeddings": False}), text.vocab_size)
    with torch.no_grad():
        model.get_input_embeddings().weight[int(text.row(0, ("input_ids",))["input_ids"][3])] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(DataError, match=r"broken: expected a finite loss of every token of .*, found \d+ that are not"):
        follow(CONFIG, [*models, Checkpoint(str(tmp_path / "broken"))], text, tmp_path / "d")


def test_accuracies_are_steps_and_shares(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text('{"2": 0.5, "4": 1}')
    assert read_accuracies(tmp_path / "good.json", []) == {2: 0.5, 4: 1.0}
    for wrong in ("[1]", "{", '{"a": 1}', '{"1": null}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(DataError, match="expected JSON such as"):
            read_accuracies(tmp_path / "wrong.json", [])
    with pytest.raises(DataError, match="No such file"):
        read_accuracies(tmp_path / "missing.json", [])


def suite(folder: Path, model: str, values: dict[str, float], questions: int = 5) -> None:
    """A folder as `rho evaluate --suite` leaves it, of the model with these weights."""
    with open_stage(folder, "suite", {}, {"model": model}) as stage:
        stage.finish(rows=[{"name": name, "questions": questions, "value": value} for name, value in values.items()])


def test_evaluated_suites_belong_to_the_checkpoints_with_their_weights(arm: Path, tmp_path: Path) -> None:
    first, second, *_ = models = checkpoints_of(arm, "slm")
    suite(tmp_path / "x", str(second.content), {"svamp": 0.5, "asdiv": 0.25})
    suite(tmp_path / "y", source_hash(ModelConfig(path=first.model)), {"svamp": 0.25, "asdiv": 0.0})
    suite(tmp_path / "z", "another model", {"gsm8k": 1.0})
    assert read_accuracies(tmp_path, models) == {1: 0.125, 2: 0.375}
    with pytest.raises(DataError, match="of these checkpoints, found none"):
        read_accuracies(tmp_path, models[2:])
    suite(tmp_path / "a", str(models[2].content), {"svamp": 0.25, "asdiv": 0.0}, questions=6)
    with pytest.raises(DataError, match=r"the same tasks of every checkpoint, found others in .*a than in .*x"):
        read_accuracies(tmp_path, models)
