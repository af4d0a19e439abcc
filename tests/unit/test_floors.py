"""Imports (docs/architecture.md): a file imports from lower floors only, and imports form no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = {
    "frozen_kernels": 0,
    "frozen_fast.errors": 0,
    "frozen_fast": 0,  # the package itself: its version and the lazily imported public names
    "frozen_fast.config": 1,
    "frozen_fast.common": 1,
    "frozen_fast.data": 2,
    "frozen_fast.models": 2,
    "frozen_fast.losses": 2,
    "frozen_fast.optimizers": 2,
    "frozen_fast.evaluation": 2,
    "frozen_fast.profiling": 2,
    "frozen_fast.records": 2,
    "frozen_fast.report": 3,
    "frozen_fast.parallel": 3,
    "frozen_fast.training": 4,
    "frozen_fast.sweep": 4,
    "frozen_fast.search": 4,
    "frozen_fast.sharing": 4,
    "frozen_fast.cli": 5,
    "benchmarks": 5,
    "launch": 5,
    "frozen_fast.__main__": 6,
    "train": 6,
}
"""Package -> floor. Packages of one floor do not import each other."""

PUBLIC_NAMES = {
    "DualEncoder": "frozen_fast.models",
    "load_model": "frozen_fast.models.load_model",
    "load_video": "frozen_fast.data.load.video_frames",
    "transforms": "frozen_fast.data.load.video_frames",
}
"""Names that frozen_fast/__init__.py imports on first use, and where from."""

OURS = ("frozen_fast", "frozen_kernels", "train", "benchmarks", "launch")
Graph = dict[str, dict[str, int]]
"""Module -> imported module -> line."""


def package_of(module: str) -> str:
    """The package of FLOORS that a module belongs to: its longest known prefix."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in FLOORS and (name != "frozen_fast" or len(parts) == 1):
            return name
    raise LookupError(f"{module} belongs to no package of FLOORS")


def folder_of(module: str, packages: set[str]) -> str:
    """The folder that holds a module; a package's __init__ belongs to the package itself."""
    return module if module in packages else module.rpartition(".")[0] or module


def module_of(path: Path, root: Path) -> str:
    """Dotted name of a source file."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, known: set[str]) -> Iterator[tuple[str, int]]:
    """Every module of ours that a file imports, at the top, in functions or for type checking, with the line."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; imports are absolute"
            assert node.module
            inner = [(alias.name, f"{node.module}.{alias.name}") for alias in node.names]
            names = [full if full in known else node.module for _, full in inner]
            if node.module == "frozen_fast":
                names += [PUBLIC_NAMES[name] for name, _ in inner if name in PUBLIC_NAMES]
        for name in names:
            if name.split(".")[0] in OURS:
                yield name, node.lineno


def import_graph(sources: Mapping[str, str]) -> Graph:
    """Imports between the modules given as name -> source text."""
    known = set(sources)
    return {module: dict(imports_of(source, known)) for module, source in sources.items()}


def wrong_floors(graph: Graph) -> list[str]:
    """Imports that go up, or sideways between two packages of one floor."""
    found = []
    for module, targets in graph.items():
        package = package_of(module)
        for target, line in targets.items():
            other = package_of(target)
            if other == package or module == "frozen_fast":
                continue
            if FLOORS[other] >= FLOORS[package]:
                direction = "up" if FLOORS[other] > FLOORS[package] else "sideways"
                found.append(f"{module} line {line}: imports {target}, which goes {direction}")
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def file_circles(graph: Graph) -> list[list[str]]:
    """Files that import each other in a circle; the public package frozen_fast is left out: it imports lazily."""
    return circles({module: set(targets) - {"frozen_fast"} for module, targets in graph.items()})


def folder_circles(graph: Graph) -> list[list[str]]:
    """Folders that import each other in a circle. A package's __init__ re-exports and is not counted."""
    packages = {module for module in graph if any(other.startswith(f"{module}.") for other in graph)}
    folders: dict[str, set[str]] = {}
    for module, targets in graph.items():
        if module in packages:
            continue
        here = folder_of(module, packages)
        for target in targets:
            there = folder_of(target, packages)
            if there != here and not here.startswith(f"{there}."):
                folders.setdefault(here, set()).add(there)
    return circles(folders)


