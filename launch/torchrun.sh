#!/usr/bin/env bash
# Train on several nodes: run the same command on each of them, in any order, within --timeout.
#
#   launch/torchrun.sh --nodes N --master HOST[:PORT] [--processes GPUS] [--max-restarts N]
#                      [--timeout SECONDS] [--doctor] [--dry-run] CONFIG [key=value ...]
#
# HOST is one of the nodes, by a name that all of them resolve; its launcher must not end before the
# others. With --nodes MIN:MAX training begins with MIN nodes, takes in others up to MAX when they
# come, and goes on without those that are lost.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

nodes='' master='' processes='' max_restarts=3 timeout=300
options "nodes master processes max-restarts timeout" "$@"
if [[ ! $nodes =~ ^([1-9][0-9]{0,5})(:([1-9][0-9]{0,5}))?$ ]] ||
  [[ -n ${BASH_REMATCH[3]} && ${BASH_REMATCH[3]} -lt ${BASH_REMATCH[1]} ]]; then
  die "--nodes '$nodes': expected the number of nodes, or MIN:MAX"
fi
split_master "$master" 29500
whole_number --max-restarts "$max_restarts"
whole_number --timeout "$timeout" 1
if [[ -z $processes ]]; then
  processes=$(count_gpus)
  [[ $processes -gt 0 || $dry_run == 1 ]] ||
    die "no GPU found on this machine: give --processes N to train on its CPU"
  [[ $processes -gt 0 ]] || processes=gpu # on a machine with GPUs, torchrun counts them
fi
if [[ $processes != gpu ]]; then
  whole_number --processes "$processes" 1
  share_cores "$processes"
fi
launch "$python" -m swin_moe.launch.torchrun --nnodes "$nodes" --nproc-per-node "$processes" \
  --rdzv-backend c10d --rdzv-endpoint "$master_host:$master_port" \
  --rdzv-conf "join_timeout=$timeout" --max-restarts "$max_restarts" \
  -m swin_moe "$action" "${rest[@]}"
