"""The report: its numbers, and that no text of the run can act in the page or hide in it."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rho.errors import DataError
from rho.report import write_report
from rho.report.data import Evaluation, Run, Step, read_run
from rho.report.explorer import rows_of_run
from rho.report.page import headline, render
from rho.report.plots import target_loss
from rho.report.summary import summarise, tokens_to_loss, training_clock
from rho.report.tokens import colour_bin, colour_limit, colours, visible
from rho.runs import open_stage

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'\u202e\u2066\x1b[31m\x00\x7f\u200b$x^{$"
HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def evaluation(
    arm: str, seed: int, step: int, loss: float | None, name: str = "target", kept: float = 1.0
) -> dict[str, Any]:
    """An evaluation row: 100 tokens a step, `kept` of them selected."""
    seen = {"tokens_seen": 100 * step, "tokens_selected": int(100 * step * kept)}
    return {"arm": arm, "seed": seed, "step": step, "set": name, "loss": loss, "bits_per_byte": 0.5, **seen}


def logged(step: int, selected: int, **more: Any) -> dict[str, Any]:
    """A step row with 10 eligible tokens."""
    losses = {"loss_selected": 3.0, "loss_unselected": None if selected == 10 else 2.0, "loss_all": 2.5}
    return {"step": step, "eligible": 10, "selected": selected, **losses, "excess": None, "labels": {}, **more}


def token(text: str, excess: float = 0.5, **more: Any) -> dict[str, Any]:
    """A token row of the arm slm."""
    numbers = {"loss": 2.0, "ref_loss": 2.0 - excess, "excess": excess, "rank": 0.5, "selected": excess > 0}
    where = {"arm": "slm", "seed": 0, "document": "doc", "source": "src", "text": text}
    return {**where, **numbers, "label": None, **more}


def put(folder: Path, name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Make a finished stage folder that holds one file of JSON lines."""
    with open_stage(folder, "stage", {}, {}) as stage:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage.add_output(name)
        if tokens := facts.pop("tokens", None):
            pq.write_table(pa.Table.from_pylist(tokens), folder / "tokens.parquet")
            stage.add_output("tokens.parquet")
        stage.finish(**facts)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two arms with one seed; slm comes to clm's final loss 3.0 halfway between steps 2 and 4."""
    folder = tmp_path / "demo"
    labels = {"code": {"eligible": 8, "selected": 3}, "docstring": {"eligible": 2, "selected": 2}}
    quantiles = {"p05": -1.0, "p25": 0.0, "p50": 0.5, "p75": 1.0, "p95": 2.0}
    put(folder / "train/clm-seed0", "steps.jsonl", [logged(k, 10) for k in (1, 2)])
    slm = [logged(k, 5, labels=labels, excess=quantiles, tokens_per_second=100.0 * k) for k in (1, 2, 3)]
    put(folder / "train/slm-seed0", "steps.jsonl", slm)
    rows = [evaluation("clm", 0, step, loss) for step, loss in ((2, 5.0), (4, 4.0), (6, 3.0))]
    rows += [evaluation("slm", 0, step, loss, kept=0.5) for step, loss in ((2, 4.0), (4, 2.0), (6, 1.0))]
    rows += [evaluation("slm", 0, 6, 3.5, "noisy"), {**evaluation("reference", 0, 9, 0.8), "seed": None}]
    tokens = [token("def", math.nan), token(" f", 1.0, label="code"), token("\n\t", -1.0)]
    put(folder / "evaluate", "losses.jsonl", rows, target="target", tokens=tokens)
    (folder / "config.yaml").write_text("name: demo\n")
    return folder


def report(run: Path) -> tuple[str, dict[str, Any]]:
    """The page and the summary of a run."""
    page = write_report(run).read_text()
    return page, json.loads((run / "report/summary.json").read_text())


