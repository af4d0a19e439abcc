#!/usr/bin/env bash
# Lint, types, the site and the whole test suite, on a fresh machine without a GPU. --newest, as the first argument, takes the
# versions of constraints-newest.txt. The other arguments go to pytest.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --newest ]; then
    shift
    bash launch/install.sh --newest
    bin="${FROZEN_FAST_VENV:-.venv-newest}/bin"
else
    bash launch/install.sh
    bin="${FROZEN_FAST_VENV:-.venv}/bin"
fi

workers="${TEST_WORKERS:-$(env -u OMP_NUM_THREADS nproc)}"  # nproc would take that variable for the number of cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # tests run side by side: one thread each
status=0
echo "== ruff"
"$bin/python" -m ruff check . || status=1
"$bin/python" -m ruff format --check --quiet . || { echo "format: run ruff format"; status=1; }
echo "== mypy"
"$bin/python" -m mypy || status=1
echo "== docs"
NO_MKDOCS_2_WARNING=1 "$bin/python" -m mkdocs build --strict --quiet --site-dir "$(mktemp -d)" || status=1
echo "== pytest"
"$bin/python" -m pytest -n "$((workers < 4 ? workers : 4))" --dist worksteal --durations 10 "$@" || status=1
exit "$status"
