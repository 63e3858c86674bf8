#!/usr/bin/env bash
# One training run on Cloud TPU slices as a queued resource, from the request to its deletion.
# docs/launching.md is the walk-through.
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi
shopt -s inherit_errexit

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
# shellcheck source=scripts/tpu/supervise.sh
source "$HERE/supervise.sh"

usage() {
  cat <<'TEXT'
usage: slice.sh COMMAND --project=P --zone=Z --type=T --name=N [FLAG ...] [-- TRAIN ARGUMENTS]

commands
  create      request the slices as one queued resource and wait until it is ACTIVE
  setup       copy this checkout (its last commit) or a wheel to every host and install it
  start       start `python scripts/train.py TRAIN ARGUMENTS --distributed` on every host
  status      the state of the request and of the training on every host
  logs        the last 40 lines of every host's log; with --follow the first host's as it grows
  supervise   create, setup, start; resume on new machines after each preemption, until the
              training ends with status 0 (75 and 76 resume; any other stops and shows the log)
  delete      delete the queued resource and its machines

flags
  --project=P --zone=Z Google Cloud project and zone
  --type=T --name=N    accelerator type such as v5litepod-16; name of the request and its machines
  --env_file=FILE      read flags from a file, one per line without dashes; later flags win
  --slices=N           number of slices of that type, joined over the data center's network (1)
  --spot               use Spot machines: cheaper, and preempted at any time
  --runtime=VERSION    software version of the machines (by the type)
  --create_flag=FLAG   extra flag for `gcloud ... create`, such as --network=N (repeatable)
  --wheel=FILE         install this wheel instead of the checkout
  --copy=gs://A/B:DIR  copy a bucket folder to DIR in each host's run folder (repeatable)
  --jax=VERSION        JAX version; it determines the libtpu version (0.10.2)
  --poll=SECONDS       interval between two looks of create and supervise (30)
  --grace=SECONDS      time from the end of a training to the check for lost machines (120)
  --hung_after=SECONDS kill and restart a training whose heartbeat.json stays the same for so long;
                       must exceed start, compilation and restoring (0: never)
  --max_restarts=N     number of restarts by supervise (50)
  --delete_when_done   delete the machines after status 0
  --dry_run            print the commands, quoted for a shell, and run none
TEXT
}

EXIT_AGAIN=75 # the training was stopped, saved its state and can be resumed (EX_TEMPFAIL)
EXIT_PARTED=76 # the process of another host died or went silent
LOG_LINES=40
PYTHON=3.11
PROJECT='' ZONE='' TYPE='' NAME='' RUNTIME='' WHEEL='' DRY_RUN='' SPOT='' FOLLOW='' WORKDIR=''
SLICES=1 JAX=0.10.2 POLL=30 GRACE=120 MAX_RESTARTS=50 HUNG_AFTER=0 DELETE_WHEN_DONE=''
CREATE_FLAGS=() COPIES=() TRAIN=()

stop_with() { echo "error: $2" >&2 && exit "$1"; }
bad() { stop_with 2 "$1"; }
fail() { stop_with 1 "$1"; }
say() { echo "$(date '+%F %T') $1" >&2; }
quoted() {
  local all
  printf -v all '%q ' "$@"
  echo "${all% }"
}
run() { if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi; }

flag() {
  local name=${1%%=*} value=${1#*=} line
  name=${name#--}
  case $1 in
    --env_file=*)
      [[ -f $value ]] || bad "no file $value"
      while read -r line; do flag "--$line"; done < <(sed 's/ *#.*//; /^ *$/d' "$value")
      ;;
    --create_flag=*) CREATE_FLAGS+=("$value") ;;
    --copy=gs://*:*) COPIES+=("$value") ;;
    --copy=*) bad "$1 is not gs://BUCKET/FOLDER:DIR" ;;
    --project=* | --zone=* | --type=* | --name=* | --slices=* | --runtime=* | --wheel=* | --jax=* | \
      --poll=* | --grace=* | --hung_after=* | --max_restarts=*) printf -v "${name^^}" %s "$value" ;;
    --spot | --follow | --delete_when_done | --dry_run) printf -v "${name^^}" 1 ;;
    *) bad "unknown argument $1; slice.sh --help lists the flags" ;;
  esac
}

# NAME PATTERN MEANING: the flag's value has this form.
need() {
  local variable=${1^^}
  [[ ${!variable} ]] || bad "--$1 is missing: $3"
  [[ ${!variable} =~ ^$2$ ]] || bad "--$1=${!variable} is not $3"
}

check_flags() {
  local name
  need project '[a-z][-a-z0-9:.]*' 'a project id'
  need zone '[a-z]+-[a-z0-9]+-[a-z]' 'a zone such as us-west4-a'
  need type 'v[0-9][a-z]*-[0-9]+' 'an accelerator type such as v5litepod-16'
  need name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'lower-case letters, digits, dashes (40)'
  need slices '[1-9][0-9]*' 'a number from 1'
  need jax '[0-9]+\.[0-9]+\.[0-9]+' 'a whole version such as 0.10.2'
  for name in poll grace hung_after max_restarts; do need "$name" '[0-9]+' 'a number from 0'; done
  case $TYPE in
    v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
    v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
    v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
    v2-* | v3-* | v4-*) RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
  esac
  [[ $RUNTIME ]] || bad "no software version is known for --type=$TYPE; give one with --runtime"
  [[ -z $WHEEL || ($WHEEL == *.whl && -f $WHEEL) ]] || bad "--wheel=$WHEEL is not a .whl file"
}

