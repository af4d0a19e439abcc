"""The command line: help without torch, exit codes, one line for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from frozen_fast.cli.main import COMMANDS, build_parser, main, run_and_report
from frozen_fast.config import docs_markdown, dump_yaml, load_config
from frozen_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text("data: {sources: [{path: clips.jsonl}]}\n")
    return path


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("program", [["train.py"], ["-m", "frozen_fast", "train"]])
def test_help_is_complete_and_does_not_import_torch(program: list[str]) -> None:
    result = run("-X", "importtime", *program, "--help")
    assert result.returncode == 0
    assert "--config" in result.stdout and "--resume" in result.stdout and "key.path=value" in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "frozen_fast.config.schema" in imported and "torch" not in imported


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    assert "usage: frozen-fast" in capsys.readouterr().out


def test_help_config_lists_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help-config"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "loss.temperature = 0.05" in out and "data.sources[i].path" in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tran"],
        ["train"],
        ["train", "--config"],
        ["train", "--config", "nowhere.yaml"],
        ["train", "--confg", "nowhere.yaml"],
        ["train", "--config", "x.yaml", "--conf", "y"],
        ["evaluate", "--config", "nowhere.yaml"],
        ["report", "nowhere"],
        ["report", "nowhere", "a=1"],
        ["compare", "nowhere"],
        ["convert-checkpoint", "a"],
        ["convert-checkpoint", "a", "b", "--frames", "0"],
        ["config-docs", "--output", "no/such/folder/x.md"],
    ],
)
def test_mistakes_exit_with_2_and_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_mistake_as_a_user_sees_it(config_file: Path) -> None:
    result = run("train.py", "--config", str(config_file), "loss.temprature=1")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "error: loss.temprature: got an unknown key (did you mean loss.temperature?); "
        "allowed in loss: name, temperature, learnable_temperature, max_logit_scale, sigmoid_bias, average_directions, "
        "margin, local, chunk_rows, gather (command line)\n"
    )


def test_several_mistakes_are_a_line_each_also_where_the_config_is_only_printed(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["model.video.size=garbage", "loss.temprature=1", "curriculum.stages[0].steps=0"]
    assert main(["train", "--config", str(config_file), "--print-config", *wrong]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    fields = [line.split(":")[:2] for line in captured.err.splitlines()]
    assert fields == [
        ["error", " model.video.size"],
        ["error", " curriculum.stages[0].steps"],
        ["error", " loss.temprature"],
    ]


def test_other_ranks_let_rank_0_speak_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for rank, line in (("0", "error: command"), ("3", "error: [rank 3] command")):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "--config", "nowhere.yaml"]) == 2
        assert capsys.readouterr().err.startswith(line.replace("command", "config: got 'nowhere.yaml'"))
    assert len(waits) == 1 and waits[0] > 1


@pytest.mark.slow
def test_a_mistake_under_two_processes_is_told_once() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run(*launcher, "train.py", "--config", "nowhere.yaml", OMP_NUM_THREADS="1")
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1 and "error: config: got 'nowhere.yaml'" in result.stderr


def test_print_config_shows_what_would_run(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--with-meanings"]):
        assert main(["train", "seed=3", "--config", str(config_file), *extra, "--print-config", "name=n"]) == 0
        printed = tmp_path / "printed.yaml"
        printed.write_text(capsys.readouterr().out)
        assert load_config(printed) == load_config(config_file, ["seed=3", "name=n"])
    assert "# " not in dump_yaml(load_config(config_file))


def test_overrides_may_stand_anywhere(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "train",
        "seed=1",
        "--config",
        str(config_file),
        "seed=2",
        "--resume",
        "none",
        "seed=3",
        "--print-config",
    ]
    assert main(arguments) == 0
    assert "\nseed: 3\n" in capsys.readouterr().out


def test_train_without_sources_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("")
    assert main(["train", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: data.sources: got none")
    assert main(["evaluate", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: evaluation.sources: got none")


def test_exit_codes_pass_through_and_the_rest_is_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    def user_error() -> int:
        raise UserError("field: got\n  a\tthing; allowed: another")

    def interrupted() -> int:
        raise KeyboardInterrupt

    def broken() -> int:
        raise RuntimeError("a defect")

    assert run_and_report(lambda: 0) == 0
    assert run_and_report(lambda: 75) == 75
    assert run_and_report(user_error) == 2
    assert capsys.readouterr().err == "error: field: got a thing; allowed: another\n"
    assert run_and_report(interrupted) == 130
    with pytest.raises(RuntimeError):
        run_and_report(broken)


@pytest.mark.parametrize(
    ("arguments", "resume"), [([], "none"), (["--resume", "auto"], "auto"), (["--resume", "runs/x"], "runs/x")]
)
def test_train_hands_config_and_resume_over(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], resume: str
) -> None:
    seen = []
    module = types.ModuleType("frozen_fast.training.run")
    module.train = lambda config, *, resume: seen.append((config, resume)) or 75  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "frozen_fast.training.run", module)
    assert main(["train", "--config", str(config_file), "seed=9", *arguments]) == 75
    assert seen == [(load_config(config_file, ["seed=9"]), resume)]


def test_evaluate_hands_the_checkpoint_over(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    module = types.ModuleType("frozen_fast.training.run")
    module.evaluate_checkpoint = lambda *arguments: seen.append(arguments[1:]) or {"x": 1}  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "frozen_fast.training.run", module)
    call = ["evaluate", "--config", str(config_file), "evaluation.sources[0].path=y"]
    assert main([*call, "--checkpoint", "c", "--output", "o.json"]) == 0
    assert main([*call, "model.checkpoint=d"]) == 0
    assert seen == [("c", "o.json"), ("d", None)]
    assert capsys.readouterr().out.count('"x": 1') == 2
    assert main(call) == 2
    assert "--checkpoint: got none" in capsys.readouterr().err


def test_convert_refuses_to_write_over_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("")
    assert main(["convert-checkpoint", "a.pth.tar", str(tmp_path)]) == 2
    assert "allowed: a new or empty folder" in capsys.readouterr().err


def test_report_and_compare_take_run_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.yaml").write_text("")
    module = types.ModuleType("frozen_fast.report.write_report")
    module.write_report = lambda folder: (folder / "report.html").write_text("")  # type: ignore[attr-defined]
    module.compare_runs = lambda given: f"{len(given)} runs\n"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "frozen_fast.report.write_report", module)
    assert main(["report", str(folders[0])]) == 0
    assert (folders[0] / "report.html").exists() and "report.html" in capsys.readouterr().out
    assert main(["compare", *map(str, folders)]) == 0
    assert capsys.readouterr().out == "2 runs\n"
    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "c.md")]) == 0
    assert (tmp_path / "c.md").read_text() == "2 runs\n"
    assert main(["compare", str(folders[0])]) == 2


def test_config_docs_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-docs", "--output", "-"]) == 0
    assert capsys.readouterr().out == docs_markdown()


def test_a_closed_pipe_is_no_traceback() -> None:
    pipe = f"{sys.executable} -m frozen_fast config-docs --output - | head -n 1"
    result = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "# Config keys\n" and result.stderr == ""


def test_usage_lines_name_the_program() -> None:
    assert build_parser("train.py").prog == "train.py"
    result = run("train.py", "--help")
    assert result.stdout.startswith("usage: train.py [-h] --config FILE")
