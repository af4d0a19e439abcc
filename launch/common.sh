# Shared by the launchers; sourced, not run. Splits the arguments and runs (or, in a dry run, prints) one command.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${FROZEN_FAST_PYTHON:-python3}"
[ -x "${FROZEN_FAST_VENV:-$root/.venv}/bin/python" ] && python="${FROZEN_FAST_VENV:-$root/.venv}/bin/python"

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# Reads the options every launcher has. Sets: dry_run, accelerate_config, processes, train_arguments.
read_launch_arguments() {
    dry_run=0 accelerate_config="" processes="" train_arguments=()
    while [ $# -gt 0 ]; do
        case "$1" in
            --dry-run) dry_run=1 ;;
            --accelerate) accelerate_config="${2:?--accelerate needs a file}"; shift ;;
            --processes) processes="${2:?--processes needs a number}"; shift ;;
            -h | --help) usage; exit 0 ;;
            --) shift; train_arguments+=("$@"); break ;;
            -*) fail "got the option $1; allowed: --dry-run, --accelerate FILE, --processes N, then the experiment" ;;
            *) train_arguments+=("$@"); break ;;
        esac
        shift
    done
    [ ${#train_arguments[@]} -gt 0 ] || fail "experiment: got nothing; allowed: a file under configs/, then key=value"
    [ -f "${train_arguments[0]}" ] || fail "experiment: got ${train_arguments[0]}; allowed: a file that exists"
    if [ -n "$accelerate_config" ] && [ ! -f "$accelerate_config" ]; then
        fail "--accelerate: got $accelerate_config; allowed: a file that exists (configs/accelerate/)"
    fi
    if [ -n "$processes" ]; then
        case "$processes" in *[!0-9]* | 0) fail "--processes: got $processes; allowed: a positive whole number" ;; esac
    fi
}

count_gpus() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | wc -l
    else
        echo 0
    fi
}

# Runs Accelerate with the given options in front of train.py; the experiment goes on where it was stopped.
# Accelerate's launchers turn every exit code of train.py but 0 into 1, so the run's own word gives the code: 2 for a
# mistake, 75 for a run that was stopped after a checkpoint.
launch_training() {
    local experiment="${train_arguments[0]}" overrides=("${train_arguments[@]:1}")
    local command=("$python" -m accelerate.commands.launch "$@" "$root/train.py" --config "$experiment" --resume auto
        "${overrides[@]}")
    if [ "$dry_run" = 1 ]; then
        printf '%q ' "${command[@]}"
        echo
        return 0
    fi
    "$python" "$root/train.py" --config "$experiment" --print-config "${overrides[@]}" >/dev/null || exit
    local started status child own
    started="$(date +%s)"
    # A process group of its own: Accelerate's launcher for one process does not pass TERM on to train.py.
    set -m
    "${command[@]}" &
    child=$!
    set +m
    trap 'kill -TERM -- "-$child" 2>/dev/null' TERM INT
    wait "$child" && status=0 || status=$?
    while kill -0 -- "-$child" 2>/dev/null; do sleep 0.2; done # train.py may still be saving its checkpoint
    [ "$status" = 0 ] && exit 0 # a launcher that was told to stop never ends with 0
    own="$("$python" "$root/launch/run_state.py" --since "$started" --exit-code "$experiment" "${overrides[@]}")"
    [ "$own" = unknown ] || status="$own"
    exit "$status"
}
