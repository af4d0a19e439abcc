#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most nine minutes: tests, attention, model step, throughput and a
# training run. Results go to the folder that is named, otherwise to $OUT or runs/gpu_bench (docs/performance.md).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/launch/gpu_bench.py" "$@"
