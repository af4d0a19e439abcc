"""Numbers that a page of the documentation states, computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_worked_example_of_the_evaluation_page() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    checked = 0
    scope: dict[str, object] = {}
    for line in block.splitlines():
        code, _, told = line.partition("  # ")
        if told:
            assert eval(code, scope) == pytest.approx(float(told.split(":")[0]), abs=0.05), line
            checked += 1
        else:
            exec(code, scope)
    assert checked == 3
