# Shared by the launchers: sourced, not run. Finds the interpreter and tunes the memory allocator.
# shellcheck shell=bash

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -n ${PYTHON:-} ]]; then
  python=$PYTHON
elif [[ -x $root/.venv/bin/python ]]; then
  python=$root/.venv/bin/python
else
  # shellcheck disable=SC2034 # used by the launchers
  python=python3
fi

# On a CPU the first touch of fresh pages costs more than many ops: keep freed memory.
# tcmalloc or jemalloc where LD_PRELOAD brings them already, else glibc told to hold on to it.
if [[ ${LD_PRELOAD:-} != *malloc* ]]; then
  export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-16000000000}
  export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

die() {
  printf '%s: error: %s\n' "$(basename -- "$0")" "$1" >&2
  exit 2
}

# Replace this shell by the command, or print it, quoted, when --dry-run was given.
launch() {
  if [[ ${dry_run:-0} == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
    exit 0
  fi
  exec "$@"
}
