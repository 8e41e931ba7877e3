#!/usr/bin/env bash
# Train through DeepSpeed's launcher (pdsh over ssh) on the hosts of a hostfile ("HOST slots=GPUS").
#
#   launch/deepspeed.sh --hostfile FILE [--master HOST[:PORT]] [--doctor] [--dry-run]
#                       CONFIG [key=value ...]
#
# Needs pdsh here, ssh without a password to every host, and this folder at the same path on all.
# launch/deepspeed.env has the environment of the remote processes.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

hostfile='' master=''
options "hostfile master" "$@"
read_hostfile "$hostfile"
split_master "${master:-${hosts[0]}}" 29500
for argument in "${rest[@]}"; do
  # DeepSpeed hands the arguments to the remote shells unquoted.
  [[ $argument =~ ^[][A-Za-z0-9._/=,:@%+-]+$ ]] ||
    die "argument '$argument' would meet a shell on the other hosts: put it into the config file"
done
[[ $dry_run == 1 ]] || command -v pdsh >/dev/null || die "pdsh is missing (apt install pdsh), or use launch/mpi.sh"

reach "${hosts[@]}"

# The environment of the processes, unless the user has a .deepspeed_env.
[[ -e .deepspeed_env || -e ~/.deepspeed_env ]] ||
  export DS_ENV_FILE=${DS_ENV_FILE:-$root/launch/deepspeed.env}
launch "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" \
  --master_addr "$master_host" --master_port "$master_port" \
  --module --no_local_rank swin_moe "$action" "${rest[@]}"
