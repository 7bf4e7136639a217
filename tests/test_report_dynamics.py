"""The report's section of token dynamics: its numbers, its plots, and that no text of a user can act in it."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rho.dynamics_summary import Selected, Texts, places, summarise
from rho.errors import DataError
from rho.evaluate import Checkpoint
from rho.report import write_report
from rho.report.dynamics import arrow, figures, label_plot, moments, perplexity
from rho.report.explorer import rows_of_run
from rho.runs import open_stage, write_json
from rho.trajectories import token_dynamics
from test_report import HIDDEN, HOSTILE, Page, evaluation, put, token

# A first token, then one of each class; the last losses' mean is 2.
LOSSES = np.array([[math.nan] * 3, [3.0, 3.1, 3.0], [1.0, 1.5, 2.5], [4.0, 3.0, 1.5], [1.0, 0.75, 1.0]], np.float32)
MASK = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]], bool)


def made(name: str = "x", accuracies: dict[int, float] | None = None, selection: bool = True) -> dict[str, Any]:
    """The summary of five tokens in one block at steps 10, 20, 30; every string of the text is `name`."""
    texts = Texts(name, 5, [name] * 5, [name] * 5, [name] * 5, [None, name, name, "content", "content"])
    selected = Selected(np.array([np.nan, 2.0, 2.0, 2.0, 2.0], np.float32), MASK, ~np.isnan(LOSSES[:, 0]))
    models = [Checkpoint("m", "slm", 0, step, 100 * step) for step in (10, 20, 30)]
    return summarise(
        models, texts, LOSSES, token_dynamics(LOSSES), selected if selection else None, 2, accuracies or {}
    )


def reported(run: Path, summary: dict[str, Any]) -> str:
    """The page of a run with one model, evaluated at step 20, and these dynamics of it."""
    put(run / "evaluate", "losses.jsonl", [evaluation("slm", 0, 20, 1.234)], target="target")
    with open_stage(run / "dynamics" / "slm-seed0", "dynamics", {}, {}) as stage:
        write_json(stage.folder / "summary.json", summary)
        stage.add_output("summary.json")
        stage.finish()
    return write_report(run).read_text()


def row(page: str, first: str, after: str) -> list[str]:
    """The cells of the first table row that begins with `first`, from the text `after` on."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.partition(after)[2], re.DOTALL)
    cells = [[re.sub("<[^>]*>", "", cell).strip() for cell in re.findall("<td.*?</td>", one)] for one in rows]
    return next(one for one in cells if one and one[0] == first)


def test_the_summary_holds_the_literal_numbers() -> None:
    found = made()
    assert [(one["tokens"], one["share"]) for one in found["classes"].values()] == [(1, 0.25)] * 4
    assert (found["tokens"], found["border"], found["threshold"]) == (4, 2.0, 0.2)
    assert found["classes"]["L->H"]["losses"] == [1.0, 1.5, 2.5]
    assert found["classes_by"]["label"]["content"] == {"tokens": 2, "H->H": 0, "L->H": 0, "H->L": 0.5, "L->L": 0.5}
    assert [one["lowest_loss"] for one in found["persistent"]] == [3.0, 1.5]
    selection = found["selection"]
    assert (selection["eligible"], selection["share"]) == (4, [0.5, 0.5, 0.5])
    assert selection["by"]["class"]["H->L"]["share"] == [1.0, 1.0, 0.0]
    assert selection["by"]["label"]["content"]["excess_above_0"] == [0.5, 0.5, 0.0]
    assert selection["by"]["source and label"]["x: content"]["share"] == [0.5, 0.5, 0.0]
    assert (selection["loss_selected"], selection["loss_unselected"]) == (
        [3.5, pytest.approx(3.05), 2.75],
        [1.0, 1.125, 1.25],
    )
    assert selection["losses_of_selected"][2] == pytest.approx([2.0, 2.3, 2.75])  # of what the last selects
    assert selection["times_selected"] == [1, 1, 1, 1]
    assert selection["preference"]["all"] == {"never": 0.25, "early": 0, "middle": 0, "late": 0.25, "even": 0.5}
    assert selection["preference"]["L->H"]["late"] == 1.0


