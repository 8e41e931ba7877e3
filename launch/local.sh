#!/usr/bin/env bash
# Train on this machine: one process per GPU, or 2 processes on a CPU.
#
#   launch/local.sh [--processes N] [--max-restarts N] [--dry-run] CONFIG [--fresh] [key=value ...]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

processes=auto max_restarts=3
dry_run=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes) [[ $# -ge 2 ]] || die "--processes needs a number"; processes=$2; shift 2 ;;
    --max-restarts) [[ $# -ge 2 ]] || die "--max-restarts needs a number"; max_restarts=$2; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) die "unknown option $1 before CONFIG (options of training come after it)" ;;
    *) break ;;
  esac
done
[[ $# -ge 1 ]] || die "no CONFIG given; e.g. configs/fashion_mnist/swin_moe_micro.yaml"

if [[ $processes == auto ]]; then
  processes=2
  if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    [[ $gpus -gt 0 ]] && processes=$gpus
  fi
fi
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes $processes: expected a whole number above 0"

[[ $max_restarts =~ ^[0-9]+$ ]] || die "--max-restarts '$max_restarts': expected a whole number"

cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}
launch "$python" -m swin_moe.torchrun --standalone --nproc-per-node "$processes" \
  --max-restarts "$max_restarts" \
  -m swin_moe train "$@"
