"""A reference behind a real vLLM server. The test takes minutes, and the server an environment of its own (3.5 GB)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = "RHO_API_SERVER_ENVIRONMENT"
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "api_server.py"


@pytest.mark.skipif(ENVIRONMENT not in os.environ, reason=f"{ENVIRONMENT} names no folder that {SCRIPT.name} made")
@pytest.mark.timeout(1800)
def test_a_real_server_scores_as_transformers_do_also_if_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--environment", os.environ[ENVIRONMENT], "--out", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found["missed"] == []
    assert found["precision"]["packed"]["tokens"] > 12_000
    assert found["killed"]["kills"] == 2 and found["killed"]["identical"]
