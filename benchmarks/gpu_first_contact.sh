#!/usr/bin/env bash
# First contact with a GPU: checks the CUDA kernels there, and times them.
#
# Runs each step in another process, because an illegal memory access breaks its process. A step
# that fails is recorded, and the next one runs. See docs/gpu.md.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
usage: benchmarks/gpu_first_contact.sh [options]
  --out DIR      where the JSON and the log go (default: $OUT, or build/gpu_first_contact)
  --minutes N    time for all steps (default 7); the steps that are left are named
  --wheels DIR   install these wheels for this run only, see gpu_wheels.sh
  --python FILE  the interpreter (default: .venv/bin/python, or python3)
  --only A,B     run these steps only, even if they passed before
  --list         print the steps and run none
  --rehearse     run every step on the CPU at toy sizes
A step that passed with the same card and library is not run again. Exit code 1: a step failed.
TEXT
}

wrong() { echo "error: $1 (see --help)" >&2; exit 2; }

out=${OUT:-build/gpu_first_contact} minutes=7 wheels='' python='' only='' list='' rehearse=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --out | --minutes | --wheels | --python | --only)
      [[ $# -ge 2 ]] || wrong "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --list | --rehearse) printf -v "${1#--}" yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "unknown option $1" ;;
  esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || wrong "--minutes $minutes is not a number"
[[ -z $wheels ]] || compgen -G "$wheels/*.whl" >/dev/null || wrong "no wheels in $wheels"
if [[ -z $python ]]; then
  python=python3
  [[ ! -x .venv/bin/python ]] || python=.venv/bin/python
fi
command -v "$python" >/dev/null || wrong "no $python"

least=15 # seconds that a step needs to be worth starting
deadline=$((SECONDS + 60 * minutes))
json=$out/gpu_first_contact.json log=$out/gpu_first_contact.log
child='' work='' card=''

record() {
  local what=$1
  shift
  "$python" -m benchmarks.first_contact.record "$what" --out "$json" ${rehearse:+--rehearsal} "$@"
}

# Card and library, for which a result is valid.
key() {
  local digest
  digest=$(cat swin_moe/_C*.so 2>/dev/null | sha256sum | cut -c 1-12)
  echo "$card $digest"
}

# step NAME SECONDS ARGUMENTS: runs `python ARGUMENTS` for at most SECONDS.
step() {
  local name=$1 limit=$2 began offset code=0
  shift 2
  if [[ -n $list ]]; then
    printf '%-26s %4s s  python %s\n' "$name" "$limit" "$*"
    return
  fi
  [[ -z $only || ,$only, == *,"$name",* ]] || return 0
  if [[ -z $only ]] && record passed --step "$name" --key "$(key)"; then
    echo "==> $name: passed before"
    return
  fi
  if ((deadline - SECONDS < least)); then
    echo "==> $name"
    record add --step "$name" --key "$(key)" --code 77 --reason 'no time was left'
    return
  fi
  ((limit < deadline - SECONDS)) || limit=$((deadline - SECONDS))
  echo "==> $name (at most $limit s): python $*"
  echo "==> $name: python $*" >>"$log"
  offset=$(stat -c %s "$log") began=$SECONDS
  timeout -k 5 "$limit" "$python" "$@" --device "$device" --json "$work/$name.json" \
    "${toy[@]}" >>"$log" 2>&1 &
  child=$!
  wait "$child" || code=$?
  child=''
  record add --step "$name" --key "$(key)" --code "$code" --seconds $((SECONDS - began)) \
    --log "$log" --offset "$offset" --found "$work/$name.json"
  [[ $code -eq 0 || $code -eq 77 ]] || tail -c "+$((offset + 1))" "$log" | tail -n 12 | sed 's/^/    | /'
}

steps() {
  local first=benchmarks.first_contact op
  step facts 60 -m $first.facts
  step library 240 -m $first.library
  step trials 180 -m $first.trials
  for op in window_attention moe_route moe_dispatch moe_experts adamw_; do
    step "verify-$op" 100 -m $first.verify "$op"
  done
  step attention 90 -m benchmarks.window_attention --batch "$many" --rounds "$rounds" \
    --peers timm,sdpa --dtypes bfloat16
  step route 60 -m benchmarks.moe_ops route --batch "$many" --rounds "$rounds"
  step dispatch 60 -m benchmarks.moe_ops dispatch --batch "$many" --rounds "$rounds"
  step experts 60 -m benchmarks.moe_ops experts --batch "$many" --rounds "$rounds"
  for window in 8 16; do
    step "model-window$window" 90 -m benchmarks.model --size "$size" --windows "$window" \
      --batch "$many" --rounds "$rounds_of_models" --modes training --dtypes bfloat16 \
      --peers references,timm --eager
  done
  step engine 90 -m $first.engine --batch "$micro" --updates "$updates"
  step sanitizer 130 -m $first.sanitizer
  # Each compilation takes long: one peer, in the stage with most of the blocks.
  step attention-compiled 120 -m benchmarks.window_attention --batch "$many" --rounds "$rounds" \
    --peers 'timm compiled' --dtypes bfloat16 --windows "$compiled_windows" --stages 3
}

# The sizes.
if [[ -n $rehearse ]]; then
  device=cpu toy=(--quick) many=1 micro=4 updates=10 rounds=1 rounds_of_models=1
  size=tiny compiled_windows=8
  export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
  device=cuda toy=() many=128 micro=64 updates=100 rounds=15 rounds_of_models=7
  size=base compiled_windows=16,8
fi
# The first pass runs nothing: it lists the steps.
wanted=$list list=yes
listing=$(steps)
list=$wanted
for name in ${only//,/ }; do
  grep -q "^$name " <<<"$listing" || wrong "no step is called $name"
done
if [[ -n $list ]]; then
  echo "$listing"
  exit 0
fi

# The end of this script ends the step and removes the temporary folder.
# shellcheck disable=SC2329
cleanup() {
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  rm -rf -- "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
work=$(mktemp -d)
mkdir -p -- "$out"
touch -- "$log"
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# The settings of harness.py, which otherwise restarts each benchmark.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=67108864
card=rehearsal
if [[ -z $rehearse ]]; then
  card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
  card=${card:-no GPU}
fi
if [[ -n $wheels ]]; then
  if "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$work/site" "$wheels"/*.whl >>"$log" 2>&1; then
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
    echo "wheels installed for this run: $(find "$wheels" -name '*.whl' | wc -l)"
  else
    echo "the wheels do not install, steps that need them will not run: $(tail -n 1 "$log")"
  fi
fi
steps
code=0
echo
record finish | tee -a "$log" || code=1
echo
echo "$json"
exit "$code"
