"""A small part of benchmarks/kill_table.py: killed runs end as the undisturbed one, damaged checkpoints are noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import REPOSITORY, environment

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.mark.timeout(1800)
def test_killed_runs_end_as_the_undisturbed_ones(tmp_path: Path) -> None:
    """One process and two ranks under DDP; then a second call continues the file and adds nothing."""
    output = tmp_path / "kill_table.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "kill_table.py"), "--output", str(output)]
    command += ["--runs", "2", "--faults", "2", "--damages", "8", "--work", str(tmp_path / "work")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert [row["launch"] for row in result["runs"]] == ["one process", "ddp, 2 ranks"]
    assert all(row["good"] and len(row["faults"]) == 2 for row in result["runs"]), result["runs"]
    damage = result["damage"]
    assert (damage["detected"], damage["older_used"], damage["full_runs_equal"]) == (8, 8, 1)
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0 and json.loads(output.read_text()) == result
