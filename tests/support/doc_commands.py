"""The commands of the documentation: every line of a page's bash blocks, in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "LOG.md"),
    *sorted((ROOT / "configs").rglob("*.md")),
]
"""Every page but the log, which names files of earlier versions."""

PROGRAMS = r"(\w+=\S+ )*(bash|python3?|launch/|\.ci/|accelerate|frozen-fast|mkdocs|pip|sbatch|cp|kill|\.) "


@dataclass(frozen=True)
class Block:
    """Commands that a page shows together.

    Attributes:
        page: the page, relative to the repository.
        commands: one per command, continued lines joined, comments removed.
    """

    page: str
    commands: tuple[str, ...]


def blocks_of(page: Path) -> list[Block]:
    """The bash blocks of a page, and its indented blocks that begin with a command, in order."""
    text = page.read_text(encoding="utf-8")
    fence = r"(?:\A|\n) *```(?P<language>\w*)\n(?P<fenced>.*?)\n *```"
    blocks = []
    for match in re.finditer(rf"{fence}|(?P<indented>(?:\n {{4}}[^\n]+)+)", text, re.DOTALL):
        lines = match["indented"] or (match["fenced"] if match["language"] == "bash" else "")
        joined = re.sub(r"\\\n *", "", lines)
        commands = tuple(without_comment(line) for line in joined.splitlines() if line.strip())
        if commands and (match["language"] == "bash" or re.match(PROGRAMS, commands[0])):
            blocks.append(Block(page.relative_to(ROOT).as_posix(), commands))
    return blocks


def without_comment(line: str) -> str:
    """A command without indentation and without the comment after two spaces and #."""
    return line.split("  #")[0].strip()
