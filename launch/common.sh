# Shared by the launchers: sourced, not run. Finds the interpreter, tunes the memory allocator and
# reads the options.
# shellcheck shell=bash disable=SC2034 # what is set here is used by the launchers

# This shell is replaced by the program. Until then it answers signals as the program does.
stopped() {
  printf 'swin-moe: error: told to stop before anything was started\n' >&2
  exit "$1"
}
trap 'stopped 75' TERM USR1 HUP
trap 'stopped 130' INT

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# In an installed package, $root is lib/python3.x/site-packages/swin_moe of its environment.
environment=${root%/lib*/python3*/site-packages/swin_moe}
if [[ -n ${SWIN_MOE_PYTHON:-} ]]; then
  python=$SWIN_MOE_PYTHON # swin-moe launch runs under it
elif [[ -n ${PYTHON:-} ]]; then
  python=$PYTHON
elif [[ -x $root/.venv/bin/python ]]; then
  python=$root/.venv/bin/python
elif [[ -x $environment/bin/python ]]; then
  python=$environment/bin/python
else
  python=python3
fi

# On a CPU the first touch of fresh pages costs more than many ops: keep freed memory.
# tcmalloc or jemalloc where LD_PRELOAD brings them already, else glibc told to hold on to it.
if [[ ${LD_PRELOAD:-} != *malloc* ]]; then
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-16000000000}
  export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}
fi
# What torch's sockets have to say about a lost peer, our launcher and processes tell in a line.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# A clone need not be installed.
[[ ! -d $root/swin_moe ]] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

die() {
  printf '%s: error: %s\n' "${launcher:-$(basename -- "$0")}" "$1" >&2
  exit 2
}

# options "NAME ..." "$@": the options before CONFIG. --NAME VALUE sets $NAME (with _ for -), and
# these everywhere: --dry-run, --doctor, --help. CONFIG and what follows it go to $rest.
dry_run=0 action=train rest=()
options() {
  local known=" $1 " name
  shift
  while [[ $# -gt 0 ]]; do
    case $1 in
      --dry-run) dry_run=1; shift ;;
      --doctor) action=doctor; shift ;; # check the machines on the same road, instead of training
      -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
      -*)
        name=${1#--}
        [[ $known == *" $name "* ]] ||
          die "unknown option $1 before CONFIG (options of training come after it)"
        [[ $# -ge 2 ]] || die "$1 needs a value"
        printf -v "${name//-/_}" '%s' "$2"
        shift 2
        ;;
      *) break ;;
    esac
  done
  [[ $# -ge 1 ]] || die "no CONFIG given, such as fashion_mnist/swin_moe_micro"
  rest=("$@")
}

# whole_number --OPTION VALUE [LEAST]
whole_number() {
  [[ $2 =~ ^[0-9]{1,6}$ && $2 -ge ${3:-0} ]] ||
    die "$1 '$2': expected a whole number from ${3:-0} on"
}

# GPUs of this machine, as the driver counts them, and at most those of CUDA_VISIBLE_DEVICES.
count_gpus() {
  local gpus visible=() valid=0 entry
  command -v nvidia-smi >/dev/null || { echo 0; return; }
  gpus=$(timeout 60 nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
    for entry in "${visible[@]}"; do # CUDA stops at the first that is none
      [[ -n $entry && $entry != -1 && $entry != NoDevFiles ]] || break
      valid=$((valid + 1))
    done
    [[ $valid -ge $gpus ]] || gpus=$valid
  fi
  echo "$gpus"
}

# Cores for each of $1 processes of this machine, unless OMP_NUM_THREADS says how many.
share_cores() {
  local cores
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / $1 > 0 ? cores / $1 : 1))}
}

# read_hostfile FILE: its hosts go to $hosts and the sum of their slots to $slots. Names reach
# shells on the other side: nothing but a plain line passes.
hosts=() slots=0
read_hostfile() {
  local line number=0
  [[ -n $1 ]] || die "--hostfile FILE is missing; its lines read 'HOST slots=GPUS'"
  [[ -f $1 ]] || die "--hostfile $1: no such file"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
    [[ $line =~ ^([A-Za-z0-9][A-Za-z0-9._-]*)[[:space:]]+slots=([1-9][0-9]{0,3})[[:space:]]*$ ]] ||
      die "$1:$number: expected 'HOST slots=GPUS', got '$line'"
    [[ " ${hosts[*]} " != *" ${BASH_REMATCH[1]} "* ]] ||
      die "$1:$number: host ${BASH_REMATCH[1]} stands twice in this file"
    hosts+=("${BASH_REMATCH[1]}")
    slots=$((slots + BASH_REMATCH[2]))
  done <"$1"
  [[ ${#hosts[@]} -gt 0 ]] || die "$1: no line 'HOST slots=GPUS' in this file"
}

# reach HOST ...: all of them let us in over ssh without a password, or an error names the others.
reach() {
  [[ $dry_run == 0 ]] || return 0
  local host index tries=() lost=()
  for host in "$@"; do
    timeout 20 ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" true </dev/null &>/dev/null &
    tries+=($!)
  done
  for index in "${!tries[@]}"; do
    wait "${tries[index]}" || lost+=("${@:index+1:1}")
  done
  [[ ${#lost[@]} == 0 ]] ||
    die "no ssh without a password to ${lost[*]} ('ssh -o BatchMode=yes ${lost[0]} true' says why)"
}

# split_master HOST[:PORT] DEFAULT_PORT: sets $master_host and $master_port.
split_master() {
  [[ $1 =~ ^([A-Za-z0-9][A-Za-z0-9._-]*)(:([0-9]{1,5}))?$ ]] ||
    die "--master '$1': expected HOST or HOST:PORT of the first node"
  master_host=${BASH_REMATCH[1]} master_port=${BASH_REMATCH[3]:-$2}
  [[ $master_port -le 65535 && $master_port -gt 0 ]] ||
    die "--master '$1': a port is from 1 to 65535"
}

# Replace this shell by the command, or print it, quoted, when --dry-run was given.
launch() {
  if [[ $dry_run == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
    exit 0
  fi
  exec "$@"
}
