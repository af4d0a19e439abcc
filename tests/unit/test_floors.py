"""Who may import whom (docs/architecture.md): down only, and not sideways."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = {
    "frozen_kernels": 0,
    "frozen_fast.errors": 0,
    "frozen_fast": 0,  # the package itself: its version; DualEncoder is handed through lazily
    "frozen_fast.config": 1,
    "frozen_fast.common": 1,
    "frozen_fast.data": 2,
    "frozen_fast.models": 2,
    "frozen_fast.losses": 2,
    "frozen_fast.evaluation": 2,
    "frozen_fast.retrieval": 2,
    "frozen_fast.profiling": 2,
    "frozen_fast.training": 3,
    "frozen_fast.sweep": 3,
    "frozen_fast.cli": 4,
    "benchmarks": 4,
    "launch": 4,
    "frozen_fast.__main__": 5,  # the two doors: they only call the command line
    "train": 5,
}
HANDED_THROUGH = ("frozen_fast", "frozen_fast.models")
OURS = ("frozen_fast", "frozen_kernels", "train", "benchmarks", "launch")


def room_of(module: str) -> str:
    """The room a module belongs to: its longest known prefix."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in FLOORS and (name != "frozen_fast" or len(parts) == 1):
            return name
    raise LookupError(f"{module} is in no room of docs/architecture.md")


def module_of(path: Path, root: Path) -> str:
    """Dotted name of a source file."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, known: set[str]) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at the top, in functions or for type checking, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; imports are absolute"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner == "frozen_fast.DualEncoder":
                    inner = "frozen_fast.models"
                yield (inner if inner in known or inner == "frozen_fast.models" else node.module), node.lineno


def mistakes_of(module: str, source: str, known: set[str]) -> list[str]:
    """Imports of one module that go up or sideways."""
    room = room_of(module)
    found = []
    for target, line in imports_of(ast.parse(source), known):
        if target.split(".")[0] not in OURS:
            continue
        other = room_of(target)
        if other == room or (room, other) == HANDED_THROUGH:
            continue
        if FLOORS[other] >= FLOORS[room]:
            direction = "up" if FLOORS[other] > FLOORS[room] else "sideways"
            found.append(f"{module} line {line}: imports {target}, an arrow that goes {direction}")
    return found


def sources() -> dict[str, Path]:
    """Every module of the project that is on a floor."""
    files = [ROOT / "train.py"]
    for folder in ("frozen_fast", "kernels/frozen_kernels", "benchmarks", "launch"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return {module_of(path, ROOT): path for path in files}


def test_no_arrow_goes_up_or_sideways() -> None:
    modules = sources()
    assert {"frozen_fast.config.schema", "frozen_kernels", "frozen_fast.cli.main", "train"} <= set(modules)
    mistakes = []
    for module, path in modules.items():
        mistakes += mistakes_of(module, path.read_text(encoding="utf-8"), set(modules))
    assert not mistakes, "\n".join(mistakes)


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("frozen_fast.models.text", "from frozen_fast.config.schema import ModelConfig", False),
        ("frozen_fast.models.text", "from frozen_fast.models.tokenizer import Tokenizer", False),
        ("frozen_fast.models.text", "from frozen_fast import common", False),
        ("frozen_fast.models.text", "import frozen_fast.data.batches", True),
        ("frozen_fast.models.text", "def f():\n    from frozen_fast import data", True),
        ("frozen_fast.models.text", "if TYPE_CHECKING:\n    from frozen_fast.training.run import train", True),
        ("frozen_fast.config.load", "from frozen_fast.common.files import write_json", True),
        ("frozen_fast.data.batches", "from frozen_fast import DualEncoder", True),
        ("frozen_fast.training.build", "from frozen_fast import DualEncoder", False),
        ("train", "from frozen_fast.cli.main import main", False),
        ("frozen_fast.training.run", "from frozen_fast.models import DualEncoder", False),
        ("frozen_fast.training.run", "from frozen_fast.sweep import driver", True),
        ("frozen_fast.training.run", "from frozen_fast.cli.main import main", True),
        ("frozen_kernels.attention", "from frozen_fast.errors import UserError", True),
        ("benchmarks.throughput", "from frozen_fast.cli.main import main", True),
    ],
)
def test_the_rule_itself(module: str, source: str, wrong: bool) -> None:
    known = {"frozen_fast.common", "frozen_fast.data", "frozen_fast.sweep.driver", module}
    assert bool(mistakes_of(module, source, known)) is wrong


def test_the_kernels_folder_is_no_package() -> None:
    """A top-level package named kernels would shadow the one on PyPI, and transformers' imports with it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "frozen_kernels" / "__init__.py").is_file()


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for module, path in sources().items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not text or text.startswith("TODO"):
            silent.append(module)
    assert not silent, f"without a docstring: {silent}"


def test_optional_libraries_are_imported_inside_their_own_module_only() -> None:
    """Importing the library must not need a decoder, DeepSpeed, xformers or wandb."""
    optional = {"nvidia", "decord", "torchcodec", "xformers", "deepspeed", "wandb"}
    at_the_top = []
    for module, path in sources().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            hits = optional & {name.split(".")[0] for name in names}
            own = any(hit in module.rsplit(".", 1)[-1] or hit == "nvidia" and "dali" in module for hit in hits)
            if hits and not own:
                at_the_top.append(f"{module} imports {sorted(hits)}")
    assert not at_the_top, at_the_top