# Checks the training arguments, adds --distributed, and sets WORKDIR.
check_train() {
  local word
  [[ " ${TRAIN[*]}" == *' --config='* ]] || bad 'training arguments are missing: -- --config=...'
  for word in "${TRAIN[@]}"; do
    case $word in
      --workdir=*) WORKDIR=${word#*=} ;;
      --distributed) bad '--distributed is added automatically; leave it out' ;;
      *$'\n'*) bad 'a training argument has a line break' ;;
    esac
  done
  [[ $WORKDIR ]] || bad 'the training arguments have no --workdir=...'
  TRAIN+=(--distributed)
}

tpus() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }

nodes() { if ((SLICES == 1)); then echo "$NAME"; else seq -f "$NAME-%g" 0 $((SLICES - 1)); fi; }

# VERB WORD ...: the same on all hosts of every slice at once; @ in a word is the slice's node.
# Not `queued-resources ssh --node=all`: it skips a node that does not answer, and ends with 0.
hosts() {
  local node words started=() code=0
  for node in $(nodes); do
    words=("${@/#@/$node}" --worker=all)
    if [[ $DRY_RUN ]] || ((SLICES == 1)); then
      tpus tpu-vm "${words[@]}" || return
    else
      tpus tpu-vm "${words[@]}" &
      started+=("$!")
    fi
  done
  for node in "${started[@]}"; do wait "$node" || code=$?; done
  return "$code"
}

on_hosts() { hosts ssh @ --command="bash zephyr_host.sh $(quoted "$@")"; }

# The state that a describe command prints; ABSENT where nothing of that name exists, UNKNOWN where
# the question failed, which never counts as a loss.
state() {
  local text
  if text=$(tpus "$@" 2>&1); then
    echo "${text##*$'\n'}"
  elif [[ $text == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$text" >&2
    echo UNKNOWN
  fi
}

request_state() { state queued-resources describe "$NAME" --format='value(state.state)'; }

request() {
  local words=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME" --node-id="$NAME")
  if ((SLICES > 1)); then words[2]=--node-count=$SLICES words+=(--node-prefix="$NAME"); fi
  # the machines read and write the bucket
  words+=(--scopes=https://www.googleapis.com/auth/cloud-platform ${SPOT:+--spot})
  tpus queued-resources create "$NAME" "${words[@]}" "${CREATE_FLAGS[@]}"
}

# Waits for the machines; 1 if this request will never have any.
wait_active() {
  local now before=''
  while [[ $before != ACTIVE ]]; do
    now=$(request_state)
    if [[ $DRY_RUN ]]; then echo "$now" && return; fi
    if [[ $now != "$before" ]]; then say "$NAME is $now"; fi
    case $now in FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT) return 1 ;; esac
    before=$now
    if [[ $now != ACTIVE ]]; then sleep "$POLL"; fi
  done
}

create() {
  request
  wait_active || fail "$NAME will not become ACTIVE; slice.sh delete, then create again"
}

# `|| return`: supervise checks the status, which switches off `set -e`.
setup() {
  local package=${WHEEL:-${TMPDIR:-/tmp}/zephyr_jax-$NAME.tar.gz} copy
  if [[ -z $WHEEL ]]; then
    run git -C "$ROOT" archive --format=tar.gz --output="$package" HEAD || return
  fi
  hosts scp "$package" "$HERE/zephyr_host.sh" @: || return
  on_hosts install "$(basename "$package")" "$JAX" "$PYTHON" || return
  for copy in "${COPIES[@]}"; do on_hosts copy "${copy%:*}" "${copy##*:}" || return; done
}

start() { on_hosts start "${TRAIN[@]}"; }

status() {
  tpus queued-resources describe "$NAME" --format='value(state.state)'
  on_hosts status
}

logs() {
  if [[ $FOLLOW ]]; then
    tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 \
      --command="bash zephyr_host.sh follow $LOG_LINES"
  else
    on_hosts log "$LOG_LINES"
  fi
}

delete() { tpus queued-resources delete "$NAME" --force --quiet; }

main() {
  local command=${1-} commands=' create setup start status logs supervise delete '
  if [[ " $* " == *' --help '* || $command == -h ]]; then usage && exit; fi
  [[ $command && $commands == *" $command "* ]] ||
    bad "no command${command:+ $command}; one of:${commands% }"
  shift
  while (($#)); do
    if [[ $1 == -- ]]; then TRAIN=("${@:2}") && break; fi
    flag "$1"
    shift
  done
  check_flags
  case $command in
    start | supervise) check_train ;;
    *) ((${#TRAIN[@]} == 0)) || bad "$command takes no training arguments" ;;
  esac
  if [[ ! $DRY_RUN ]]; then command -v gcloud >/dev/null || fail 'gcloud is not installed'; fi
  "$command"
}

main "$@"
