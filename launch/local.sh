#!/usr/bin/env bash
# Train on this machine: one process per GPU, or 2 processes on a CPU.
#
#   launch/local.sh [--processes N] [--max-restarts N] [--doctor] [--dry-run] CONFIG [key=value ...]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

processes='' max_restarts=3
options "processes max-restarts" "$@"
whole_number --max-restarts "$max_restarts"
if [[ -z $processes ]]; then
  processes=$(count_gpus)
  [[ $processes -gt 0 ]] || processes=2
fi
whole_number --processes "$processes" 1

share_cores "$processes"
launch "$python" -m swin_moe.launch.torchrun --standalone --nproc-per-node "$processes" \
  --max-restarts "$max_restarts" -m swin_moe "$action" "${rest[@]}"
