"""Every command in the documentation runs in a test or is checked here: its options parse, its config loads.

tests/integration/test_tutorials.py runs the pages of TUTORIALS. A command of any other page is checked as far as it
can be without its data, GPUs or network; a command that no check recognises fails.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable

import pytest

from frozen_fast.cli.main import build_parser
from frozen_fast.config import load_config
from support.doc_commands import PAGES, ROOT, blocks_of

TUTORIALS = (
    "docs/get_started.md",
    "docs/finetuning.md",
    "docs/launching.md",
    "docs/search.md",
    "docs/sweeps.md",
    "docs/tutorials/finetune_msrvtt.md",
    "docs/tutorials/pretrain_webvid.md",
)
PLACEHOLDERS = re.compile(r"configs/(eval/)?FILE|configs/\w+/NAME")


def commands() -> list[tuple[str, str]]:
    """(page, command) of every page, each command once per page."""
    found = [(block.page, line) for page in PAGES for block in blocks_of(page) for line in block.commands]
    return list(dict.fromkeys(found))


def check_frozen_fast(words: list[str]) -> None:
    """The options exist and have valid values; the config and its overrides load."""
    parsed = build_parser().parse_args(words)
    config = getattr(parsed, "config", None)
    if config is not None and not PLACEHOLDERS.match(config):
        load_config(config, parsed.overrides)


def check_train(words: list[str]) -> None:
    check_frozen_fast(["train", *words])


def check_accelerate(words: list[str]) -> None:
    """accelerate launch: its file exists, and what it starts is checked."""
    assert words[0] == "launch", words
    if "-m" in words:
        module = words.index("-m")
        assert words[module + 1] == "frozen_fast", words
        return check_frozen_fast(words[module + 2 :])
    script = words.index("train.py")
    options = words[1:script]
    for option, value in zip(options, options[1:], strict=False):
        if option == "--config_file" and value.startswith("configs/"):
            assert (ROOT / value).is_file(), value
    arguments = words[script + 1 :]
    if not any(word.startswith("runs/") for word in arguments):
        check_train(arguments)
    return None


def check_launcher(words: list[str]) -> None:
    """A launcher prints the command that it would start."""
    done = subprocess.run(
        ["bash", words[0], "--dry-run", *[word for word in words[1:] if word != "--dry-run"]],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "FROZEN_FAST_PYTHON": "true", "NODES": "2", "RENDEZVOUS": "node0:29500"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "train.py" in done.stdout


def check_script(words: list[str]) -> None:
    """A script of the repository: it exists, and its source names every option."""
    path = ROOT / words[0]
    if path.suffix == ".sh":
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    source = path.read_text(encoding="utf-8")
    source += "".join(other.read_text(encoding="utf-8") for other in path.parent.glob("*.py"))
    for word in words[1:]:
        if word.startswith("--") and path.name != "test.sh":
            assert f'"{word.split("=")[0]}"' in source, word


def check_pip(words: list[str]) -> None:
    """pip install -e '.[extra]': the extra exists. Other packages are named, not installed."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8") + '"all" "docs"'
    for word in words:
        for extra in re.findall(r"\.\[([\w,-]+)\]", word):
            assert all(f'"{name}"' in setup for name in extra.split(",")), word


def nothing(words: list[str]) -> None:
    """Shell commands without anything of this project."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    r"frozen-fast ": lambda words: check_frozen_fast(words[1:]),
    r"python train\.py ": lambda words: check_train(words[2:]),
    r"accelerate ": lambda words: check_accelerate(words[1:]),
    r"(bash )?launch/(single|multi)_node\.sh ": lambda words: check_launcher([w for w in words if w != "bash"]),
    r"(bash|python) (launch|benchmarks|\.ci)/": lambda words: check_script(words[1:]),
    r"launch/\w+\.sh( |$)": check_script,
    r"(python3? -m )?pip ": check_pip,
    r"mkdocs serve|\. \.venv/bin/activate|cp FOLDER/|kill -USR1": nothing,
}


def shell_words(command: str) -> list[str]:
    """Words without leading NAME=VALUE assignments and without what follows &&."""
    words = shlex.split(command.split(" && ")[0])
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    return words


@pytest.mark.parametrize(("page", "command"), [pair for pair in commands() if pair[0] not in TUTORIALS])
def test_a_command_outside_the_tutorials_is_valid(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shell_words(command)
    for beginning, check in CHECKS.items():
        if re.match(beginning, shlex.join(words)) or re.match(beginning, " ".join(words)):
            return check(words)
    raise AssertionError(f"{page}: no test runs or checks: {command}")


def test_a_wrong_command_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in (
        "frozen-fast search --index x --wher kind=video",
        "python train.py --config configs/demo.yaml model.video.towr=x",
        "accelerate launch --config_file configs/accelerate/none.yaml train.py --config configs/demo.yaml",
        "frozen-fast pack --config configs/missing.yaml --source a --output b",
    ):
        with pytest.raises((ValueError, AssertionError)):
            test_a_command_outside_the_tutorials_is_valid("page", command, monkeypatch)


def test_the_tutorials_are_those_that_run() -> None:
    text = (ROOT / "tests" / "integration" / "test_tutorials.py").read_text(encoding="utf-8")
    assert set(re.findall(r'^    "(docs/\S+\.md)": \(', text, re.MULTILINE)) == set(TUTORIALS)


def test_pages_show_commands_in_bash_blocks() -> None:
    """So that the tests above find them: fenced as bash in docs/, fenced or indented elsewhere."""
    for path in PAGES:
        if path.is_relative_to(ROOT / "docs"):
            text = re.sub(r" *```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            loose = re.findall(r"\n    (?:frozen-fast|accelerate launch|python|bash|launch/)[^\n]*", text)
            assert not loose, f"{path.relative_to(ROOT)}: {loose}"
