"""The built site: it has every public name in its reference, complete example files, and no broken link."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support.doc_commands import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with --strict: a link or an anchor that does not resolve fails."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def public_names() -> Iterator[str]:
    """Every name in an __all__ of the two packages, with its module."""
    for top in (ROOT / "frozen_fast", ROOT / "kernels" / "frozen_kernels"):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    names = ast.literal_eval(node.value)
                    yield from (f"{module}.{name}" for name in names if not name.startswith("__"))


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split(" ")[0] for line in inventory.splitlines()}
    names = list(public_names())
    assert len(names) > 100
    with_module = {name: {name, f"{name}.{name.rsplit('.', 1)[1]}"} for name in names}  # a module of the same name
    assert [name for name, accepted in with_module.items() if not accepted & documented] == []


class PageText(HTMLParser):
    """The text of a page, without its markup."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_pages_of_extension_points_show_the_whole_example_files(site: Path) -> None:
    pages = sorted((ROOT / "docs" / "extend").glob("*.md"))
    assert pages
    for page in pages:
        html = (site / "extend" / page.stem / "index.html").read_text(encoding="utf-8")
        text = "".join(PageText(html).text.split())
        (name,) = {word for word in page.read_text(encoding="utf-8").split('"') if word.startswith("examples/")}
        source = "".join((ROOT / name).read_text(encoding="utf-8").split())
        assert source in text, f"{page.name} does not show {name}"


def test_the_pictures_of_the_pages_are_part_of_the_site(site: Path) -> None:
    for picture in (ROOT / "docs" / "images").glob("*.svg"):
        assert (site / "images" / picture.name).is_file()
