#!/usr/bin/env bash
# Train through Open MPI on the hosts of a hostfile ("HOST slots=GPUS"): a process per slot.
#
#   launch/mpi.sh --hostfile FILE [--master HOST[:PORT]] [--doctor] [--dry-run]
#                 CONFIG [key=value ...]
#
# Needs mpirun and this folder at the same path on all hosts, and ssh without a password to them.
# Set mpirun's own options by its environment, such as OMPI_MCA_btl_tcp_if_include=eth0.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

hostfile='' master=''
options "hostfile master" "$@"
read_hostfile "$hostfile"
split_master "${master:-${hosts[0]}}" 29500
[[ $dry_run == 1 ]] || command -v mpirun >/dev/null || die "mpirun is missing (apt install openmpi-bin)"

others=()
for host in "${hosts[@]}"; do
  [[ $host == localhost || $host == "$(hostname)" ]] || others+=("$host")
done
[[ ${#others[@]} == 0 ]] || reach "${others[@]}"
[[ ${#others[@]} != 0 || -n $master ]] || master_host=127.0.0.1 # closed to other machines

export MASTER_ADDR=$master_host MASTER_PORT=$master_port OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exports=()
for name in MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTHONPATH \
  MALLOC_MMAP_MAX_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_ CUDA_VISIBLE_DEVICES \
  PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF; do
  [[ -z ${!name+set} ]] || exports+=(-x "$name")
done
# mpirun gives rank 0 a terminal even if mpirun's own output is a file.
[[ -t 1 ]] || exports+=(-x TERM=dumb)
# Without -q, mpirun adds a page to the error of a process.
launch mpirun -q --hostfile "$hostfile" -n "$slots" --bind-to none "${exports[@]}" \
  "$python" -m swin_moe "$action" "${rest[@]}"
