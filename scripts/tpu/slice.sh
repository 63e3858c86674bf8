#!/usr/bin/env bash
# One training run on Cloud TPU slices, from the request for machines to their deletion.
# docs/launching.md is the walk-through.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/tpu/common.sh
source "$HERE/common.sh"
# shellcheck source=scripts/tpu/supervise.sh
source "$HERE/supervise.sh"
ROOT=$(cd "$HERE/../.." && pwd)

usage() {
  cat <<'TEXT'
usage: slice.sh COMMAND --project=P --zone=Z --type=T --name=N [FLAG ...] [-- TRAIN ARGUMENTS]

commands
  create      request the slices as one queued resource and wait until it is ACTIVE
  setup       copy this checkout (its last commit) or a wheel to every host and install it
  start       start `python scripts/train.py TRAIN ARGUMENTS --distributed` on every host
  status      the state of the request and of the training on every host
  logs        the end of every host's log; with --follow the log of the first host as it grows
  supervise   create, setup and start; after a preemption delete and do so again, until the
              training ends with status 0; any other status but 75 stops it and shows the log
  delete      delete the queued resource and its machines

flags
  --project, --zone, --type, --name   Google Cloud project and zone, accelerator type such as
                                      v5litepod-16, and a name for the request and its machines
  --env_file=FILE      flags, one a line without the dashes (see slice.env.example); those of the
                       command line win
  --slices=N           slices of that type, joined over the data center's network (1)
  --spot               Spot machines: cheaper, and taken away at any time
  --runtime=VERSION    software version of the machines (chosen by the type)
  --create_flag=FLAG   one more flag for `gcloud ... create`, such as --network=N; may be repeated
  --wheel=FILE         install this wheel instead of the checkout
  --copy=gs://A/B:DIR  copy a folder of a bucket to DIR in each host's run folder; may be repeated
  --jax=VERSION        JAX with the libtpu that it names (0.10.2)
  --python=VERSION     Python of the environment on the hosts (3.11)
  --lines=N            lines of each log (40)
  --follow             keep printing the log
  --poll=SECONDS       between two looks of create and supervise (30)
  --grace=SECONDS      from the end of a training to the verdict whether its machines are gone (120)
  --hung_after=SECONDS supervise kills and starts again a training whose heartbeat.json has stood
                       still for so long; more than starting, compiling and restoring take (0: never)
  --max_restarts=N     how often supervise starts again (50)
  --delete_when_done   supervise deletes the machines after status 0
  --dry_run            print the commands, quoted for a shell, and run none
TEXT
}

PROJECT='' ZONE='' TYPE='' NAME='' RUNTIME='' WHEEL=''
SLICES=1 JAX=0.10.2 PYTHON=3.11 LINES_SHOWN=40 POLL=30 GRACE=120 MAX_RESTARTS=50 HUNG_AFTER=0
SPOT='' FOLLOW='' DELETE_WHEN_DONE=''
CREATE_FLAGS=() COPIES=() TRAIN=()

flag() {
  case $1 in
    --project=*) PROJECT=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --name=*) NAME=${1#*=} ;;
    --slices=*) SLICES=${1#*=} ;;
    --spot) SPOT=1 ;;
    --runtime=*) RUNTIME=${1#*=} ;;
    --create_flag=*) CREATE_FLAGS+=("${1#*=}") ;;
    --wheel=*) WHEEL=${1#*=} ;;
    --copy=*) COPIES+=("${1#*=}") ;;
    --jax=*) JAX=${1#*=} ;;
    --python=*) PYTHON=${1#*=} ;;
    --lines=*) LINES_SHOWN=${1#*=} ;;
    --follow) FOLLOW=1 ;;
    --poll=*) POLL=${1#*=} ;;
    --grace=*) GRACE=${1#*=} ;;
    --max_restarts=*) MAX_RESTARTS=${1#*=} ;;
    --hung_after=*) HUNG_AFTER=${1#*=} ;;
    --delete_when_done) DELETE_WHEN_DONE=1 ;;
    --dry_run) DRY_RUN=1 ;;
    *) bad "unknown argument $1; slice.sh --help lists the flags" ;;
  esac
}

default_runtime() {
  case $TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
  esac
}

