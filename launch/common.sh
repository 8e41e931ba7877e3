# Sourced by the launchers. Finds the interpreter, tunes the memory allocator and reads the options.
# shellcheck shell=bash disable=SC2034 # the launchers use the variables

# The program replaces this shell. Until then, the shell answers signals as the program does.
stopped() {
  printf 'swin-moe: error: stopped by a signal before anything was started\n' >&2
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

# On a CPU the first touch of new pages costs more than many ops: let glibc keep freed memory, unless
# LD_PRELOAD brings tcmalloc or jemalloc.
if [[ ${LD_PRELOAD:-} != *malloc* ]]; then
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-16000000000}
  export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}
fi
# On a GPU, segments that grow leave fewer fragments. The user's settings win, under either name.
if [[ -z ${PYTORCH_CUDA_ALLOC_CONF+set} ]]; then
  export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi
# The launcher and the processes report a lost peer in one line; torch's sockets need not.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# A clone need not be installed.
[[ ! -d $root/swin_moe ]] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

die() {
  printf '%s: error: %s\n' "${launcher:-$(basename -- "$0")}" "$1" >&2
  exit 2
}

# options "NAME ..." "$@": reads the options before CONFIG. --NAME VALUE sets $NAME (with _ for -).
# Every launcher has --dry-run, --doctor and --help. CONFIG and the words after it go to $rest.
dry_run=0 action=train rest=()
options() {
  local known=" $1 " name
  shift
  while [[ $# -gt 0 ]]; do
    case $1 in
      --dry-run) dry_run=1; shift ;;
      --doctor) action=doctor; shift ;; # check the machines instead of training
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

# whole_number --OPTION VALUE [LEAST]: dies unless VALUE is a whole number from LEAST (0) on.
whole_number() {
  [[ $2 =~ ^[0-9]{1,6}$ && $2 -ge ${3:-0} ]] ||
    die "$1 '$2': expected a whole number from ${3:-0} on"
}

# count_gpus: prints the number of this machine's GPUs, at most those of CUDA_VISIBLE_DEVICES.
count_gpus() {
  local gpus visible=() valid=0 entry
  command -v nvidia-smi >/dev/null || { echo 0; return; }
  gpus=$(timeout 60 nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
    for entry in "${visible[@]}"; do # CUDA stops at the first invalid entry
      [[ -n $entry && $entry != -1 && $entry != NoDevFiles ]] || break
      valid=$((valid + 1))
    done
    [[ $valid -ge $gpus ]] || gpus=$valid
  fi
  echo "$gpus"
}

# share_cores N: sets OMP_NUM_THREADS, if unset, to the cores of each of N processes.
share_cores() {
  local cores
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / $1 > 0 ? cores / $1 : 1))}
}

# read_hostfile FILE: its hosts go to $hosts and the sum of their slots to $slots. Host names reach
# remote shells, so only plain ones pass.
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
      die "$1:$number: host ${BASH_REMATCH[1]} is listed twice"
    hosts+=("${BASH_REMATCH[1]}")
    slots=$((slots + BASH_REMATCH[2]))
  done <"$1"
  [[ ${#hosts[@]} -gt 0 ]] || die "$1: no line 'HOST slots=GPUS' in this file"
}

# reach HOST ...: dies with the hosts that ssh cannot enter without a password.
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

# launch COMMAND ...: replaces this shell by the command, or prints it, quoted, with --dry-run.
launch() {
  if [[ $dry_run == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
    exit 0
  fi
  exec "$@"
}
