"""launch/gpu_bench.sh: every line at tiny sizes on a machine that lacks what a lent GPU machine may lack; bad steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from support.bare_machine import bare_environment
from support.runs import REPOSITORY

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bare_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_bench")
    variables = bare_environment(folder / "bare")
    result = subprocess.run(
        [
            "bash",
            "launch/gpu_bench.sh",
            "--cpu",
            "--steps",
            "gpu_tests,attention,model_step,training",
            str(folder / "out"),
        ],
        cwd=REPOSITORY,
        env={**variables, "FROZEN_FAST_PYTHON": sys.executable, "FROZEN_FAST_VENV": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr + (folder / "out/logs.txt").read_text()
    return folder / "out"


def test_steps_leave_a_few_flat_files_and_the_summary_names_what_is_missing(bare_results: Path) -> None:
    summary = json.loads((bare_results / "summary.json").read_text())
    assert [(row["step"], row["cause"]) for row in summary["steps"]] == [
        ("attention", "ok"),
        ("model_step", "ok"),
        ("gpu_tests", "ok"),
        ("training", "ok"),
    ]
    assert summary["small"] and "no figure counts" in summary["note"]
    left_out = summary["left_out"]
    assert {"xformers", "deepspeed", "nvidia.dali", "av", "decoder pyav", "training on videos"} <= set(left_out)
    assert left_out["throughput_shards"] == left_out["throughput_dali"] == "not requested (--steps)"
    files = {path.name for path in bare_results.iterdir()}
    assert files == {"summary.json", "logs.txt", *(name for row in summary["steps"] for name in row["files"])}
    assert len(files) <= 8 and all(path.is_file() for path in bare_results.iterdir())


def test_results_are_those_of_the_steps(bare_results: Path) -> None:
    stages = json.loads((bare_results / "training_stages.json").read_text())
    assert [stage["frames"] for stage in stages] == [1, 4, 8]
    logs = (bare_results / "logs.txt").read_text()
    assert "1 => 1 => 1 frames" in logs  # the report; still pictures: one frame in every stage
    rows = json.loads((bare_results / "attention.json").read_text())["rows"]
    assert {row["axis"] for row in rows} == {"time", "space"}
    rows = json.loads((bare_results / "model_step.json").read_text())["rows"]
    assert {(row["frames"], row["contender"]) for row in rows} == {
        (T, name) for T in (1, 4) for name in ("released", "sdpa")
    }
    tests = [json.loads(line) for line in (bare_results / "gpu_tests.jsonl").read_text().splitlines()]
    assert tests and {test["outcome"] for test in tests} == {"skipped"} and all(test["reason"] for test in tests)
    assert "==== training" in logs


@pytest.fixture
def gpu_bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "launch")
    import gpu_bench

    machine = {"cuda_device": "NVIDIA Test", "absent": ["xformers"], "missing_attention": {}, "missing_decoders": {}}
    monkeypatch.setattr(gpu_bench, "describe_machine", lambda root, log: machine)
    monkeypatch.setattr(gpu_bench, "STOP_SECONDS", 0.5)
    return gpu_bench


def python_step(gpu_bench: ModuleType, name: str, code: str, *, seconds: float = 20.0, result: str = "") -> object:
    """A step that runs a line of Python in the scratch folder."""
    return gpu_bench.Step(
        name=name,
        seconds=seconds,
        command=lambda bench: [sys.executable, "-c", f"import os; os.chdir({str(bench.scratch)!r}); {code}"],
        results={result: result} if result else {},
    )


def test_failures_are_recorded_and_the_next_step_starts(
    gpu_bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wait = "import time; open('partial.json', 'w').write('{}'); time.sleep(60)"
    steps = (
        python_step(gpu_bench, "crashes", "raise RuntimeError('no such kernel')"),
        python_step(gpu_bench, "hangs", wait, seconds=1.0, result="partial.json"),
        python_step(gpu_bench, "memory", "raise RuntimeError('CUDA out of memory. Tried to allocate')"),
        python_step(gpu_bench, "empty", "pass", result="absent.json"),
        python_step(gpu_bench, "good", "open('good.json', 'w').write('{}')", result="good.json"),
    )
    monkeypatch.setattr(gpu_bench, "STEPS", steps)
    output = tmp_path / "out"
    started = time.monotonic()
    assert gpu_bench.main([str(output), "--seconds", "62"]) == 1
    assert time.monotonic() - started < 45
    summary = json.loads((output / "summary.json").read_text())
    causes = {row["step"]: row["cause"] for row in summary["steps"]}
    assert causes == {"crashes": "crash", "hangs": "timeout", "memory": "out_of_memory", "empty": "crash", "good": "ok"}
    rows = {row["step"]: row for row in summary["steps"]}
    assert "no such kernel" in rows["crashes"]["message"] and "absent.json" in rows["empty"]["message"]
    assert rows["hangs"]["files"] == ["partial.json"]  # what a stopped step left is kept
    assert (output / "good.json").is_file() and not summary["small"]
    assert summary["left_out"] == {"xformers": "not installed: no attention by xformers"}


def test_time_left_over_goes_to_later_steps_and_the_deadline_holds(
    gpu_bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = (
        python_step(gpu_bench, "quick", "pass", seconds=5.0),
        python_step(gpu_bench, "slow", "import time; time.sleep(30)", seconds=1.0),
    )
    monkeypatch.setattr(gpu_bench, "STEPS", steps)
    started = time.monotonic()
    gpu_bench.main([str(tmp_path), "--seconds", "6"])
    assert time.monotonic() - started < 20
    quick, slow = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert quick["limit_seconds"] == pytest.approx(5.0, abs=1.0)
    assert slow["cause"] == "timeout" and slow["limit_seconds"] > 1.0
    with pytest.raises(SystemExit):
        gpu_bench.main(["--steps", "quick,brew", str(tmp_path)])


BENCH_OF_TWO = """
import sys
import gpu_bench