def project_sources() -> dict[str, str]:
    """Every module of the project, with its text."""
    files = [ROOT / "train.py"]
    for folder in ("frozen_fast", "kernels/frozen_kernels", "benchmarks", "launch"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return {module_of(path, ROOT): path.read_text(encoding="utf-8") for path in files}


def test_imports_go_down_and_form_no_circle() -> None:
    graph = import_graph(project_sources())
    assert {"frozen_fast.config.schema", "frozen_kernels", "frozen_fast.cli.main", "train"} <= set(graph)
    assert not wrong_floors(graph), "\n".join(wrong_floors(graph))
    assert not file_circles(graph), file_circles(graph)
    assert not folder_circles(graph), folder_circles(graph)


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("frozen_fast.models.text.text_tower", "from frozen_fast.config.schema import ModelConfig", False),
        ("frozen_fast.models.text.text_tower", "from frozen_fast.models.text.tokenizer import Tokenizer", False),
        ("frozen_fast.models.text.text_tower", "from frozen_fast import common", False),
        ("frozen_fast.models.text.text_tower", "import frozen_fast.data.load.training_loader", True),
        ("frozen_fast.models.text.text_tower", "def f():\n    from frozen_fast import data", True),
        ("frozen_fast.models.linear", "if TYPE_CHECKING:\n    from frozen_fast.training.run import train", True),
        ("frozen_fast.config.load", "from frozen_fast.common.files import write_json", True),
        ("frozen_fast.data.load.training_loader", "from frozen_fast import DualEncoder", True),
        ("frozen_fast.training.parts", "from frozen_fast import DualEncoder", False),
        ("train", "from frozen_fast.cli.main import main", False),
        ("frozen_fast.training.run", "from frozen_fast.models import DualEncoder", False),
        ("frozen_fast.training.run", "from frozen_fast.sweep import driver", True),
        ("frozen_fast.report.run_data", "from frozen_fast.parallel.base import Parallel", True),
        ("frozen_fast.training.run", "from frozen_fast.cli.main import main", True),
        ("frozen_kernels.attention.api", "from frozen_fast.errors import UserError", True),
        ("benchmarks.throughput", "from frozen_fast.cli.main import main", True),
    ],
)
def test_the_floors_rule(module: str, source: str, wrong: bool) -> None:
    known = {"frozen_fast.common": "", "frozen_fast.data": "", "frozen_fast.sweep.driver": ""}
    assert bool(wrong_floors(import_graph({**known, module: source}))) is wrong


def test_a_circle_inside_a_function_is_found() -> None:
    sources = {
        "frozen_fast.models.a": "def f():\n    from frozen_fast.models.b import x",
        "frozen_fast.models.b": "from frozen_fast.models.c import x",
        "frozen_fast.models.c": "def f():\n    def g():\n        import frozen_fast.models.a",
        "frozen_fast.models.d": "from frozen_fast.models.a import f",
    }
    group = ["frozen_fast.models.a", "frozen_fast.models.b", "frozen_fast.models.c"]
    assert file_circles(import_graph(sources)) == [group]
    sources["frozen_fast.models.c"] = "x = 1"
    assert file_circles(import_graph(sources)) == []


def test_a_circle_between_folders_is_found() -> None:
    sources = {
        "frozen_fast.data.one": "",
        "frozen_fast.data.two": "",
        "frozen_fast.data.one.a": "from frozen_fast.data.two.a import x",
        "frozen_fast.data.one.b": "",
        "frozen_fast.data.two.a": "",
        "frozen_fast.data.two.b": "def f():\n    from frozen_fast.data.one.b import x",
    }
    assert file_circles(import_graph(sources)) == []
    assert folder_circles(import_graph(sources)) == [["frozen_fast.data.one", "frozen_fast.data.two"]]


def test_file_names_tell_files_apart() -> None:
    """Two files of one name in different packages cannot be told apart in an editor's tabs or a traceback."""
    sources = project_sources()
    packages = {module for module in sources if any(other.startswith(f"{module}.") for other in sources)}
    names: dict[str, list[str]] = {}
    for module in set(sources) - packages:
        if module.startswith("frozen_fast."):
            names.setdefault(module.rpartition(".")[2], []).append(module)
    twice = {name: modules for name, modules in names.items() if len(modules) > 1}
    assert not twice, twice


def test_the_kernels_folder_is_no_package() -> None:
    """A top-level package named kernels would shadow the one on PyPI, and transformers' imports with it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "frozen_kernels" / "__init__.py").is_file()


def test_every_module_has_a_docstring() -> None:
    silent = []
    for module, source in project_sources().items():
        text = ast.get_docstring(ast.parse(source))
        if not text or text.startswith("TODO"):
            silent.append(module)
    assert not silent, f"without a docstring: {silent}"


def test_optional_libraries_are_imported_inside_their_own_module_only() -> None:
    """Importing the library must not need a decoder, DeepSpeed, xformers or wandb."""
    optional = {"nvidia", "decord", "torchcodec", "xformers", "deepspeed", "wandb"}
    at_the_top = []
    for module, source in project_sources().items():
        for node in ast.parse(source).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            hits = optional & {name.split(".")[0] for name in names}
            own = any(hit in module.rsplit(".", 1)[-1] or hit == "nvidia" and "dali" in module for hit in hits)
            if hits and not own:
                at_the_top.append(f"{module} imports {sorted(hits)}")
    assert not at_the_top, at_the_top
