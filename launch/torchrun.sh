#!/usr/bin/env bash
# Train on several nodes: run the same command on each of them.
#
#   launch/torchrun.sh --nodes N --node-rank R --master HOST[:PORT] [--processes GPUS]
#                      [--max-restarts N] [--dry-run] CONFIG [key=value ...]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

nodes='' node_rank='' master='' processes=gpu max_restarts=3
dry_run=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --nodes | --node-rank | --master | --processes | --max-restarts)
      [[ $# -ge 2 ]] || die "$1 needs a value"
      name=${1#--}
      printf -v "${name//-/_}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) die "unknown option $1 before CONFIG (options of training come after it)" ;;
    *) break ;;
  esac
done
[[ $# -ge 1 ]] || die "no CONFIG given"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes '$nodes': expected the number of nodes"
[[ $node_rank =~ ^[0-9]+$ && $node_rank -lt $nodes ]] ||
  die "--node-rank '$node_rank': expected 0 to $((nodes - 1)), another on each node"
[[ $processes =~ ^([1-9][0-9]*|gpu|cpu|auto)$ ]] ||
  die "--processes '$processes': expected a number, or gpu for one per GPU"
[[ $max_restarts =~ ^[0-9]+$ ]] || die "--max-restarts '$max_restarts': expected a whole number"
[[ $master =~ ^[A-Za-z0-9._-]+(:[0-9]+)?$ ]] ||
  die "--master '$master': expected HOST or HOST:PORT of node 0"
[[ $master == *:* ]] || master+=:29500

launch "$python" -m swin_moe.torchrun \
  --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$processes" \
  --master-addr "${master%:*}" --master-port "${master##*:}" --max-restarts "$max_restarts" \
  -m swin_moe train "$@"