WRITES_ON = "import sys, time\\nfor n in range(1000):\\n open(sys.argv[1], 'w').write(str(n)); time.sleep(0.2)"


def step(name, code, result):
    command = lambda bench: [sys.executable, "-c", code, str(bench.scratch / result)]
    return gpu_bench.Step(name=name, seconds=30.0, command=command, results={result: result})


gpu_bench.describe_machine = lambda root, log: {"absent": [], "missing_attention": {}, "missing_decoders": {}}
gpu_bench.KEEP_SECONDS = 0.1
gpu_bench.STEPS = (
    step("quick", "import sys; open(sys.argv[1], 'w').write('1')", "quick.json"), step("long", WRITES_ON, "long.json")
)
sys.exit(gpu_bench.main([sys.argv[1], "--rehearse", "long=kill@12"]))
"""


def test_what_was_measured_is_there_whatever_ends_the_command(tmp_path: Path) -> None:
    """A rehearsal whose device is taken away: the command is killed, and what its step had written is in the folder."""
    output = tmp_path / "out"
    paths = os.pathsep.join(str(REPOSITORY / folder) for folder in ("launch", "", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", BENCH_OF_TWO, str(output)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -9, done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert [(row["step"], row["cause"], row["files"]) for row in summary["steps"]] == [("quick", "ok", ["quick.json"])]
    assert int((output / "long.json").read_text()) >= 1
    assert "==== quick" in (output / "logs.txt").read_text()


@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [("crash@1", "crash", "illegal memory access"), ("oom@1", "out_of_memory", ""), ("hang@1", "timeout", "")],
)
def test_a_rehearsals_faults_are_told_apart(
    gpu_bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, cause: str, words: str
) -> None:
    """The device fails in the first step; the second is measured, within the time that is left."""
    steps = (
        python_step(gpu_bench, "first", "import time; time.sleep(60)", seconds=5.0),
        python_step(gpu_bench, "second", "open('good.json', 'w').write('{}')", result="good.json"),
    )
    monkeypatch.setattr(gpu_bench, "STEPS", steps)
    assert gpu_bench.main([str(tmp_path), "--seconds", "28", "--rehearse", f"first={fault}"]) == 1
    first, second = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert (first["cause"], second["cause"], second["files"]) == (cause, "ok", ["good.json"])
    assert words in first["message"]


@pytest.mark.parametrize("text", ["first", "first=melt@1", "frist=hang@1", "first=hang@", "first=hang@x"])
def test_a_mistyped_rehearsal_is_refused(
    gpu_bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setattr(gpu_bench, "STEPS", (python_step(gpu_bench, "first", "pass"),))
    with pytest.raises(SystemExit):
        gpu_bench.main(["--rehearse", text])
    assert f"--rehearse: got '{text}'; allowed: STEP=FAULT@SECONDS" in capsys.readouterr().err


def test_the_figures_that_count_come_first(gpu_bench: ModuleType) -> None:
    order = [step.name for step in gpu_bench.STEPS]
    assert order == ["attention", "throughput_shards", "throughput_dali", "model_step", "gpu_tests", "training"]
    bench = gpu_bench.Bench(scratch=Path("s"), small=False, text=Path("t"), machine={"missing_decoders": {}})
    commands = {step.name: " ".join(step.command(bench)) for step in gpu_bench.STEPS}
    assert "--data s/clips/packed" in commands["throughput_shards"] and "dali" not in commands["throughput_shards"]
    assert "data.decode.backend=dali" in commands["throughput_dali"]
    assert commands["model_step"].split("--frames ")[1].startswith("4=64,1=256,8=32")
    no_dali = gpu_bench.Bench(
        scratch=Path("s"), small=False, text=Path("t"), machine={"missing_decoders": {"dali": "not installed"}}
    )
    assert next(step for step in gpu_bench.STEPS if step.name == "throughput_dali").left_out(no_dali) == "not installed"


def test_the_table_of_steps_fits_nine_minutes_and_eight_files(gpu_bench: ModuleType) -> None:
    assert sum(step.seconds for step in gpu_bench.STEPS) + gpu_bench.STOP_SECONDS < 540
    assert gpu_bench.TOTAL_SECONDS <= 530
    names = [name for step in gpu_bench.STEPS for name in step.results.values()]
    assert len(names) + 2 <= 8 and len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in names)
