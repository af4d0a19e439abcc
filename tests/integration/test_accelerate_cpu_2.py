"""configs/accelerate/cpu_2.yaml starts two processes that know of each other, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.integration

SCRIPT = """
import sys
from pathlib import Path
from frozen_fast.config import ExperimentConfig
from frozen_fast.config.schema import TrainingConfig
from frozen_fast.parallel.start import start_parallel

parallel = start_parallel(ExperimentConfig(training=TrainingConfig(device="cpu", expected_world_size=2)))
ranks = parallel.gather_objects(parallel.rank)
Path(sys.argv[1], str(parallel.rank)).write_text(f"{ranks} {parallel.distributed_type}")
parallel.close()
"""


def test_two_processes_see_each_other(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    config = ROOT / "configs" / "accelerate" / "cpu_2.yaml"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE"))
    }
    command = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(config), str(script), str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[0, 1] MULTI_CPU"] * 2
