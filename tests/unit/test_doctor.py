"""The doctor names each fault of a machine with what to do, and finds nothing wrong where nothing is."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.cli.doctor import GIB, Launch, Machine, examine, look_at_machine, read_launch
from frozen_fast.cli.main import main
from frozen_fast.config import config_from_mapping
from frozen_fast.errors import UserError

GOOD = Machine(
    gpus_of_driver=8,
    gpus_of_torch=8,
    cuda_of_torch="12.8",
    decodes_video=True,
    compiler="/usr/bin/cc",
    deepspeed="0.19.8",
    nccl=True,
    shared_memory_bytes=16 * GIB,
    open_files=65536,
    cores=64,
    disk_free_bytes=500 * GIB,
    disk_bytes_per_second=1e9,
)


def launch(processes: int = 8, deepspeed: bool = False, **sections: Any) -> Launch:
    return Launch(config=config_from_mapping(sections), processes=processes, deepspeed=deepspeed)


def test_a_good_machine_has_no_problem() -> None:
    findings = examine(GOOD, launch(data={"decode": {"workers": 4}}, training={"expected_world_size": 8}))
    assert {finding.level for finding in findings} == {"ok"} and len(findings) >= 8


FAULTS: dict[str, tuple[Machine, Launch, str]] = {
    "no shm": (replace(GOOD, shared_memory_bytes=None), launch(data={"decode": {"workers": 4}}), "shared memory"),
    "small shm": (replace(GOOD, shared_memory_bytes=64 * 2**20), launch(data={"decode": {"workers": 4}}), "--shm-size"),
    "no compiler": (replace(GOOD, compiler=""), launch(training={"compile": True}), "install gcc"),
    "wrong world size": (GOOD, launch(training={"expected_world_size": 16}), "training.expected_world_size=16"),
    "missing operator": (
        replace(GOOD, attention={"xformers": "no operator"}),
        launch(model={"video": {"attention": "xformers"}}),
        "model.video.attention=xformers: no operator",
    ),
    "full disk": (replace(GOOD, disk_free_bytes=10**6), launch(), "free some space"),
    "disk not writable": (replace(GOOD, disk_error="cannot be written to"), launch(), "set run_folder"),
    "driver too old": (replace(GOOD, gpus_of_torch=0), launch(), "update the driver"),
    "more processes than GPUs": (replace(GOOD, gpus_of_torch=2), launch(), "8 processes on this machine for 2 GPU"),
    "no DeepSpeed": (replace(GOOD, deepspeed=""), launch(deepspeed=True), "pip install deepspeed"),
    "no decoder": (
        replace(GOOD, decoders={"dali": "not installed"}),
        launch(data={"decode": {"backend": "dali"}}),
        "auto, torchcodec, decord, pyav",
    ),
    "few open files": (replace(GOOD, open_files=128), launch(), "ulimit -n 65536"),
    "cache not writable": (replace(GOOD, caches={"/x/cache": "Permission denied"}), launch(), "FROZEN_FAST_CACHE"),
    "broken package": (replace(GOOD, broken={"torchvision": "operator missing"}), launch(), "torchvision"),
    "no NCCL": (replace(GOOD, nccl=False), launch(), "built without it"),
    "no GPU for GPU launch": (
        replace(GOOD, gpus_of_driver=None, gpus_of_torch=0),
        launch(),
        "configs/accelerate/cpu_2.yaml",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_what_to_do(name: str) -> None:
    machine, asked, words = FAULTS[name]
    problems = [finding for finding in examine(machine, asked) if finding.level != "ok"]
    assert [finding.level for finding in problems] == ["fails"], problems
    assert problems[0].advice
    assert words in f"{problems[0].what}: {problems[0].found}. {problems[0].advice}"


WARNINGS: dict[str, tuple[Machine, Launch, str]] = {
    "few cores": (
        replace(GOOD, cores=8),
        launch(data={"decode": {"workers": 4, "threads": 1}}),
        "cores: 8 for 40 computing and decoding threads",
    ),
    "no compiler, nothing compiled": (replace(GOOD, compiler=""), launch(), "install gcc"),
    "no video decoder": (replace(GOOD, decodes_video=False), launch(), "NVIDIA_DRIVER_CAPABILITIES"),
    "cache not writable, no GPU": (
        replace(GOOD, gpus_of_driver=None, gpus_of_torch=0, caches={"/x/cache": "Permission denied"}),
        Launch(config=config_from_mapping({"training": {"device": "cpu"}})),
        "/x/cache: Permission denied",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_slow_but_works_is_a_warning_with_what_to_do(name: str) -> None:
    machine, asked, words = WARNINGS[name]
    problems = [finding for finding in examine(machine, asked) if finding.level != "ok"]
    assert [finding.level for finding in problems] == ["warning"], problems
    assert problems[0].advice and words in f"{problems[0].what}: {problems[0].found}. {problems[0].advice}"


@pytest.mark.usefixtures("forgotten_c_builds")
def test_faults_of_this_machine_are_found_by_looking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No compiler on PATH, few open files, a file in the cache's place, and three things that the launch gets wrong."""
    for name in ("nvidia-smi", "git"):
        (tmp_path / "bin" / name).mkdir(parents=True)
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("FROZEN_FAST_CACHE", str(tmp_path / "cache"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (tmp_path / "x.yaml").write_text(f"run_folder: {tmp_path / 'run'}\ntraining: {{compile: true, device: cuda}}\n")
    (tmp_path / "a.yaml").write_text("num_processes: 3\nnum_machines: 2\nuse_cpu: false\n")
    wrong = ["training.expected_world_size=5", "data.decode.workers=4", "model.video.attention=triton"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        code = main(["doctor", "--config", str(tmp_path / "x.yaml"), "--accelerate", str(tmp_path / "a.yaml"), *wrong])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert code == 2
    failing = [
        line.split(":")[0].split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if "fails" in line
    ]
    expected = {
        "C compiler",
        "open files",
        "cache",
        "world size",
        "attention",
        *(() if torch.cuda.is_available() else ("GPUs",)),
    }
    assert expected <= set(failing)


def test_this_machine_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = look_at_machine(tmp_path / "not" / "there")
    assert found.cores >= 1 and found.disk_free_bytes > 0 and not found.broken
    (tmp_path / "x.yaml").write_text(f"run_folder: {tmp_path / 'run'}\n")
    assert main(["doctor", "--config", str(tmp_path / "x.yaml"), "--json", "training.expected_world_size=3"]) == 2
    failing = [row["what"] for row in json.loads(capsys.readouterr().out) if row["level"] == "fails"]
    assert "world size" in failing
    assert not (tmp_path / "run").exists()


def test_the_accelerate_file_is_read_or_named(tmp_path: Path) -> None:
    config = config_from_mapping({})
    path = tmp_path / "a.yaml"
    path.write_text("num_processes: 16\nnum_machines: 2\ndistributed_type: DEEPSPEED\nuse_cpu: false\n")
    found = read_launch(config, path, None)
    assert (found.processes, found.local_processes, found.deepspeed) == (16, 8, True)
    path.write_text("[1, 2")
    with pytest.raises(UserError, match="^--accelerate: got .*a.yaml, which cannot be read"):
        read_launch(config, path, None)
