# shellcheck shell=bash disable=SC2153,SC2154
# slice.sh supervise: what all hosts report, and what follows from it; sourced by slice.sh.

node_state() { state tpu-vm describe "$1" --format='value(state)'; }

# Whether machines are certainly gone.
lost() {
  local node
  case $(request_state) in
    SUSPENDING | SUSPENDED | FAILED | DELETING | ABSENT) return 0 ;;
    ACTIVE) ;;
    *) return 1 ;; # the request still waits for its machines, or the question failed
  esac
  for node in $(nodes); do
    case $(node_state "$node") in
      PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | ABSENT) return 0 ;;
    esac
  done
  return 1
}

# A request that is still suspending cannot be deleted yet.
delete_surely() {
  local tries
  for ((tries = 0; tries < 20; tries++)); do
    if [[ $(request_state) == ABSENT ]] || delete; then return 0; fi
    sleep "$POLL"
  done
  fail "$NAME cannot be deleted; see: gcloud compute tpus queued-resources describe $NAME"
}

# One word for all hosts: running, done, again, parted, failed N, or unknown if they do not answer.
# If one host was lost the others end with any status; that is no failure of the training, nor is a
# process that was killed or hangs while others say that they miss it (parted).
verdict() {
  local lines
  lines=$(on_hosts status 2>/dev/null) || lines=''
  awk -v again="$EXIT_AGAIN" -v parted="$EXIT_PARTED" '
    { sub(/\r$/, "") }
    !sub(/^.*zephyr-host /, "") { next }
    { hosts++ }
    $2 == "running" { running++ }
    $2 == "none" || $2 == "lost" { lost++ }
    $2 == "exited" && $3 == again { stopped++ }
    $2 == "exited" && ($3 == parted || $3 == 134) { missing++ } # JAX aborts where it is first
    $2 == "exited" && $3 > 128 { killed = $3; next }
    $2 == "exited" && $3 != again && $3 != parted && $3 != 0 { failed = $3 }
    END {
      if (killed && !missing) failed = killed
      if (!hosts) print "unknown"
      else if (failed && !lost) print "failed " failed
      else if (missing && !lost) print "parted"
      else if (running) print "running"
      else if (lost || stopped) print "again"
      else print "done"
    }' <<<"$lines"
}

# Whether the run's heartbeat has been the same for --hung_after seconds of this machine's clock. A
# bucket that does not answer is no evidence of a hang.
hung() {
  local beat
  if ((HUNG_AFTER == 0)); then return 1; fi
  if ! beat=$(gcloud storage cat "$WORKDIR/heartbeat.json" 2>&1); then
    [[ $beat == *NOT_FOUND* || $beat == *'matched no objects'* ]] || return 1
    beat=none # before the first step
  fi
  if [[ $beat != "$BEAT" ]]; then BEAT=$beat BEAT_AT=$SECONDS; fi
  ((SECONDS - BEAT_AT >= HUNG_AFTER))
}

# From any state to machines that are set up.
bring_up() {
  if lost; then
    delete_surely
    request || return 1
  fi
  wait_active && setup
}

# Starts the training, on new machines if the argument is `new` or the old ones do not answer.
launch() {
  local machines=$1 failures=0
  until { [[ $machines == old ]] || bring_up; } && start; do
    machines=new
    failures=$((failures + 1))
    if ((failures == 5)); then fail "five times in a row $NAME could not be started"; fi
    sleep "$POLL"
  done
}

supervise_plan() {
  local node
  echo "# first, and after a preemption; after status $EXIT_AGAIN with machines only the last"
  delete && request && wait_active && setup && start
  echo "# every $POLL s"
  request_state
  for node in $(nodes); do node_state "$node"; done
  on_hosts status
  if ((HUNG_AFTER)); then
    run gcloud storage cat "$WORKDIR/heartbeat.json"
    echo "# if that stays the same for $HUNG_AFTER s"
    on_hosts stop
  fi
  echo '# after any other status, and then stop'
  on_hosts log "$LOG_LINES"
  if [[ $DELETE_WHEN_DONE ]]; then echo '# after status 0' && delete; fi
}

supervise() {
  local now silent=0 restarts=0
  BEAT='' BEAT_AT=$SECONDS
  [[ $WORKDIR == gs://* ]] || bad "--workdir=$WORKDIR goes with its machine; supervise needs gs://..."
  if [[ $DRY_RUN ]]; then
    supervise_plan
    return
  fi
  if lost || [[ $(request_state) != ACTIVE || $(verdict) != running ]]; then launch new; fi
  while true; do
    sleep "$POLL"
    if lost; then now=gone; else now=$(verdict); fi
    if [[ $now == unknown ]]; then
      silent=$((silent + 1))
      if ((silent > 20)); then fail "the hosts of $NAME do not answer; it still exists and costs"; fi
      continue
    fi
    silent=0
    if [[ $now == "done" ]]; then break; fi
    if [[ $now == running ]]; then
      if hung; then
        say "heartbeat.json has not changed for $HUNG_AFTER s (--hung_after): killing the training"
        on_hosts stop || true # a killed training is lost, which the next look sees
        BEAT_AT=$SECONDS
      fi
      continue
    fi
    # machines that are being taken away end a training before their own state says so
    if [[ $now != gone ]] && sleep "$GRACE" && lost; then now=gone; fi
    if [[ $now == parted ]]; then now=$(verdict); fi # the cause may be there only now
    if [[ $now == failed* ]]; then
      on_hosts log "$LOG_LINES" || true
      say "the training ended with status ${now#* }; $NAME still exists and costs"
      exit "${now#* }"
    fi
    restarts=$((restarts + 1))
    if ((restarts > MAX_RESTARTS)); then
      fail "restarted $MAX_RESTARTS times (--max_restarts); $NAME may still exist and cost"
    fi
    say "restart $restarts: $now"
    if [[ $now == parted ]]; then on_hosts stop || true; fi # one that hangs
    if [[ $now == gone ]]; then launch new; else launch old; fi
    BEAT_AT=$SECONDS
  done
  say "the training is done"
  if [[ $DELETE_WHEN_DONE ]]; then
    delete_surely
  else
    say "$NAME still exists and costs; slice.sh delete ends that"
  fi
}
