# Shared by the launchers; sourced, not run. Splits the arguments and runs (or, in a dry run, prints) one command.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${FROZEN_FAST_PYTHON:-python3}"
[ -x "${FROZEN_FAST_VENV:-$root/.venv}/bin/python" ] && python="${FROZEN_FAST_VENV:-$root/.venv}/bin/python"

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# Reads the options every launcher has. Sets: dry_run, accelerate_config, processes, restarts, train_arguments.
read_launch_arguments() {
    dry_run=0 accelerate_config="" processes="" restarts=0 train_arguments=()
    while [ $# -gt 0 ]; do
        case "$1" in
            --dry-run) dry_run=1 ;;
            --accelerate) accelerate_config="${2:?--accelerate needs a file}"; shift ;;
            --restarts) restarts="${2:?--restarts needs a number}"; shift ;;
            --processes) processes="${2:?--processes needs a number}"; shift ;;
            -h | --help) usage; exit 0 ;;
            --) shift; train_arguments+=("$@"); break ;;
            -*) fail "got the option $1; allowed: --dry-run, --accelerate FILE, --processes N, --restarts N, then the experiment" ;;
            *) train_arguments+=("$@"); break ;;
        esac
        shift
    done
    [ ${#train_arguments[@]} -gt 0 ] || fail "experiment: got nothing; allowed: a file under configs/, then key=value"
    [ -f "${train_arguments[0]}" ] || fail "experiment: got ${train_arguments[0]}; allowed: a file that exists"
    if [ -n "$accelerate_config" ] && [ ! -f "$accelerate_config" ]; then
        fail "--accelerate: got $accelerate_config; allowed: a file that exists (configs/accelerate/)"
    fi
    case "$restarts" in *[!0-9]* | "") fail "--restarts: got $restarts; allowed: a whole number" ;; esac
    if [ -n "$processes" ]; then
        case "$processes" in *[!0-9]* | 0) fail "--processes: got $processes; allowed: a positive whole number" ;; esac
    fi
}

count_gpus() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -c '^[0-9]' || true # without a driver it fails
    else
        echo 0
    fi
}

# Runs Accelerate with the given options (--config_file FILE first) in front of train.py; the run continues from its newest checkpoint.
# Accelerate's launchers turn every exit code of train.py but 0 into 1, so the run's own word gives the code: 2 for a
# mistake, 75 for a run that was stopped after a checkpoint.
launch_training() {
    local experiment="${train_arguments[0]}" overrides=("${train_arguments[@]:1}") launch_file="$2"
    local command=("$python" -m accelerate.commands.launch "$@" --quiet "$root/train.py" --config "$experiment" --resume auto
        "${overrides[@]}")
    "$python" "$root/train.py" --config "$experiment" --print-config "${overrides[@]}" >/dev/null || exit
    if [ "$dry_run" = 1 ]; then
        printf '%q ' "${command[@]}"
        echo
        return 0
    fi
    if [ "${FROZEN_FAST_DOCTOR:-1}" != 0 ]; then # what will fail is told before anything heavy starts
        "$python" -c 'import sys; sys.path[:0] = sys.argv[1:3]; from frozen_fast.cli.main import main
sys.exit(main(["doctor", *sys.argv[3:]]))' "$root" "$root/kernels" --quiet --config "$experiment" --accelerate "$launch_file" \
            ${processes:+--processes "$processes"} "${overrides[@]}" >&2 || exit
    fi
    local attempt status
    for ((attempt = 0; ; attempt++)); do
        run_once "${command[@]}" && status=0 || status=$?
        # A mistake (2), a stop (75) and an interrupt (130) are not repaired by a restart.
        case "$status" in 0 | 2 | 75 | 130 | 143) exit "$status" ;; esac
        [ "$attempt" -lt "$restarts" ] || exit "$status"
        "$python" "$root/launch/run_state.py" --restart "$experiment" "${overrides[@]}" >&2 || exit "$status"
    done
}

# Runs one launch of the experiment in train_arguments; returns the run's own exit code.
run_once() {
    local experiment="${train_arguments[0]}" overrides=("${train_arguments[@]:1}") command=("$@")
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
    trap - TERM INT
    [ "$status" = 0 ] && return 0 # a launcher that was told to stop never ends with 0
    own="$("$python" "$root/launch/run_state.py" --since "$started" --exit-code "$experiment" "${overrides[@]}")"
    [ "$own" = unknown ] || status="$own"
    # torchrun prints tracebacks of its own below the error of several processes: show the error again.
    if [ "$status" = 2 ] && [ "${processes:-$(sed -n 's/^num_processes: *//p' "$launch_file")}" != 1 ]; then
        "$python" "$root/launch/run_state.py" --since "$started" --message "$experiment" "${overrides[@]}" >&2
    fi
    return "$status"
}