check_flags() {
  local copy
  need --project "$PROJECT" '^[a-z][-a-z0-9:.]*$' 'a project id'
  need --zone "$ZONE" '^[a-z]+-[a-z0-9]+-[a-z]$' 'a zone such as us-west4-a'
  need --type "$TYPE" '^v[0-9][a-z]*-[0-9]+$' 'an accelerator type such as v5litepod-16'
  need --name "$NAME" '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' 'lower-case letters, digits, dashes (40)'
  need --slices "$SLICES" '^[1-9][0-9]*$' 'a number from 1'
  need --jax "$JAX" '^[0-9]+\.[0-9]+\.[0-9]+$' 'a whole version such as 0.10.2'
  need --python "$PYTHON" '^3\.(1[1-9]|[2-9][0-9])$' '3.11 or newer'
  need --lines "$LINES_SHOWN" '^[1-9][0-9]*$' 'a number from 1'
  need --poll "$POLL" '^[0-9]+$' 'seconds'
  need --grace "$GRACE" '^[0-9]+$' 'seconds'
  need --max_restarts "$MAX_RESTARTS" '^[0-9]+$' 'a number'
  need --hung_after "$HUNG_AFTER" '^[0-9]+$' 'seconds'
  RUNTIME=${RUNTIME:-$(default_runtime)}
  [[ $RUNTIME ]] || bad "no software version is known for --type=$TYPE; give one with --runtime"
  [[ -z $WHEEL || ($WHEEL == *.whl && -f $WHEEL) ]] || bad "--wheel=$WHEEL is not a .whl file"
  for copy in "${COPIES[@]+"${COPIES[@]}"}"; do
    [[ $copy =~ ^gs://[^:]+:[^:/][^:]*$ ]] || bad "--copy=$copy is not gs://BUCKET/FOLDER:DIR"
  done
}

# --- Google Cloud ---------------------------------------------------------------------------------

tpus() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }

nodes() {
  local i
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

# VERB WORD ...: the same on all hosts of every slice at once; @ in a word is the slice's node.
# Not `queued-resources ssh --node=all`: that leaves out a node that does not answer, and ends with 0.
hosts() {
  local node words started=() code=0
  for node in $(nodes); do
    words=("$1" "${@:2}" --worker=all)
    words=("${words[@]/#@/$node}")
    if [[ $DRY_RUN ]] || ((SLICES == 1)); then
      tpus tpu-vm "${words[@]}" || return
    else
      tpus tpu-vm "${words[@]}" &
      started+=("$!")
    fi
  done
  for node in "${started[@]+"${started[@]}"}"; do wait "$node" || code=$?; done
  return "$code"
}

on_hosts() { hosts ssh @ --command="bash zephyr_host.sh $(quoted "$@")"; }

# The state that a describe command prints; ABSENT where there is no such thing, UNKNOWN where
# nothing could be learnt, which must never count as a loss.
state() {
  local said
  if said=$(tpus "$@" 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

request_state() { state queued-resources describe "$NAME" --format='value(state.state)'; }
node_state() { state tpu-vm describe "$1" --format='value(state)'; }

# Whether machines are certainly gone.
lost() {
  local node
  case $(request_state) in
    SUSPENDING | SUSPENDED | FAILED | DELETING | ABSENT) return 0 ;;
    ACTIVE) ;;
    *) return 1 ;; # still waiting, its machines are not there yet; or nothing could be learnt
  esac
  for node in $(nodes); do
    case $(node_state "$node") in
      PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | ABSENT) return 0 ;;
    esac
  done
  return 1
}

request() {
  local words=(queued-resources create "$NAME")
  words+=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME")
  if ((SLICES == 1)); then
    words+=(--node-id="$NAME")
  else
    words+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  # the machines read and write the bucket
  words+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  if [[ $SPOT ]]; then words+=(--spot); fi
  tpus "${words[@]}" "${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}"
}

# Waits for the machines; 1 where this request will never have any.
wait_active() {
  local now before=''
  if [[ $DRY_RUN ]]; then
    request_state
    return
  fi
  while true; do
    now=$(request_state)
    if [[ $now != "$before" ]]; then say "$NAME is $now"; fi
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT) return 1 ;;
    esac
    sleep "$POLL"
  done
}

delete() { tpus queued-resources delete "$NAME" --force --quiet; }

# A request that is still suspending cannot be deleted yet.
delete_surely() {
  local tries
  for ((tries = 0; tries < 20; tries++)); do
    if [[ $(request_state) == ABSENT ]] || delete; then return 0; fi
    sleep "$POLL"
  done
  fail "$NAME cannot be deleted; see: gcloud compute tpus queued-resources describe $NAME"
}

# --- the run --------------------------------------------------------------------------------------

# `|| return`: supervise looks at the status, which switches off `set -e`.
setup() {
  local package=$WHEEL copy
  if [[ -z $WHEEL ]]; then
    package=${TMPDIR:-/tmp}/zephyr_jax-$NAME.tar.gz
    run git -C "$ROOT" archive --format=tar.gz --output="$package" HEAD || return
  fi
  hosts scp "$package" "$HERE/zephyr_host.sh" @: || return
  on_hosts install "$(basename "$package")" "$JAX" "$PYTHON" || return
  for copy in "${COPIES[@]+"${COPIES[@]}"}"; do
    on_hosts copy "${copy%:*}" "${copy##*:}" || return
  done
}

start() { on_hosts start "${TRAIN[@]}"; }

logs() {
  if [[ ! $FOLLOW ]]; then
    on_hosts log "$LINES_SHOWN"
    return
  fi
  tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 \
    --command="bash zephyr_host.sh follow $LINES_SHOWN"
}

status() {
  tpus queued-resources describe "$NAME" --format='value(state.state)'
  on_hosts status
}

main() {
  local command
  parse 'create setup start status logs supervise delete' "$@"
  command=$COMMAND
  check_flags
  case $command in
    start | supervise) check_train "${TRAIN[@]+"${TRAIN[@]}"}" ;;
    *) ((${#TRAIN[@]} == 0)) || bad "$command takes no training arguments" ;;
  esac
  if [[ $command == supervise && $WORKDIR != gs://* ]]; then
    bad "--workdir=$WORKDIR goes with its machine; supervise needs gs://BUCKET/FOLDER"
  fi
  needs_program gcloud
  case $command in
    create)
      request
      wait_active || fail "$NAME will not become ACTIVE; slice.sh delete, then create again"
      ;;
    *) "$command" ;;
  esac
}

main "$@"
