"""The notebook of examples/ runs from top to bottom, and shows frames of the clips that it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.runs import REPOSITORY, environment
from support.search_runs import colour_run

pytestmark = pytest.mark.integration

NOTEBOOK = REPOSITORY / "examples" / "search_own_clips.ipynb"


@pytest.mark.slow
def test_the_search_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs the extra test")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra test")
    pytest.importorskip("ipykernel", reason="needs the extra test")
    run = colour_run(tmp_path)
    settings = {"CHECKPOINT": str(run.checkpoint), "SOURCE": str(run.videos), "QUERY": "a blue ball moves right"}
    for name, value in environment(**settings, INDEX=str(tmp_path / "index"), MPLBACKEND="").items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "4 clips (4 embedded, 0 kept, 0 removed, 0 bad)" in said
    first = next(line for line in said.splitlines() if line.startswith("1  "))
    assert first.split()[2] == "blue" and first.endswith("a blue ball moves right")
    assert "blue: a blue ball moves right" in said
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2 and all(len(picture) > 2_000 for picture in pictures)


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
