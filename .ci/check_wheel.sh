#!/usr/bin/env bash
# Builds the wheel from setup.py and uses it outside the checkout: both packages, the console script, the data files.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(cd "${FROZEN_FAST_VENV:-.venv}" && pwd)/bin/python"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# A clean copy of what git knows, so that no build folder of the checkout gets into the wheel.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | xargs -0 -I{} sh -c '[ -e "$1" ] && cp --parents "$1" "$2"' _ {} "$work/source"
"$python" -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir "$work" "$work/source" 2>"$work/log" \
    || { cat "$work/log" >&2; exit 1; }
"$python" -m zipfile -e "$work"/frozen_fast-*.whl "$work/installed"

cd "$work"
PYTHONPATH="$work/installed" "$python" -I - "$work/installed" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])
from importlib.metadata import distribution
from pathlib import Path

import frozen_fast
import frozen_kernels

installed = Path(sys.argv[1])
for module in (frozen_fast, frozen_kernels):
    assert Path(module.__file__).is_relative_to(installed), f"{module.__name__} came from {module.__file__}"
assert not (installed / "kernels").exists(), "a top-level package named kernels would shadow another one"
assert (installed / "frozen_fast" / "profiling" / "paper_table4.yaml").is_file(), "the paper's table is missing"
assert (installed / "frozen_kernels" / "cpu_c" / "attention_time.c").is_file(), "the C kernels' sources are missing"
frozen_fast.DualEncoder
(script,) = distribution("frozen_fast").entry_points.select(group="console_scripts")
assert script.name == "frozen-fast" and callable(script.load())
print("wheel: frozen_fast and frozen_kernels work outside the checkout")
PYTHON
