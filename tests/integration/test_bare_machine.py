"""Without av, DALI, xformers, deepspeed and the like: what needs none of them works, the rest says what it lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.bare_machine import OPTIONAL, bare_environment
from support.runs import REPOSITORY, make_data, tiny_mapping

pytestmark = pytest.mark.integration

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import frozen_fast, frozen_kernels
for package in (frozen_fast, frozen_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from frozen_fast.data.decode import unavailable_backends
print(json.dumps(unavailable_backends()))
"""


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return bare_environment(tmp_path_factory.mktemp("bare"))


def run(arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=120
    )


def test_every_module_can_be_imported_and_decoders_say_what_they_lack(variables: dict[str, str]) -> None:
    for name in OPTIONAL:
        assert run(["-c", f"import {name}"], variables).returncode != 0
    result = run(["-c", IMPORT_ALL], variables)
    assert result.returncode == 0, result.stderr
    reasons = json.loads(result.stdout.splitlines()[-1])
    assert set(reasons) == {"dali", "torchcodec", "decord", "pyav"}
    assert all("PyAV" in reason for reason in reasons.values())


def test_pictures_train_and_videos_end_in_one_line(tmp_path: Path, variables: dict[str, str]) -> None:
    files = make_data(tmp_path / "data", videos=8, pictures=8)
    stages = {"stages": [{"frames": 1, "global_batch_size": 4, "steps": 2}]}
    for source, code in (("pictures", 0), ("videos", 2)):
        tree = tiny_mapping(
            files,
            tmp_path / source,
            data={"sources": [{"name": source, "path": str(files[source])}], "decode": {"threads": 1}},
            curriculum=stages,
        )
        config = tmp_path / f"{source}.yaml"
        config.write_text(json.dumps(tree), encoding="utf-8")
        result = run(["train.py", "--config", str(config)], variables)
        assert result.returncode == code, result.stderr
    assert "PyAV" in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "pictures" / "report.md").is_file()
