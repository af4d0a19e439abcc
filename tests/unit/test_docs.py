"""The site: commands name what exists, public modules are in the reference, and the language is plain."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from frozen_fast.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = re.compile(r"(?:bash |python |accelerate launch .*? )?((?:launch|benchmarks|\.ci)/[\w/]+\.(?:sh|py))")
CONFIGS = re.compile(r"configs/[\w/]+\.(?:yaml|json)")
PUBLIC = re.compile(r"`(frozen_(?:fast|kernels)(?:\.\w+)+)`")

BANNED = (
    r"(?-i:\brooms?\b)",
    r"\bgone on with\b",
    r"\bgoes on\b",
    r"\bgo on from\b",
    r"\bwhat stands\b",
    r"\bso many\b",
    r"\btakes? turns\b",
    r"\bgiven up\b",
    r"\blet go\b",
    r"\bkilled without a word\b",
    r"\bCould be had\b",
    r"\bcould be had\b",
    r"\bas fast as the hardware allows\b",
    r"\bharmless when called again\b",
    r"\bwithout a word\b",
    r"\bgo on where\b",
    r"\bput aside\b",
    r"\btakes? up\b",
    r"\bgoes wrong\b",
    r"\bthe first of equals\b",
    r"\bstands? beside\b",
    r"\bstands in for\b",
    r"\bforgives?\b",
    r"\bstood still\b",
    r"\bspeaks? of\b",
    r"\btheir turn\b",
    r"\bnobody\b",
    r"\bfree of repeats\b",
    r"\bfor good\b",
    r"\bin no time\b",
    r"\bthe disk refuses\b",
    r"\banew\b",
    r"\bin silence\b",
    r"\b(?:cannot|could not) be had\b",
    r"\bmade if missing\b",
    r"\bmisshapen\b",
    r"\banything at all\b",
    r"\bno use for\b",
    r"\bfor ever\b",
    r"\bmodel comes in\b",
    r"\b(?:timed|measurement) in turns\b",
    r"\bstands still\b",
    r"\bclip meets\b",
    r"\bkeep what\b",
    r"\bJSON-able\b",
    r"\bHold the parts\b",
)
"""Turns of phrase that a reader of PyTorch's documentation stumbles over (conventions 15)."""


def commands_of(page: Path) -> list[str]:
    """Command lines of a page's bash blocks and indented blocks, continued lines joined."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    blocks += ["\n".join(line[4:] for line in part.splitlines()) for part in re.findall(r"(?:\n {4}[^\n]+)+", text)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(bash|python|launch/|accelerate|frozen-fast|mkdocs)", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_and_configs_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "LOG.md":
        return  # it tells what earlier versions had
    for name in {*SCRIPTS.findall(text), *CONFIGS.findall(text)}:
        if "NAME" not in name and "EXPERIMENT" not in name:
            assert (ROOT / name).exists(), name


def frozen_fast_commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for line in commands_of(page):
            if line.startswith("frozen-fast ") and page.name != "LOG.md":
                found.append((f"{page.relative_to(ROOT)}: {line}", shlex.split(line)[1:]))
    return found


@pytest.mark.parametrize(("line", "words"), frozen_fast_commands(), ids=lambda value: str(value)[:90])
def test_commands_of_the_pages_have_options_that_exist(
    line: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([words[0], "--help"])
    assert stopped.value.code == 0, line
    known = capsys.readouterr().out
    for word in words[1:]:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{line}: {word}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/extend").glob("*.md")), ids=lambda path: path.stem)
def test_pages_on_parts_include_the_file_that_they_describe(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    included = re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE)  # the snippet syntax of pymdownx
    assert len(included) == 1 and (ROOT / included[0]).is_file()
    assert f"`{included[0]}`" in text and "tests/integration/test_plugins.py" in text


def test_public_names_that_pages_mention_can_be_imported() -> None:
    import importlib

    names = {name for page in PAGES if page.name != "LOG.md" for name in PUBLIC.findall(page.read_text("utf-8"))}
    assert len(names) > 5
    for name in sorted(names - {"frozen_fast.plugins"}):
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[end:]:
                found = getattr(found, attribute)
            break
        else:
            raise AssertionError(name)


def docstrings(source: str) -> list[str]:
    """Every docstring of a file, those below constants and attributes included."""
    bodies = [body for node in ast.walk(ast.parse(source)) if isinstance(body := getattr(node, "body", None), list)]
    values = [part.value for body in bodies for part in body if isinstance(part, ast.Expr)]
    texts = [value.value for value in values if isinstance(value, ast.Constant)]
    return [" ".join(text.split()) for text in texts if isinstance(text, str)]


def test_docstrings_below_constants_are_found() -> None:
    assert docstrings('"""One\ntwo."""\nLIMIT = 3\n"""Three."""\n') == ["One two.", "Three."]


def test_pages_and_docstrings_avoid_private_turns_of_phrase() -> None:
    found = []
    texts = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
    for folder in ("frozen_fast", "kernels/frozen_kernels", "launch", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            texts[str(path.relative_to(ROOT))] = "\n".join(docstrings(path.read_text(encoding="utf-8")))
    for pattern in ("configs/**/*.yaml", "launch/*.sh"):
        texts |= {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ROOT.glob(pattern)}
    for name, text in texts.items():
        for phrase in BANNED:
            found += [f"{name}: {match.group(0)}" for match in re.finditer(phrase, text, re.IGNORECASE)]
    assert not found, "\n".join(found)
