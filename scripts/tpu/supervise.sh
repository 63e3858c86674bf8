# shellcheck shell=bash disable=SC2153,SC2154
# slice.sh's supervise: what all hosts say, and what follows from it; sourced, not run.

# One word for all hosts: running, done, again, failed N, or unknown where they do not answer. Where
# one host was lost the others end with whatever status; that is no failure of the training.
verdict() {
  local said
  said=$(on_hosts status 2>/dev/null) || said=''
  awk -v again="$EXIT_AGAIN" '
    { sub(/\r$/, "") }
    !sub(/^.*zephyr-host /, "") { next }
    { hosts++ }
    $2 == "running" { running++ }
    $2 == "none" || $2 == "lost" { lost++ }
    $2 == "exited" && $3 == again { stopped++ }
    $2 == "exited" && $3 != again && $3 != 0 { failed = $3 }
    END {
      if (!hosts) print "unknown"
      else if (failed && !lost) print "failed " failed
      else if (running) print "running"
      else if (lost || stopped) print "again"
      else print "done"
    }' <<<"$said"
}

# Whether the run's heartbeat has been the same for --hung_after seconds of this machine's clock. A
# bucket that does not answer says nothing new, but nothing of a hang either.
hung() {
  local beat
  if ((HUNG_AFTER == 0)); then return 1; fi
  if ! beat=$(gcloud storage cat "$WORKDIR/heartbeat.json" 2>&1); then
    [[ $beat == *NOT_FOUND* || $beat == *'matched no objects'* ]] || return 1
    beat=none # before the first step
  fi
  if [[ $beat != "$BEAT" ]]; then
    BEAT=$beat BEAT_AT=$SECONDS
  fi
  ((SECONDS - BEAT_AT >= HUNG_AFTER))
}

again() {
  BEAT_AT=$SECONDS
  RESTARTS=$((RESTARTS + 1))
  if ((RESTARTS > MAX_RESTARTS)); then
    fail "started again $MAX_RESTARTS times (--max_restarts); $NAME may still be there and cost"
  fi
}

# From whatever there is to machines that are set up.
bring_up() {
  if lost; then
    delete_surely
    request || return 1
  fi
  wait_active && setup
}

# Starts, on new machines where the argument says so or the old ones do not answer.
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
  echo '# first'
  request_state
  request
  wait_active
  setup
  start
  echo "# every $POLL s"
  request_state
  local node
  for node in $(nodes); do node_state "$node"; done
  on_hosts status
  if ((HUNG_AFTER)); then
    run gcloud storage cat "$WORKDIR/heartbeat.json"
    echo "# where that stays the same for $HUNG_AFTER s"
    on_hosts stop
  fi
  echo "# after a preemption (machines gone); after status $EXIT_AGAIN with machines only the last"
  delete
  request
  wait_active
  setup
  start
  echo '# after any other status, and then stop'
  on_hosts log "$LINES_SHOWN"
  if [[ $DELETE_WHEN_DONE ]]; then
    echo '# after status 0'
    delete
  fi
}

supervise() {
  local now silent=0
  RESTARTS=0 BEAT='' BEAT_AT=$SECONDS
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
      if ((silent > 20)); then fail "the hosts of $NAME do not answer; it is there and costs"; fi
      continue
    fi
    silent=0
    case $now in
      running)
        if hung; then
          say "heartbeat.json has stood still for $HUNG_AFTER s (--hung_after): killing the training"
          on_hosts stop || true # what is killed is lost, which the next look sees
          BEAT_AT=$SECONDS
        fi
        continue
        ;;
      done) break ;;
      gone) ;;
      *) # machines that are being taken away end a training before their own state says so
        sleep "$GRACE"
        if lost; then now=gone; fi
        ;;
    esac
    if [[ $now == failed* ]]; then
      on_hosts log "$LINES_SHOWN" || true
      say "the training ended with status ${now#* }; $NAME is still there and costs"
      exit "${now#* }"
    fi
    again
    say "start $RESTARTS after the first: $now"
    if [[ $now == gone ]]; then launch new; else launch old; fi
  done
  say "the training is done"
  if [[ $DELETE_WHEN_DONE ]]; then
    delete_surely
  else
    say "$NAME is still there and costs; slice.sh delete ends that"
  fi
}
