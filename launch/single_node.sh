#!/usr/bin/env bash
# Trains on all GPUs of this machine (or on its CPU where there is none), resuming what was stopped.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    echo "usage: launch/single_node.sh [--dry-run] [--accelerate FILE] [--processes N] [--restarts N]"
    echo "       EXPERIMENT.yaml [key=value ...]"
    echo "--restarts: start a run that crashed or was killed again, at most N times (default 0)"
    echo "example: launch/single_node.sh --accelerate configs/accelerate/gpu_8.yaml configs/pretrain/webvid_1_4_8.yaml"
}

read_launch_arguments "$@"
gpus="$(count_gpus)"
if [ -z "$accelerate_config" ]; then
    case "$gpus" in
        0) accelerate_config="$root/configs/accelerate/cpu.yaml" ;;
        1) accelerate_config="$root/configs/accelerate/gpu_1.yaml" ;;
        *) accelerate_config="$root/configs/accelerate/gpu_8.yaml" processes="${processes:-$gpus}" ;;
    esac
fi
launch_training --config_file "$accelerate_config" ${processes:+--num_processes "$processes"}
