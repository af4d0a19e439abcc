#!/usr/bin/env bash
# A Slurm job that trains on its nodes and comes back by itself after a preemption or its time limit.
#SBATCH --job-name=frozen_fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
#
# usage: sbatch [--nodes N ...] launch/slurm.sh EXPERIMENT.yaml [key=value ...]
#        DRY_RUN=1 bash launch/slurm.sh EXPERIMENT.yaml     prints the commands, outside Slurm too
#
# Slurm sends TERM 180 s before the end (or when it preempts the job); it is passed on to train.py, which saves a
# checkpoint and leaves "stopped" in the run folder's status.json; the job is then put back into the queue under the
# same number and `--resume auto` continues from that checkpoint. A run that crashed or was killed (a lost node, no
# memory) goes back too, unless three starts in a row have saved no checkpoint (FROZEN_FAST_FUTILE_STARTS=3); one that
# failed with a mistake in config or data stays failed.
set -uo pipefail

# Slurm runs a copy of this file, so the checkout is where the job was submitted.
checkout="${FROZEN_FAST_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}"
[ $# -gt 0 ] || { echo "slurm.sh: experiment: got nothing; allowed: a file under configs/, then key=value" >&2; exit 2; }

nodes="${SLURM_JOB_NUM_NODES:-2}"
first_node="node0"
if command -v scontrol >/dev/null && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
fi
port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
gpus_per_node="${SLURM_GPUS_ON_NODE:-8}"
started="$(date +%s)"

step=(srun --kill-on-bad-exit=1 bash -c
    'NODES="$1" NODE_RANK="${SLURM_NODEID:-0}" RENDEZVOUS="$2" exec bash "$3/launch/multi_node.sh" --processes "$4" "${@:5}"'
    frozen_fast "$nodes" "$first_node:$port" "$checkout" "$((nodes * gpus_per_node))" "$@")

if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${step[@]}"
    echo
    NODES="$nodes" NODE_RANK=0 RENDEZVOUS="$first_node:$port" \
        bash "$checkout/launch/multi_node.sh" --dry-run --processes "$((nodes * gpus_per_node))" "$@"
    exit
fi

cd "$checkout" || exit 2
python="${FROZEN_FAST_PYTHON:-python3}"
[ -x "${FROZEN_FAST_VENV:-$checkout/.venv}/bin/python" ] && python="${FROZEN_FAST_VENV:-$checkout/.venv}/bin/python"
"${step[@]}" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child"; status=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done  # the trap interrupts the first wait

# torchrun turns every exit code of a rank into 1, so the run's own word counts: a status.json newer than this start.
state="$("$python" launch/run_state.py --since "$started" "$@")" || exit 2
if [ "$state" = stopped ]; then
    echo "slurm.sh: stopped after a checkpoint; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
if [ "$status" != 0 ] && "$python" launch/run_state.py --restart "$@"; then
    echo "slurm.sh: the run ended without finishing; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
