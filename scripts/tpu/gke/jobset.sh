#!/usr/bin/env bash
# One training run as a JobSet of a GKE cluster, or by xpk. docs/launching.md is the walk-through.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/tpu/common.sh
source "$HERE/../common.sh"

usage() {
  cat <<'TEXT'
usage: jobset.sh COMMAND --name=N [FLAG ...] [-- TRAIN ARGUMENTS]

commands
  render    print the manifest (jobset.yaml filled in)
  apply     write the manifest to a file and apply it
  status    the JobSet and its pods
  logs      the end of every host's log; --follow keeps printing
  delete    delete the JobSet; its node pools stay
  xpk       start the same training by `xpk workload create`

flags
  --name=N             name of the JobSet, or of xpk's workload
  --env_file=FILE      flags, one a line without the dashes; the command line wins
  --context=C          kubectl's context (its current one)
  --type=T             accelerator type such as v5litepod-16         render, apply, xpk
  --slices=N           slices of that type (1)                       render, apply, xpk
  --image=IMAGE        container image with this package             render, apply, xpk
  --max_restarts=N     restarts after preemptions (50)               render, apply, xpk
  --spot               ask for Spot nodes                            render, apply
  --copy=gs://A/B:DIR  copy a folder of a bucket to DIR (absolute)   render, apply
  --project=P, --zone=Z, --cluster=C                                 xpk
  --lines=N            lines of each log (40)
  --follow             keep printing the logs
  --dry_run            print the commands, quoted for a shell, and run none
TEXT
}

NAME='' CONTEXT='' TYPE='' SLICES=1 IMAGE='' MAX_RESTARTS=50 SPOT='' COPY=''
PROJECT='' ZONE='' CLUSTER='' LINES_SHOWN=40 FOLLOW='' TRAIN=()

flag() {
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --context=*) CONTEXT=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --slices=*) SLICES=${1#*=} ;;
    --image=*) IMAGE=${1#*=} ;;
    --max_restarts=*) MAX_RESTARTS=${1#*=} ;;
    --spot) SPOT=1 ;;
    --copy=*) COPY=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --cluster=*) CLUSTER=${1#*=} ;;
    --lines=*) LINES_SHOWN=${1#*=} ;;
    --follow) FOLLOW=1 ;;
    --dry_run) DRY_RUN=1 ;;
    *) bad "unknown argument $1; jobset.sh --help lists the flags" ;;
  esac
}

# Accelerator and topology labels of a type's nodes, and its number of chips; four chips a node.
shape() {
  case $TYPE in
    v5litepod-16) echo tpu-v5-lite-podslice 4x4 16 ;;
    v5litepod-32) echo tpu-v5-lite-podslice 4x8 32 ;;
    v5litepod-64) echo tpu-v5-lite-podslice 8x8 64 ;;
    v5litepod-128) echo tpu-v5-lite-podslice 8x16 128 ;;
    v5litepod-256) echo tpu-v5-lite-podslice 16x16 256 ;;
    v6e-16) echo tpu-v6e-slice 4x4 16 ;;
    v6e-32) echo tpu-v6e-slice 4x8 32 ;;
    v6e-64) echo tpu-v6e-slice 8x8 64 ;;
    v6e-128) echo tpu-v6e-slice 8x16 128 ;;
    v6e-256) echo tpu-v6e-slice 16x16 256 ;;
    # these count cores, two a chip
    v5p-16) echo tpu-v5p-slice 2x2x2 8 ;;
    v5p-32) echo tpu-v5p-slice 2x2x4 16 ;;
    v5p-64) echo tpu-v5p-slice 2x4x4 32 ;;
    v5p-128) echo tpu-v5p-slice 4x4x4 64 ;;
    *) bad "--type=$TYPE is not v5litepod- or v6e-16 to -256, nor v5p-16 to -128" ;;
  esac
}

