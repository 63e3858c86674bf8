# shellcheck shell=bash
# What slice.sh and gke/jobset.sh share; sourced, not run.
if ((BASH_VERSINFO[0] < 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] < 4))); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi
shopt -s inherit_errexit

# The training was asked to stop, saved its state, and wants to be started again (EX_TEMPFAIL).
# shellcheck disable=SC2034
EXIT_AGAIN=75
DRY_RUN=''

bad() {
  echo "error: $1" >&2
  exit 2
}

fail() {
  echo "error: $1" >&2
  exit 1
}

say() { echo "$(date '+%F %T') $1" >&2; }

quoted() {
  local all
  printf -v all '%q ' "$@"
  echo "${all% }"
}

run() {
  if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

needs_program() {
  if [[ ! $DRY_RUN ]]; then command -v "$1" >/dev/null || fail "$1 is not installed"; fi
}

# FLAG VALUE PATTERN MEANING: the value is there and of this form.
need() {
  [[ $2 ]] || bad "$1 is missing: $4"
  [[ $2 =~ $3 ]] || bad "$1=$2 is not $4"
}

# Applies the flags of a file: one a line without dashes; blank lines and # comments are skipped.
flags_of() {
  local line
  [[ -f $1 ]] || bad "no file $1"
  while IFS= read -r line || [[ $line ]]; do
    line=${line%%#*}
    line=${line%"${line##*[![:space:]]}"}
    if [[ $line ]]; then flag "--$line"; fi
  done <"$1"
}

# COMMANDS WORD ...: notes COMMAND and, from behind `--`, TRAIN; applies the flags, of files first.
parse() {
  local known=$1 word words=()
  shift
  COMMAND=${1-}
  case $COMMAND in -h | --help) usage && exit 0 ;; esac
  [[ $COMMAND && " $known " == *" $COMMAND "* ]] || bad "no command${COMMAND:+ $COMMAND}; one of: $known"
  shift
  while (($#)); do
    word=$1
    shift
    case $word in
      -h | --help) usage && exit 0 ;;
      --) TRAIN=("$@") && break ;;
      --env_file=*) flags_of "${word#*=}" ;;
      *) words+=("$word") ;;
    esac
  done
  for word in "${words[@]+"${words[@]}"}"; do flag "$word"; done
}

# Checks the training arguments, adds --distributed, and notes the workdir.
check_train() {
  local word config=''
  WORKDIR=''
  for word in "$@"; do
    case $word in
      --config=*) config=${word#*=} ;;
      --workdir=*) WORKDIR=${word#*=} ;;
      --distributed) bad '--distributed is added by itself; leave it out' ;;
      *$'\n'*) bad 'a training argument has a line break' ;;
    esac
  done
  [[ $config ]] || bad 'training arguments are missing: -- --config=... --workdir=...'
  [[ $WORKDIR ]] || bad 'the training arguments have no --workdir=...'
  TRAIN+=(--distributed)
}