class Page(HTMLParser):
    """The tags of a page and the attributes by which a page could act."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.acting: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            fetches = name in ("src", "href") and not (value or "").startswith(("data:image/svg+xml;base64,", "#"))
            if fetches or name.startswith("on"):
                self.acting.append((name, value))


def with_blocks(run: Path, losses: dict[tuple[str, int, int], list[float]]) -> None:
    """Make the run's evaluate stage anew, with the losses of blocks of 10 tokens of (arm, seed, step) on the target."""
    rows = [evaluation(arm, seed, step, sum(nats) / (10 * len(nats))) for (arm, seed, step), nats in losses.items()]
    blocks = [
        {"model": f"{key}", "arm": key[0], "seed": key[1], "step": key[2], "set": "target", "block": n, "nats": value}
        for key, nats in losses.items()
        for n, value in enumerate(nats)
    ]
    shutil.rmtree(run / "evaluate")
    with open_stage(run / "evaluate", "stage", {}, {}) as stage:
        (run / "evaluate/losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist([{**row, "tokens": 10} for row in blocks]), run / "evaluate/blocks.parquet")
        stage.add_output("losses.jsonl")
        stage.add_output("blocks.parquet")
        stage.finish(target="target")


def test_the_difference_to_the_baseline_is_that_of_the_last_checkpoints_over_common_seeds(run: Path) -> None:
    with_blocks(
        run,
        {
            ("clm", 0, 2): [99.0, 99.0],
            ("clm", 0, 4): [30.0, 50.0],
            ("clm", 1, 4): [32.0, 52.0],
            ("slm", 0, 4): [20.0, 30.0],  # 10 and 20 less
            ("slm", 1, 4): [20.0, 30.0],  # 12 and 22 less
            ("slm", 2, 4): [0.0, 0.0],  # clm has no such seed
        },
    )
    page, summary = report(run)
    found = summary["differences"]["slm"]["target"]
    assert found == {
        "difference": pytest.approx(-1.6),
        "low": pytest.approx(-2.1),
        "high": pytest.approx(-1.1),
        "seeds": 2,
    }
    assert list(summary["differences"]) == ["slm"]
    assert "the difference\nto clm with" in page and "-1.600 (-2.100 to -1.100)" in page


def test_a_run_without_losses_by_block_has_no_differences(run: Path) -> None:
    page, summary = report(run)
    assert summary["differences"] == {"slm": {}} and "the difference\nto clm" not in page


def test_a_damaged_file_of_blocks_is_named(run: Path) -> None:
    with_blocks(run, {("clm", 0, 4): [30.0, 50.0], ("slm", 0, 4): [20.0, 30.0]})
    with (run / "evaluate/blocks.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"blocks\.parquet: changed since"):
        write_report(run)


def curve(*points: tuple[int, float]) -> list[Evaluation]:
    return [Evaluation("slm", 0, step, 100 * step, 60 * step, "target", loss, 1.0) for step, loss in points]


def test_a_filtered_gradient_is_shown_beside_the_exact_one(run: Path) -> None:
    assert "Filtered backward" not in report(run)[0]
    steps = [logged(1, 5, filtered={"cosine": 0.98761, "norm_ratio": 0.9}), logged(2, 5)]
    put(run / "train/fast-seed3", "steps.jsonl", steps)
    page, _ = report(run)
    cells = re.search(r"<tr><td>fast</td>(<td.*?0\.9876</td>.*?)</tr>", page)
    assert cells and re.findall(r">([\d.]+)<", cells[1]) == ["3", "1", "0.9876", "0.900"]


def test_the_goal_is_interpolated_between_checkpoints() -> None:
    assert tokens_to_loss(curve((1, 5.0), (2, 4.0), (4, 2.0)), 3.0) == (300.0, 180.0)
    assert tokens_to_loss(curve((1, 5.0), (2, 4.0)), 4.0) == (200.0, 120.0)


def test_a_goal_met_at_the_first_checkpoint_gives_that_checkpoint() -> None:
    assert tokens_to_loss(curve((1, 2.0), (2, 4.0)), 3.0) == (100.0, 60.0)


def test_the_first_of_several_crossings_counts() -> None:
    assert tokens_to_loss(curve((1, 4.0), (2, 2.0), (3, 4.0), (4, 2.0)), 3.0) == (150.0, 90.0)


def test_a_goal_never_met_gives_none() -> None:
    assert tokens_to_loss(curve((1, 5.0), (2, 3.1)), 3.0) is None
    assert tokens_to_loss(curve((1, math.nan)), 3.0) is None
    assert tokens_to_loss([], 3.0) is None


def test_checkpoints_without_a_finite_loss_are_passed_over() -> None:
    assert tokens_to_loss(curve((1, 4.0), (2, math.nan), (3, 2.0)), 3.0) == (200.0, 120.0)


def test_the_summary_holds_the_literal_numbers(run: Path) -> None:
    _, summary = report(run)
    assert (summary["target"], summary["baseline"], summary["reference_loss"]) == ("target", "clm", 0.8)
    slm = summary["arms"]["slm"]["0"]
    assert slm["final"] == {
        "target": {"loss": 1.0, "bits_per_byte": 0.5},
        "noisy": {"loss": 3.5, "bits_per_byte": 0.5},
    }
    assert slm["goal"] == 3.0
    assert slm["tokens_to_target"] == {
        "seconds": None,
        "ratio_seconds": None,
        "seconds_with_reference": None,
        "ratio_seconds_with_reference": None,
        "tokens_seen": 300.0,
        "tokens_selected": 150.0,
        "ratio_seen": 0.5,
        "ratio_selected": 0.25,
        "at_first_checkpoint": False,
    }
    assert (slm["mean_ratio"], slm["tokens_per_second"]) == (0.5, 200.0)
    assert slm["label_share"] == {"code": 0.375, "docstring": 1.0}
    assert summary["arms"]["clm"]["0"]["tokens_to_target"]["ratio_seen"] == 1.0


def test_shares_are_of_what_the_baseline_took_to_come_down_to_its_final_loss(run: Path) -> None:
    """clm is at its final loss after step 4 of 6, slm after step 3."""
    rows = [evaluation("clm", 0, step, loss) for step, loss in ((2, 5.0), (4, 3.0), (6, 3.0))]
    rows += [evaluation("slm", 0, step, loss, kept=0.5) for step, loss in ((2, 4.0), (4, 2.0), (6, 1.0))]
    shutil.rmtree(run / "evaluate")
    put(run / "evaluate", "losses.jsonl", rows, target="target")
    arms = {arm: one["0"]["tokens_to_target"] for arm, one in report(run)[1]["arms"].items()}
    assert (arms["slm"]["tokens_seen"], arms["slm"]["ratio_seen"]) == (300.0, 0.75)
    assert (arms["slm"]["ratio_selected"], arms["clm"]["ratio_seen"]) == (0.375, 1.0)


def timed(run: Path, config: str, columns: list[str]) -> Run:
    """The run with a config and step logs that tell the time: clm 60 s, slm 120 s for 600 tokens, a reference 50 s."""
    (run / "config.yaml").write_text(config)
    clock = {"clm": 0.1, "slm": 0.2, "reference": 0.25}  # seconds a token
    for name, pace in clock.items():
        folder = run / (name if name == "reference" else f"train/{name}-seed0")
        shutil.rmtree(folder, ignore_errors=True)
        first, last = (100, 200) if name == "reference" else (200, 600)
        steps = [logged(2, 5, tokens_seen=first, seconds=first * pace)]
        steps += [logged(6, 5, tokens_seen=last, seconds=(last - first) * pace)]
        put(folder, "steps.jsonl", steps, columns=columns if name == "slm" else [])
    put(run / "scores/reference", "none.jsonl", [])
    for arm, losses in (("clm", (5.0, 4.0, 3.0)), ("slm", (4.0, 2.0, 1.0))):
        rows = [evaluation(arm, 0, step, loss) for step, loss in zip((2, 4, 6), losses, strict=True)]
        put(run / f"evaluate/{arm}-seed0", "losses.jsonl", rows, target="target")
    found = read_run(run)
    scored = replace(found.stages["scores/reference"], environment={"seconds": 40.0})
    return replace(found, stages={**found.stages, "scores/reference": scored})


ARMS = "name: demo\nreference: {corpus: c}\ntrain: {arms: {clm: {}, slm: {}}}\n"


def test_the_seconds_to_target_are_those_of_training_and_with_the_reference_of_what_comes_before(run: Path) -> None:
    summary = summarise(timed(run, ARMS, ["ref_loss"]))
    slm = summary["arms"]["slm"]["0"]["tokens_to_target"]  # after 300 tokens: clm's goal needs 600 in 60 s
    assert (slm["seconds"], slm["ratio_seconds"]) == (60.0, 1.0)
    assert (slm["seconds_with_reference"], slm["ratio_seconds_with_reference"]) == (150.0, 2.5)  # 50 and 40 s more
    assert summary["before"] == {"clm": {}, "slm": {"reference": 50.0, "scores/reference": 40.0}}
    assert "reference 50, scores/reference 40" in render(timed(run, ARMS, ["ref_loss"]), summary)


def test_an_arm_that_reads_no_scores_waits_for_none(run: Path) -> None:
    slm = summarise(timed(run, ARMS, []))["arms"]["slm"]["0"]["tokens_to_target"]
    assert slm["seconds_with_reference"] == slm["seconds"] == 60.0


def test_a_reference_that_goes_on_from_an_arm_costs_that_arm_too(run: Path) -> None:
    config = "train: {arms: {clm: {}, slm: {references: {names: [b]}}}}\nreferences: {b: {after: clm}, a: {}}\n"
    found = timed(run, config, ["ref_loss"])
    assert found.before == {"clm": [], "slm": ["train/clm-seed0"]}  # b was made elsewhere, a is not its
    assert summarise(found)["arms"]["slm"]["0"]["tokens_to_target"]["seconds_with_reference"] == 120.0


def test_an_arm_that_goes_on_after_another_took_its_time_too(run: Path) -> None:
    config = "train: {arms: {clm: {}, slm: {after: clm}}}\n"
    found = timed(run, config, [])
    shifted = [
        replace(row, tokens_seen=600 + row.tokens_seen) if row.arm == "slm" else row for row in found.evaluations
    ]
    slm = summarise(replace(found, evaluations=shifted))["arms"]["slm"]["0"]["tokens_to_target"]
    assert (slm["tokens_seen"], slm["seconds"]) == (900.0, 60.0 + 60.0)  # of clm, and 300 tokens at 5 a second


def test_no_time_is_told_where_the_log_does_not_know_it() -> None:
    def at(seen: int, seconds: float) -> Step:
        return Step(1, seen, 1, 1, 0.0, 0.0, 0.0, {}, {}, 9.0, seconds, {})

    assert training_clock([at(100, 10.0), at(300, 20.0)]) == [(100, 10.0), (300, 30.0)]
    assert training_clock([at(100, 10.0), at(300, math.nan)]) == training_clock([]) == []


def test_the_losses_of_sources_and_labels_are_those_of_the_last_checkpoint(run: Path) -> None:
    def line(step: int, by: str, name: str | None, tokens: int, loss: float) -> dict[str, Any]:
        return {**evaluation("slm", 0, step, loss), "by": by, "domain": name, "tokens": tokens}

    lines = [line(6, "source", "b", 10, 1.5), line(6, "source", "a", 30, 1.0), line(2, "source", "a", 30, 9.0)]
    lines += [line(6, "label", None, 40, 1.25)]
    shutil.rmtree(run / "evaluate")
    with open_stage(run / "evaluate", "stage", {}, {}) as stage:
        for name, rows in (("losses.jsonl", [evaluation("slm", 0, 6, 1.125)]), ("domains.jsonl", lines)):
            (run / "evaluate" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            stage.add_output(name)
        stage.finish(target="target")
    page, summary = report(run)
    assert summary["domains"]["target"] == {
        "source": {"b": {"tokens": 10, "losses": {"slm": [1.5]}}, "a": {"tokens": 30, "losses": {"slm": [1.0]}}},
        "label": {"": {"tokens": 40, "losses": {"slm": [1.25]}}},
    }
    rows = re.findall(r"<tr><td>target</td>(.*?)</tr>", page.partition('id="domains"')[2].partition("</section>")[0])
    cells = [re.findall(r"<td.*?>(.*?)</td>", one) for one in rows]
    assert cells == [["source", "a", "30", "1.000", "–"], ["source", "b", "10", "1.500", "–"]]  # one label is no split


def test_every_plot_over_steps_has_its_numbers_below_it(run: Path) -> None:
    page, _ = report(run)
    tables = page.partition('id="selection"')[2].partition('id="tokens"')[0]
    assert tables.count("<figure>") == tables.count("The numbers") == 4  # ratio; losses, excess and labels of slm
    rows = [re.findall(r"<td.*?>(.*?)</td>", one) for one in re.findall("<tr>(.*?)</tr>", tables)]
    assert ["2", "1.000", "0.500"] in rows  # realised ratio of clm and slm
    assert ["3", "0.500", "-1.000", "0.000", "1.000", "2.000"] in rows  # excess: median, then the borders of the bands


def test_the_bands_of_a_plot_are_the_lowest_and_the_highest_seed() -> None:
    seeds = [[Evaluation("slm", n, k, k, k, "t", loss + n, 1.0) for k, loss in ((1, 4.0), (2, 3.0))] for n in (0, 1, 4)]
    found = target_loss({"slm": seeds}, None, None).numbers
    assert found.names == ["slm", "slm, lowest", "slm, highest"]
    assert found.rows == [(1, [5 + 2 / 3, 4.0, 8.0]), (2, [4 + 2 / 3, 3.0, 7.0])]
    assert target_loss({"slm": seeds[:1]}, None, None).numbers.names == ["slm"]


def test_the_headline_tells_success_and_failure(run: Path) -> None:
    _, summary = report(run)
    assert headline(summary) == (
        "Final loss on the target set “target”: clm 3.000 (one seed), slm 1.000 (one seed); "
        "slm reached clm's final target loss after 50.0 % of clm's tokens."
    )
    summary["arms"]["slm"]["0"]["tokens_to_target"] = None
    assert headline(summary).endswith("; slm never reached clm's final target loss.")
    reached = {"ratio_seen": 0.25, "at_first_checkpoint": True}
    summary["arms"]["slm"]["1"] = {**summary["arms"]["slm"]["0"], "tokens_to_target": reached}
    assert headline(summary).endswith(
        "slm reached clm's final target loss in 1 of 2 seeds after at most 25.0 % of clm's tokens."
    )


def test_a_diverged_model_has_no_final_loss(tmp_path: Path) -> None:
    rows = [evaluation("clm", 0, 1, 3.0), evaluation("slm", 0, 1, 2.0), evaluation("slm", 0, 2, math.nan)]
    put(tmp_path / "evaluate", "losses.jsonl", rows, target="target")
    page, summary = report(tmp_path)
    assert summary["arms"]["slm"]["0"]["final"]["target"]["loss"] is None
    assert "slm not finite" in page


def test_without_an_arm_named_clm_the_one_that_trains_on_everything_is_the_baseline(tmp_path: Path) -> None:
    put(tmp_path / "train/a-seed0", "steps.jsonl", [logged(1, 5)])
    put(tmp_path / "train/b-seed0", "steps.jsonl", [logged(1, 10)])
    rows = [evaluation("a", 0, 1, 2.0), evaluation("b", 0, 1, 3.0)]
    put(tmp_path / "evaluate", "losses.jsonl", rows, target="target")
    _, summary = report(tmp_path)
    assert summary["baseline"] == "b"
    assert summary["arms"]["a"]["0"]["tokens_to_target"]["at_first_checkpoint"] is True


def test_seeds_are_compared_with_the_same_seed_only(tmp_path: Path) -> None:
    rows = [evaluation("clm", 0, 1, 3.0), evaluation("slm", 1, 1, 2.0)]
    put(tmp_path / "evaluate", "losses.jsonl", rows, target="target")
    page, summary = report(tmp_path)
    assert summary["arms"]["slm"]["1"]["goal"] is None
    assert summary["arms"]["slm"]["1"]["tokens_to_target"] is None
    assert "no clm result with this seed" in page


def test_the_page_has_every_section_and_no_way_to_act(run: Path) -> None:
    page, _ = report(run)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert 'class="missing"' not in page
    parsed = Page(page)
    assert parsed.acting == []
    assert not parsed.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert page.count("data:image/svg+xml;base64,") == 5  # target loss, ratio; losses, excess and labels of slm


def test_tokens_are_coloured_underlined_and_explained(run: Path) -> None:
    page, _ = report(run)
    assert '<span class="n" title="loss 2.00, rank 0.50, not selected">def</span>' in page
    assert '<span class="b20 s" title="loss 2.00, ref 1.00, excess +1.00, rank 0.50, selected, code"> f</span>' in page
    assert '<span class="b0" title="loss 2.00, ref 3.00, excess -1.00, rank 0.50, not selected">⏎\n⇥</span>' in page


def test_the_explorer_shows_the_models_of_a_run_that_are_named(run: Path) -> None:
    tokens = [token("def", 1.0, arm="clm"), token(" f", 2.0, arm="clm")]
    put(run / "evaluate/clm-seed0", "losses.jsonl", [], tokens=tokens)
    assert [row.text for row in rows_of_run(run)] == ["def", " f", "\n\t", "def", " f"]
    assert [row.view for row in rows_of_run(run, ["clm-seed0", "slm-seed0"])] == ["clm, seed 0"] * 2 + [
        "slm, seed 0"
    ] * 3
    with pytest.raises(DataError, match="expected one of slm-seed0, clm-seed0, found slm-seed1"):
        rows_of_run(run, ["slm-seed1"])


def test_a_run_without_token_rows_says_how_to_get_some(tmp_path: Path) -> None:
    put(tmp_path / "evaluate", "losses.jsonl", [], target="target")
    with pytest.raises(DataError, match=r"Set evaluate\.explore in the run's config"):
        rows_of_run(tmp_path)


def test_hostile_strings_are_shown_and_never_raw(tmp_path: Path) -> None:
    run = tmp_path / HOSTILE.replace("/", "").replace("\x00", "")
    rows = [
        evaluation(arm, 0, step, 3.0, name) for arm in ("clm", HOSTILE) for step in (1, 2) for name in ("t", HOSTILE)
    ]
    labels = {HOSTILE: {"eligible": 8, "selected": 3}, "_x": {"eligible": 8, "selected": 3}}
    folder = "train/" + HOSTILE.replace("/", "").replace("\x00", "") + "-seed0"
    put(run / folder, "steps.jsonl", [logged(k, 5, labels=labels) for k in (1, 2)])
    hostile = {"label": HOSTILE, "document": HOSTILE, "source": HOSTILE, "arm": HOSTILE}
    put(run / "evaluate", "losses.jsonl", rows, target=HOSTILE, tokens=[token(HOSTILE, **hostile)])
    (run / "config.yaml").write_text(f"name: {HOSTILE}\n")
    page, _ = report(run)
    parsed = Page(page)
    assert "<script" not in page
    assert parsed.acting == []
    assert "script" not in parsed.tags
    assert HIDDEN.findall(page) == []
    assert HIDDEN.findall((run / "report/summary.json").read_text()) == []
    assert "\\u202e\\u2066␛[31m␀␡\\u200b" in page
    for uri in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page):
        assert b"alert" not in base64.b64decode(uri)


def test_the_same_input_gives_the_same_bytes(run: Path) -> None:
    first = write_report(run).read_bytes(), (run / "report/summary.json").read_bytes()
    assert (write_report(run).read_bytes(), (run / "report/summary.json").read_bytes()) == first


def test_the_report_is_made_anew_when_the_run_has_grown(run: Path) -> None:
    report(run)
    put(run / "train/slm-seed1", "steps.jsonl", [logged(1, 5)])
    _, summary = report(run)
    assert list(summary["arms"]["slm"]) == ["0", "1"]
    assert summary["arms"]["slm"]["1"]["final"] == {}


def test_what_is_missing_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    put(tmp_path / "evaluate", "losses.jsonl", [], target="target")
    page, summary = report(tmp_path)
    assert summary["arms"] == {}
    assert page.count('class="missing"') == 6
    assert "Selection by label" not in page
    assert "<img" not in page


def test_the_step_log_of_a_training_at_work_is_read_up_to_its_last_whole_line(run: Path) -> None:
    folder = run / "train/slm-seed1"
    with open_stage(folder, "stage", {}, {}):
        (folder / "steps.jsonl").write_text(json.dumps(logged(1, 4)) + '\n{"step": 2, "eli')
    page, summary = report(run)
    assert summary["arms"]["slm"]["1"]["mean_ratio"] == 0.4
    assert "not finished or damaged" in page


def test_evaluations_may_stand_in_one_folder_a_model_with_the_target_in_the_config(tmp_path: Path) -> None:
    for arm, loss in (("clm", 3.0), ("slm", 2.0), ("reference", 1.0)):
        rows = [evaluation(arm, 0, 1, loss, "held-out")]
        put(tmp_path / "evaluate" / f"{arm}-seed0", "losses.jsonl", rows, tokens=[token("x", arm=arm)])
    with open_stage(tmp_path / "evaluate" / "slm-seed1", "evaluate", {}, {}):
        pass
    (tmp_path / "config.yaml").write_text("target: held-out\n")
    page, summary = report(tmp_path)
    assert (summary["target"], list(summary["arms"]), summary["reference_loss"]) == ("held-out", ["clm", "slm"], 1.0)
    assert page.count('<div class="doc">') == 3


def test_the_report_does_not_list_itself(run: Path) -> None:
    with open_stage(run / "report", "report", {}, {}) as stage:
        stage.finish()
    page, _ = report(run)
    assert "<td>train/slm-seed0</td>" in page
    assert "<td>report</td>" not in page


def test_without_a_finished_evaluation_the_error_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a finished evaluate stage"):
        write_report(tmp_path)
    with open_stage(tmp_path / "evaluate", "evaluate", {}, {}):
        pass
    with pytest.raises(DataError, match="needs a finished evaluate stage"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_file_changed_after_its_stage_is_refused(run: Path) -> None:
    path = run / "evaluate/losses.jsonl"
    path.write_text(path.read_text().replace("3.5", "3.4"))
    with pytest.raises(DataError, match=r"losses\.jsonl: changed since its stage wrote it"):
        write_report(run)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    put(tmp_path / "evaluate", "losses.jsonl", [evaluation("clm", 0, 1, 3.0), {"arm": "clm"}], target="target")
    with pytest.raises(DataError, match=r"losses\.jsonl, line 2: not a record.*seed"):
        write_report(tmp_path)


def test_the_colour_scale_is_centred_and_clamped() -> None:
    assert [colour_bin(x, 2.0) for x in (-9.0, -2.0, 0.0, 1.0, 2.0, math.inf)] == [0, 0, 10, 15, 20, 20]
    assert colour_limit([math.nan, -1.23]) == 1.3
    assert colour_limit([0.0]) == 0.1
    assert colour_limit([]) == 1.0
    assert colours(dark=False)["b10"] == "#ffffff"


@pytest.mark.parametrize("dark", [False, True])
def test_text_on_every_colour_meets_the_contrast_for_small_text(dark: bool) -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = luminance("#e6e7e9" if dark else "#1c1e21")
    for colour in colours(dark).values():
        low, high = sorted((ink, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_visible_leaves_readable_text_alone() -> None:
    assert visible("naïve 数据\n") == "naïve 数据\n"
    assert visible("\t\r\x85\xa0\u2028\ud800") == "⇥␍\\x85\\xa0\\u2028\\ud800"