check_job() {
  need --type "$TYPE" '^v[0-9][a-z]*-[0-9]+$' 'an accelerator type such as v5litepod-16'
  need --image "$IMAGE" '^[A-Za-z0-9][-A-Za-z0-9._/:@]*$' 'a container image'
  need --slices "$SLICES" '^[1-9][0-9]*$' 'a number from 1'
  need --max_restarts "$MAX_RESTARTS" '^[0-9]+$' 'a number'
  if [[ $COPY ]]; then
    need --copy "$COPY" '^gs://[-A-Za-z0-9._/]+:/[-A-Za-z0-9._/]+$' 'gs://BUCKET/FOLDER:/DIR'
  fi
  check_train "${TRAIN[@]+"${TRAIN[@]}"}"
  [[ $WORKDIR == gs://* ]] || bad "--workdir=$WORKDIR goes with its pod; give gs://BUCKET/FOLDER"
}

# The arguments as a list in JSON, which YAML reads too.
json_list() {
  local word all=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    all+="${all:+, }\"$word\""
  done
  echo "[$all]"
}

manifest() {
  local text accelerator topology chips shaped
  shaped=$(shape)
  read -r accelerator topology chips <<<"$shaped"
  text=$(sed -e '/^# /d' \
    -e "$(if [[ $SPOT ]]; then echo 's/ # spot$//'; else echo '/ # spot$/d'; fi)" \
    -e "$(if [[ $COPY ]]; then echo 's/ # copy$//'; else echo '/ # copy$/d'; fi)" \
    "$HERE/jobset.yaml")
  fill() { text=${text//"@$1@"/"$2"}; }
  fill NAME "$NAME"
  fill MAX_RESTARTS "$MAX_RESTARTS"
  fill SLICES "$SLICES"
  fill HOSTS "$((chips / 4))"
  fill CHIPS 4
  fill SOURCE "${COPY%:*}"
  fill INPUTS "${COPY##*:}"
  fill ACCELERATOR "$accelerator"
  fill TOPOLOGY "$topology"
  fill IMAGE "$IMAGE"
  fill ARGS "$(json_list "${TRAIN[@]}")" # last: nothing in them is filled in
  echo "$text"
}

cluster() {
  needs_program kubectl
  if [[ $CONTEXT ]]; then run kubectl --context="$CONTEXT" "$@"; else run kubectl "$@"; fi
}

render() { manifest; }

apply() {
  local path=${TMPDIR:-/tmp}/zephyr-jobset-$NAME.yaml text
  text=$(manifest)
  if [[ ! $DRY_RUN ]]; then echo "$text" >"$path"; fi
  cluster apply --filename="$path"
}

status() {
  cluster get jobset "$NAME"
  cluster get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
}

logs() {
  local words=(--prefix --tail="$LINES_SHOWN" --max-log-requests=512)
  if [[ $FOLLOW ]]; then words+=(--follow); fi
  cluster logs --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --container=train "${words[@]}"
}

delete() { cluster delete jobset "$NAME"; }

by_xpk() {
  needs_program xpk
  # xpk restarts after 42 and 127 to 255 by itself
  run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
    --workload="$NAME" --tpu-type="$TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes="$EXIT_AGAIN" \
    --termination-grace-period-seconds=120 \
    --command="python -m zephyr_jax train $(quoted "${TRAIN[@]}")"
}

main() {
  local command
  parse 'render apply status logs delete xpk' "$@"
  command=$COMMAND
  need --name "$NAME" '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' 'lower-case letters, digits, dashes (40)'
  need --lines "$LINES_SHOWN" '^[1-9][0-9]*$' 'a number from 1'
  case $command in
    render | apply | xpk) check_job ;;
    *) ((${#TRAIN[@]} == 0)) || bad "$command takes no training arguments" ;;
  esac
  if [[ $command == xpk ]]; then
    need --project "$PROJECT" '^[a-z][-a-z0-9:.]*$' 'a project id'
    need --zone "$ZONE" '^[a-z]+-[a-z0-9]+-[a-z]$' 'a zone such as us-west4-a'
    [[ -z $SPOT && -z $COPY ]] || bad "xpk takes no --spot and no --copy; its cluster has the nodes"
    need --cluster "$CLUSTER" '^[a-z][-a-z0-9]*$' 'the name of a GKE cluster'
    by_xpk
  else
    "$command"
  fi
}

main "$@"
