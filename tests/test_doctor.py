"""`rho doctor`: what is there works, what is not is named, and the versions it claims are those that are pinned."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import rho.doctor
from rho.cli import app
from rho.doctor import TESTED, Finding, examine, examine_model, loss_is_exact, show, tried
from rho.errors import RhoError

ROOT = Path(__file__).parent.parent


def test_what_is_installed_here_works_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = {finding.what: finding for finding in examine()}
    for what in ("plain PyTorch", "transformers: Trainer", "Accelerate", "LoRA"):
        assert findings[what].works, findings[what].note
    assert findings["plain PyTorch"].note.startswith("agrees with the formula on")


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rho.objective.slm_loss", lambda loss, mask, count: (loss.nan_to_num() * mask).sum() / count + 1
    )
    with pytest.raises(RhoError, match="differ from the formula"):
        loss_is_exact()


def test_what_is_missing_or_broken_is_said() -> None:
    assert tried("x", "no-such-package", lambda: "") == Finding(
        "x", "no-such-package", False, "no-such-package is not installed"
    )

    def broken() -> str:
        raise AttributeError("has no\n  such name")

    found = tried("x", "torch", broken)
    assert not found.works and found.note == "AttributeError: has no such name"
    assert found.installed.startswith("2.") and found.tested == "2.13.0"


def test_trainers_of_other_versions_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rho.durable.HOOKS", ("get_batch_samples", "_no_such_hook"))
    with pytest.raises(RhoError, match="its Trainer has no _no_such_hook"):
        rho.doctor.trainer_hooks()
    trl = pytest.importorskip("trl")
    monkeypatch.setattr(trl.SFTTrainer, "_prepare_dataset", lambda self, dataset: dataset)
    with pytest.raises(RhoError, match="_prepare_dataset takes self, dataset"):
        rho.doctor.trl_hooks()
    assert rho.doctor.dpo_hooks() == ""
    monkeypatch.setattr(trl.DPOTrainer, "_precompute_ref_logps", lambda self, dataset: dataset)
    with pytest.raises(RhoError, match="_precompute_ref_logps takes self, dataset"):
        rho.doctor.dpo_hooks()


def test_a_model_is_examined_and_what_its_head_has_is_named(architecture: dict, tmp_path: Path) -> None:
    (tmp_path / "llama.json").write_text(json.dumps(architecture))
    assert all(finding.works for finding in examine_model(str(tmp_path / "llama.json")))
    special = {**architecture, "model_type": "cohere", "logit_scale": 0.5}
    (tmp_path / "cohere.json").write_text(json.dumps(special))
    found = {finding.what.split(": ")[-1]: finding for finding in examine_model(str(tmp_path / "cohere.json"))}
    assert found["the loss's fast path"].works
    assert "its head has a scale, which only rho's own loss knows" in found["other libraries' losses"].note
    [missing] = examine_model(str(tmp_path / "nothing"))
    assert not missing.works and "no such file or folder" in missing.note


def test_the_command_prints_the_table(architecture: dict, tmp_path: Path) -> None:
    (tmp_path / "llama.json").write_text(json.dumps(architecture))
    said = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "llama.json")], env={"COLUMNS": "200"})
    assert said.exit_code == 0, said.output
    assert "rho doctor" in said.output and "fast path" in said.output and "5.3.0 to 5.23.0" in said.output
    console = Console(width=120, record=True, file=io.StringIO())
    show([Finding("a", "", False, "found [1, 2]")], console)
    assert "found [1, 2]" in console.export_text()


def test_the_versions_it_claims_are_those_of_the_tested_set() -> None:
    pinned, oldest = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
        for name in ("constraints.txt", "constraints-oldest.txt")
    )
    for package, (_, newest) in TESTED.items():
        assert pinned.get(package, newest) == newest, package
    assert oldest["transformers"] == TESTED["transformers"][0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "transformers>=" + ".".join(TESTED["transformers"][0].split(".")[:2]) in project["dependencies"]
