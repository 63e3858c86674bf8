#!/usr/bin/env bash
# What slice.sh runs on each host of a slice; it is copied there.
set -euo pipefail

SELF=$(realpath "$0")
RUN=$HOME/zephyr_jax # checkout, environment and copied inputs; the training's current folder
KEPT=$HOME/zephyr_run # log, process id and exit status of the training
PY=$RUN/.venv/bin/python

usage() {
  cat <<'TEXT'
usage: zephyr_host.sh COMMAND [ARGUMENT ...]   (on a TPU host; slice.sh calls it)
  install PACKAGE JAX PYTHON   install a .tar.gz of the checkout or a .whl with this JAX and Python
  copy gs://BUCKET/FOLDER DIR  copy a bucket folder into DIR of the run folder
  start ARGUMENT ...           start the training in the background
  status                       print running, exited N, lost (killed with its keeper) or none
  stop                         kill the training and what it started; it is lost then
  log N                        print the last N lines of the log
  follow N                     print the last N lines and what is added
TEXT
}

install() {
  local what=("$HOME/$1")
  mkdir -p "$RUN" "$KEPT"
  if [[ $1 != *.whl ]]; then
    tar -xzf "$HOME/$1" -C "$RUN"
    what=(--editable "$RUN")
  fi
  export PATH=$HOME/.local/bin:$PATH
  if ! command -v uv >/dev/null; then
    curl --location --silent --show-error --fail https://astral.sh/uv/install.sh | sh
  fi
  if [[ ! -x $PY ]]; then uv venv --python "$3" "$RUN/.venv"; fi
  # jax[tpu] of one version names its libtpu; gcsfs is for gs:// paths
  uv pip install --python "$PY" "jax[tpu]==$2" gcsfs "${what[@]}"
}

copy() {
  mkdir -p "$RUN/$2"
  gcloud storage rsync --recursive "$1" "$RUN/$2"
}

alive() { [[ -f $KEPT/pid ]] && kill -0 "$(cat "$KEPT/pid")" 2>/dev/null; }

start() {
  local train=("$PY" -m zephyr_jax train)
  if alive && [[ ! -f $KEPT/status ]]; then
    echo "a training runs on $(hostname) already; no other was started"
    return
  fi
  cd "$RUN"
  if [[ -f scripts/train.py ]]; then train=("$PY" scripts/train.py); fi
  mkdir -p "$KEPT"
  rm -f "$KEPT/status"
  setsid nohup bash "$SELF" keep "${train[@]}" "$@" >>"$KEPT/log" 2>&1 </dev/null &
  echo $! >"$KEPT/pid"
  echo "started on $(hostname)"
}

# Runs the training and writes down how it ended.
keep() {
  local code=0
  trap : TERM # the training's own answer to the signal is what counts
  echo "$(date '+%F %T') $*"
  "$@" || code=$?
  echo "$(date '+%F %T') ended with status $code"
  echo "$code" >"$KEPT/status.tmp"
  mv "$KEPT/status.tmp" "$KEPT/status"
}

status() {
  local now=lost
  if [[ ! -f $KEPT/pid ]]; then
    now=none
  elif [[ -f $KEPT/status ]]; then
    now="exited $(cat "$KEPT/status")"
  elif alive; then
    now=running
  fi
  echo "zephyr-host $(hostname) $now"
}

# The keeper leads a group of its own, in which the training is; a hung one hears no SIGTERM.
stop() {
  if alive && [[ ! -f $KEPT/status ]]; then
    kill -KILL -- "-$(cat "$KEPT/pid")"
    echo "killed on $(hostname)"
  fi
}

log() {
  echo "== $(hostname)"
  tail -n "$1" "$KEPT/log"
}

follow() { tail -n "$1" -F "$KEPT/log"; }

main() {
  local command=${1-}
  case "$command $#" in
    '-h '* | '--help '*) usage ;;
    'install 4' | 'copy 3' | 'status 1' | 'stop 1' | 'log 2' | 'follow 2' | 'start '* | 'keep '*)
      shift
      "$command" "$@"
      ;;
    *)
      echo "error: no command '$*'; zephyr_host.sh --help lists them" >&2
      exit 2
      ;;
  esac
}

main "$@"
