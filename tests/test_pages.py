"""No string of a user's acts in a page: asserted in a browser, by a mark that any script that ran would have left."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import html5lib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hostile import HOSTILE, RAN, SCRIPTS
from rho.report import write_report
from rho.report.explorer import write_page
from rho.rows import TokenRow
from rho.runs import open_stage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POLICY = re.compile('<meta http-equiv="Content-Security-Policy" content="[^"]*">')
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "h1", "h2", "h3", "h4", "p",
    "a", "div", "span", "table", "tbody", "tr", "th", "td", "b", "i", "details", "summary", "pre", "code", "figure",
    "img", "figcaption",
}  # fmt: skip
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def row(text: str, **more: object) -> TokenRow:
    """A token whose every string is hostile."""
    known = {"arm": text, "seed": 0, "document": text, "source": text, "position": 0, "label": text, "dynamics": text}
    numbers = {"loss": 2.0, "ref_loss": 1.0, "excess": 1.0, "rank": 0.5, "selected": True}
    return TokenRow(**{**known, **numbers, "text": text, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An explorer page with every hostile string in every place; the first document is seen by two."""
    rows = [row(text) for text in HOSTILE]
    rows.append(row(HOSTILE[0], arm=HOSTILE[1]))
    out = tmp_path_factory.mktemp("explorer") / "page.html"
    write_page(rows, "".join(HOSTILE), out)
    return out.read_text()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with every hostile string but the one that Parquet can't hold (a lone surrogate) in its tokens.

    Arms, sets, labels and sources are called by hostile strings too.
    """
    run = tmp_path_factory.mktemp("report")
    told = [row(text) for text in HOSTILE if text.isascii() or text.encode("utf-8", "ignore").decode() == text]
    assert len(told) == len(HOSTILE) - 1
    seen = {"seed": 0, "tokens_seen": 9, "tokens_selected": 5, "bits_per_byte": 1.0, "loss": 2.0}
    losses = [
        {**seen, "arm": arm, "step": step, "set": name} for arm, step, name in product(SCRIPTS[:3], (1, 2), HOSTILE[:3])
    ]
    domains = [{**losses[-1], "by": by, "domain": text, "tokens": 3} for by in ("source", "label") for text in SCRIPTS]
    labels = {text: {"eligible": 3, "selected": 1} for text in SCRIPTS}
    step = {"step": 1, "eligible": 9, "selected": 5, "loss_selected": 1.0, "loss_all": 1.0, "labels": labels}
    with open_stage(run / "train" / "clm-seed0", "train", {}, {}) as stage:
        (stage.folder / "steps.jsonl").write_text(json.dumps(step) + "\n")
        stage.add_output("steps.jsonl")
        stage.finish()
    with open_stage(run / "evaluate", "evaluate", {}, {}) as stage:
        for name, lines in (("losses.jsonl", losses), ("domains.jsonl", domains)):
            (run / "evaluate" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        stage.add_output("domains.jsonl")
        pq.write_table(pa.Table.from_pylist([vars(one) for one in told]), run / "evaluate/tokens.parquet")
        stage.add_output("losses.jsonl")
        stage.add_output("tokens.parquet")
        stage.finish(target=HOSTILE[0])
    (run / "config.yaml").write_text("# " + "".join(SCRIPTS).replace("\n", "") + "\nname: '<script>x</script>'\n")
    return write_report(run).read_text()


def dom(page: str, folder: Path) -> str:
    """What a browser makes of a page, after its scripts had time to run."""
    file = folder / "page.html"
    file.write_text(page)
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
    quiet += ("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000")
    command = [str(CHROMIUM), *quiet, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "</html>" in done.stdout, done.stderr
    return done.stdout


def ran(dumped: str) -> int:
    """How many scripts left their mark on the root element."""
    root = html5lib.parse(dumped, namespaceHTMLElements=False)
    return len(root.get(RAN, ""))


def acting(dumped: str) -> list[str]:
    """Elements and attributes in a page that are not of its template."""
    root = html5lib.parse(dumped, namespaceHTMLElements=False)
    found = [str(one.tag) for one in root.iter() if one.tag not in ELEMENTS]
    for one in root.iter():
        for name, value in one.items():
            fetches = (name == "src" and not value.startswith("data:image/svg+xml;base64,")) or (
                name == "href" and not value.startswith("#")
            )
            if name.startswith("on") or name == "style" or fetches:
                found.append(f"{one.tag} {name}={value}")
    return found


def test_there_are_enough_hostile_strings_and_each_is_another() -> None:
    assert len(set(HOSTILE)) >= 50


@in_a_browser
def test_the_mark_is_left_where_scripts_may_run(tmp_path: Path) -> None:
    raw = "<!DOCTYPE html><html><body>" + "".join(SCRIPTS) + "</body></html>"
    assert ran(dom(raw, tmp_path)) >= len(SCRIPTS) - 3  # some browsers don't fire an event or two in the time given


@in_a_browser
@pytest.mark.parametrize("name", ["explorer", "report"])
def test_nothing_in_a_page_runs_and_no_element_is_a_strings(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = request.getfixturevalue(name)
    without_policy, policies = POLICY.subn("", page)  # escaping must do without the policy
    assert policies == 1
    dumped = dom(without_policy, tmp_path)
    assert ran(dumped) == 0
    assert acting(dumped) == []
    assert dumped.count("<style>") == 1


@in_a_browser
def test_the_policy_alone_stops_scripts_that_would_get_through(explorer: str, tmp_path: Path) -> None:
    raw = explorer.replace("<main>", "<main>" + "".join(SCRIPTS))
    assert ran(dom(raw, tmp_path)) == 0


@pytest.mark.parametrize("name", ["explorer", "report"])
def test_a_page_is_valid_html_and_shows_every_string(name: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(name)
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    assert acting(page) == []
    texts = {"".join(one.itertext()) for one in tree.iter("span")}
    for text in SCRIPTS:
        assert text in texts
    assert html.escape(SCRIPTS[0]).replace("&#x27;", "&#39;") in page


@pytest.mark.parametrize("name", ["explorer", "report"])
def test_no_control_or_invisible_character_is_in_a_page(name: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(name)
    hidden = "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufdd0\ufffe\uffff]"
    assert re.findall(hidden, page) == []
