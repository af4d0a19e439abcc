#!/usr/bin/env bash
# Makes .venv with the versions of constraints.txt, or reuses it when nothing it was made from has changed.
# --newest makes .venv-newest with the versions of constraints-newest.txt instead.
# Both commands of the README start here. Settings: PYTHON (interpreter, default python3), FROZEN_FAST_VENV
# (where the environment goes, default .venv or .venv-newest beside this project's setup.py).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "$*" in
    "") constraints=constraints.txt extras=all,test venv="${FROZEN_FAST_VENV:-$root/.venv}" ;;
    --newest) constraints=constraints-newest.txt extras=all-cuda13,test venv="${FROZEN_FAST_VENV:-$root/.venv-newest}" ;;
    *) echo "install: got $*; allowed: --newest, or nothing" >&2; exit 2 ;;
esac
python="${PYTHON:-python3}"

command -v "$python" >/dev/null || { echo "install: $python was not found; Python 3.10 or newer is needed" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || { echo "install: got $("$python" --version); allowed: Python 3.10 or newer (set PYTHON)" >&2; exit 2; }

# The environment holds absolute paths (this folder, the interpreter), so they are part of the stamp.
stamp="$({ echo "$root"; "$python" -c 'import sys; print(sys.version, sys.base_prefix)'
    cat "$root/$constraints" "$root/setup.py"; } | sha256sum | cut -d' ' -f1)"

mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then  # two commands started at once share one installation
    exec 9>"$venv.lock"
    flock 9
fi
if [ "$(cat "$venv/installed" 2>/dev/null || true)" = "$stamp" ]; then
    echo "install: reusing $venv"
    exit 0
fi

echo "install: making $venv (some 9 GB; about 2 minutes on a fast connection)"
"$python" -m venv --clear "$venv" \
    || { echo "install: $python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
log="$venv/install.log"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        --constraint "$root/$constraints" --editable "$root[$extras]" >"$log" 2>&1; then
    grep -v '^WARNING: Location' "$log" | tail -n 20 >&2
    echo "install: pip failed; the whole log is in $log" >&2
    exit 1
fi
"$venv/bin/python" -m pip check --disable-pip-version-check
echo "$stamp" >"$venv/installed"
echo "install: done"
