#!/usr/bin/env bash
# Trains on several machines: the same command on each, joined by torchrun's rendezvous through Accelerate.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
usage: NODES=2 NODE_RANK=0 RENDEZVOUS=HOST:PORT [RENDEZVOUS_ID=NAME] \
       launch/multi_node.sh [--dry-run] [--accelerate FILE] [--processes N] [--restarts N] \\
       EXPERIMENT.yaml [key=value ...]
NODES: number of machines. NODE_RANK: this machine's number, from 0. RENDEZVOUS: address of machine 0 and a free port
on it. --processes: processes of all machines together (default: NODES times the GPUs of this one).
--restarts: start all processes again after one was lost, at most N times (default 0).
example, on each of two machines: NODES=2 NODE_RANK=$N RENDEZVOUS=node0:29500 launch/multi_node.sh \
       configs/pretrain/webvid_1_4_8.yaml
TEXT
}

read_launch_arguments "$@"
nodes="${NODES:-}" node_rank="${NODE_RANK:-}" rendezvous="${RENDEZVOUS:-}"
[ -n "$nodes" ] || fail "NODES: got nothing; allowed: the number of machines"
[ -n "$node_rank" ] || fail "NODE_RANK: got nothing; allowed: 0 to NODES-1"
[ -n "$rendezvous" ] || fail "RENDEZVOUS: got nothing; allowed: HOST:PORT of machine 0"
case "$nodes$node_rank" in *[!0-9]*) fail "NODES, NODE_RANK: got $nodes, $node_rank; allowed: whole numbers" ;; esac
[ "$node_rank" -lt "$nodes" ] || fail "NODE_RANK: got $node_rank; allowed: 0 to $((nodes - 1))"
case "$rendezvous" in *:*) ;; *) fail "RENDEZVOUS: got $rendezvous; allowed: HOST:PORT" ;; esac
if [ -z "$processes" ]; then
    gpus="$(count_gpus)"
    [ "$gpus" -gt 0 ] || fail "--processes: got nothing, and this machine has no GPU to count; allowed: a number"
    processes=$((nodes * gpus))
fi
[ $((processes % nodes)) -eq 0 ] || fail "--processes: got $processes; allowed: multiples of NODES=$nodes"
elastic=""
[ "$restarts" = 0 ] || elastic="$restarts"
restarts=0 # all machines restart together, which torch's launcher arranges
launch_training --config_file "${accelerate_config:-$root/configs/accelerate/gpu_8.yaml}" \
    --num_machines "$nodes" --machine_rank "$node_rank" --num_processes "$processes" \
    --main_process_ip "${rendezvous%:*}" --main_process_port "${rendezvous##*:}" \
    --rdzv_backend c10d ${elastic:+--max_restarts "$elastic"}
