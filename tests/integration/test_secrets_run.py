"""A run with keys in its environment, its settings and its trackers: none of them is in what it leaves or says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from frozen_fast.config import dump_yaml
from support.runs import REPOSITORY, environment, make_data, read_json, tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz123456",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery",
}


def test_no_secret_is_in_the_run_folder_or_the_log(tmp_path: Path) -> None:
    """The project's name holds one key, the run's name an address with a password; the checkpoint is resumed from."""
    data = make_data(tmp_path / "data", videos=8, pictures=1)
    config = tiny_config(
        data,
        tmp_path / "run",
        curriculum={"stages": [{"frames": 1, "global_batch_size": 4, "steps": 2}]},
        tracking={
            "trackers": ["tensorboard", "wandb"],
            "wandb_mode": "offline",
            "project": "p-" + SECRETS["HF_TOKEN"],
            "run_name": "https://me:hunter2hunter2@host/x",
        },
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(tmp_path / "config.yaml")]
    command += ["--resume", "auto", f"name={SECRETS['MLFLOW_TRACKING_PASSWORD']}"]
    told = ""
    for extra in ((), (f"data.sources[0].path={SECRETS['WANDB_API_KEY']}",)):
        done = subprocess.run(
            [*command, *extra], env=environment(**SECRETS), capture_output=True, text=True, timeout=700, check=False
        )
        assert done.returncode == (2 if extra else 0), done.stderr[-2000:]
        told += done.stdout + done.stderr
    assert read_json(tmp_path / "run" / "status.json")["exit_code"] == 0, "the refused start changes nothing"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"tensorboard", "wandb", "checkpoints"} <= {path.relative_to(tmp_path / "run").parts[0] for path in files}
    for secret in (*SECRETS.values(), "hunter2"):
        assert secret not in told
        assert [path for path in files if secret.encode() in path.read_bytes()] == [], secret
