"""Stands in for gcloud, git and uv: writes down each call, and plays one TPU slice.

The folder FAKE_TOOLS holds `calls.jsonl`, `state.json` (request, node) and `events.json`: what the
hosts say at each look, one after the other; `beats.json` likewise holds heartbeats. An event
`preempt` takes the machines away; with `then preempt` behind it the hosts still answer before.
"""

import fcntl
import json
import os
import sys
from pathlib import Path

here = Path(os.environ["FAKE_TOOLS"])
words = [Path(sys.argv[0]).name, *sys.argv[1:]]
lock = (here / "lock").open("w")  # until the process ends: several are called at once
fcntl.flock(lock, fcntl.LOCK_EX)
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(words) + "\n")
state_path, events_path = here / "state.json", here / "events.json"
state = {"request": "ABSENT", "node": "ABSENT"}
if state_path.exists():
    state = json.loads(state_path.read_text())


def answer(text: str, code: int = 0) -> None:
    state_path.write_text(json.dumps(state))
    print(text, file=sys.stderr if code else sys.stdout)
    sys.exit(code)


def look() -> None:
    events = json.loads(events_path.read_text())
    event = events.pop(0) if len(events) > 1 else events[0]
    events_path.write_text(json.dumps(events))
    said, _, taken = event.partition("then ")
    if event == "preempt" or taken:
        state["node"] = "PREEMPTED"
    if event in ("preempt", "silent"):
        answer("ERROR: connection refused", 255)
    lines = [f"zephyr-host host-{i} {line.strip()}" for i, line in enumerate(said.split("|"))]
    answer("\n".join(lines))


if words[0] == "gcloud":
    if words[1:3] == ["storage", "cat"]:
        beats = json.loads((here / "beats.json").read_text())
        beat = beats.pop(0) if len(beats) > 1 else beats[0]
        (here / "beats.json").write_text(json.dumps(beats))
        answer(beat, beat.startswith("ERROR"))
    group, verb = words[3], words[4]
    command = next((word for word in words if word.startswith("--command=")), "")
    if verb == "create":
        state = {"request": "PROVISIONING", "node": "READY"}
        answer("")
    if verb == "delete":
        state = {"request": "ABSENT", "node": "ABSENT"}
        answer("")
    if verb == "describe":
        now = state["request" if group == "queued-resources" else "node"]
        if now == "ABSENT":
            answer("ERROR: (gcloud) NOT_FOUND: Resource was not found", 1)
        if now == "PROVISIONING":
            state["request"] = "ACTIVE"
        answer(now)
    if command.endswith(" status"):
        look()
    if " log " in command:
        answer("the end of the log")
