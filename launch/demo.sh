#!/usr/bin/env bash
# The demo: installs, renders moving shapes, trains 1 => 4 => 8 frames on them, evaluates, and says where the report is.
# What is there is reused: the environment, the clips, a finished run (shown again), an unfinished one (continued).
set -euo pipefail

usage() {
    echo "usage: bash launch/demo.sh [--fresh] [key=value ...]"
    echo "  --fresh     delete the present run and train again"
    echo "  key=value   changes to configs/demo.yaml, such as seed=1 run_folder=runs/demo_seed1"
}

fresh=0
overrides=()
for argument in "$@"; do
    case "$argument" in
        --fresh) fresh=1 ;;
        -h | --help) usage; exit 0 ;;
        *=*) overrides+=("$argument") ;;
        *) echo "demo.sh: got $argument; allowed: --fresh, --help, key=value" >&2; exit 2 ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
bin="${FROZEN_FAST_VENV:-.venv}/bin"
export HF_HUB_OFFLINE=1 # the text tower comes with a package: nothing is asked of a hub

"$bin/python" launch/render_demo.py --folder data/demo

experiment=(configs/demo.yaml "${overrides[@]}")
if [ "$fresh" = 1 ]; then
    "$bin/python" launch/demo_result.py --remove "${experiment[@]}"
fi
state="$("$bin/python" launch/run_state.py "${experiment[@]}")"
if [ "$state" = "done" ]; then
    echo "demo: this run is finished already; --fresh trains it again"
else
    bash launch/single_node.sh --accelerate configs/accelerate/cpu.yaml "${experiment[@]}"
fi
"$bin/python" launch/demo_result.py "${experiment[@]}"
