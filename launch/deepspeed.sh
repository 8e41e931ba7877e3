#!/usr/bin/env bash
# Train through DeepSpeed's launcher, over ssh, on the hosts of a hostfile ("HOST slots=GPUS").
#
#   launch/deepspeed.sh --hostfile FILE [--master HOST] [--dry-run] CONFIG [key=value ...]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

hostfile='' master=''
dry_run=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --hostfile | --master)
      [[ $# -ge 2 ]] || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) die "unknown option $1 before CONFIG (options of training come after it)" ;;
    *) break ;;
  esac
done
[[ $# -ge 1 ]] || die "no CONFIG given"
[[ -n $hostfile ]] || die "--hostfile FILE is missing; its lines read 'HOST slots=GPUS'"
[[ -f $hostfile ]] || die "--hostfile $hostfile: no such file"
number=0
while IFS= read -r line || [[ -n $line ]]; do
  number=$((number + 1))
  # Host names reach a shell on the other side: nothing but a plain line passes.
  [[ $line =~ ^[[:space:]]*(#.*)?$ || $line =~ ^[A-Za-z0-9._-]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$ ]] ||
    die "$hostfile:$number: expected 'HOST slots=GPUS', got '$line'"
done <"$hostfile"
for argument in "$@"; do
  # DeepSpeed hands them to the remote shells unquoted.
  [[ $argument =~ ^[][A-Za-z0-9._/=,:@%+-]+$ ]] ||
    die "argument '$argument' would meet a shell on the other hosts: put it into the config file"
done
[[ -z $master || $master =~ ^[A-Za-z0-9._-]+$ ]] || die "--master '$master': expected a host name"

launch "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" \
  ${master:+--master_addr "$master"} --module --no_local_rank swin_moe train "$@"