def test_a_class_without_tokens_has_no_numbers() -> None:
    models = [Checkpoint("m", step=None)] * 2
    texts = Texts("x", 2, ["a", "b"], ["d"] * 2, ["s"] * 2, [None] * 2)
    losses = np.array([[1.0, 1.0], [3.0, 3.0]], np.float32)
    found = summarise(models, texts, losses, token_dynamics(losses), None, 5, {})
    assert found["classes"]["H->L"] == {"share": 0.0, "tokens": 0, "losses": [None, None]}
    assert moments(found) == ("checkpoint", [1, 2])
    assert moments(made()) == ("step", [10, 20, 30])
    assert (places([4, 4, 5]), places([4, 5, 9])) == ([1, 2, 3], [4, 5, 9])
    assert set(figures(found)) == {"classes"}
    assert label_plot(found) is None


def test_the_section_shows_shares_curves_and_selection_with_their_numbers(tmp_path: Path) -> None:
    page = reported(tmp_path, made("prose", {10: 0.2, 20: 0.25, 30: 0.4}))
    assert row(page, "slm", "Which tokens are learned") == ["slm", "0", "4", "3", *["25.0 %"] * 4]
    assert "Tokens of “prose”" in page
    numbers = row(page, "20", "mean loss of each class")
    # H->H, L->H, H->L, L->L; all, selected, unselected, target
    assert numbers[1:] == ["3.100", "1.500", "3.000", "0.750", "2.087", "3.050", "1.125", "1.234"]
    assert row(page, "source", "Classes by source and label") == [
        "source",
        "prose",
        "4",
        *["25.0 %"] * 4,
        "50.0 %",
        "50.0 %",
    ]
    assert row(page, "10", "of the tokens that each one selects")[1:] == ["33.1", "21.1", "9.5"]
    assert row(page, "all", "When tokens are selected")[1:] == ["25.0 %", "0.0 %", "0.0 %", "25.0 %", "50.0 %"]
    assert row(page, "30", "accuracy and loss")[1:] == ["40.0 %", "2.750", "1.250"]
    # the target's; classes, two of fluctuating tokens; selection by class and label, losses, perplexity, accuracy
    assert page.count("data:image/svg+xml;base64,") == 1 + 3 + 5


def test_without_a_selection_only_the_classes_are_shown(tmp_path: Path) -> None:
    page = reported(tmp_path, made(selection=False))
    assert "Which tokens are learned" in page
    assert "would select" not in page


def test_hostile_text_is_shown_and_never_raw(tmp_path: Path) -> None:
    page = reported(tmp_path, made(HOSTILE))
    parsed = Page(page)
    assert parsed.acting == []
    assert "script" not in parsed.tags
    assert "<script" not in page and HIDDEN.findall(page) == []
    assert "<mark>&lt;script&gt;" in page
    for uri in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page):
        assert b"alert" not in base64.b64decode(uri)


def test_a_changed_summary_is_refused(tmp_path: Path) -> None:
    reported(tmp_path, made())
    path = tmp_path / "dynamics" / "slm-seed0" / "summary.json"
    path.write_text(path.read_text().replace("0.25", "0.26"))
    with pytest.raises(DataError, match=r"summary\.json: changed since its stage wrote it"):
        write_report(tmp_path)


def test_names_and_perplexities_in_tables() -> None:
    assert (arrow("H->L"), arrow("a->b")) == ("H→L", "a->b")
    assert [perplexity(loss) for loss in (None, 0.0, 2.0, 30.0, 1e9)] == ["–", "1.0", "7.4", "1.1e+13", "1.0e+304"]


def test_the_classes_of_followed_tokens_are_joined_by_block_and_position(tmp_path: Path) -> None:
    where = [(0, 1), (2, 1), (2, 0)]
    explored = [token("x", block=block, position=place, arm="slm") for block, place in where]
    classes = [{"block": b, "position": p, "class": c} for b, p, c in ((2, 1, "H->L"), (2, 0, None), (0, 1, "L->L"))]
    for stage_name, of in (("evaluate", "explore"), ("dynamics", "set")):
        with open_stage(tmp_path / stage_name / "slm-seed0", stage_name, {}, {of: "the same text"}) as stage:
            pq.write_table(
                pa.Table.from_pylist(explored if of == "explore" else classes), stage.folder / "tokens.parquet"
            )
            for name, content in (("losses.jsonl", ""), ("summary.json", json.dumps(made()))):
                (stage.folder / name).write_text(content)
                stage.add_output(name)
            stage.add_output("tokens.parquet")
            stage.finish()
    assert [row.dynamics for row in rows_of_run(tmp_path)] == ["L->L", "H->L", None]
