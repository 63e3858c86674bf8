"""AI feedback: models answer prompts, a judge rates the answers, and the result becomes pairs.

  collect_feedback.py --config=FILE                 answers and ratings, in UltraFeedback's schema
  collect_feedback.py report [RATED] --workdir=DIR  what the judge is worth, by RATED rows too

A round that was stopped goes on where it was, and nothing is asked twice. Status 75 says that a
limit stopped it. Then: prepare_data.py ultrafeedback --source=DIR/ultrafeedback.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from etils import epath

from zephyr_jax.cli import flags
from zephyr_jax.config import build, read_file
from zephyr_jax.distributed import STOPPED
from zephyr_jax.evaluation.endpoints import CapReached, Spending
from zephyr_jax.feedback.collect import collect, estimate
from zephyr_jax.feedback.config import FeedbackConfig
from zephyr_jax.feedback.quality import MEASURES, judge_quality
from zephyr_jax.reports.page import Page, percent
from zephyr_jax.reports.plots import Histogram
from zephyr_jax.storage import write_atomic

_LEAD = """Shares are over pairs of answers to one prompt that the judge rates differently; an \
interval holds 95% of bootstrap samples over prompts. A small round may hide a fault."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", nargs="?", choices=("collect", "report"), default="collect", help="what to do")
    add("recorded", nargs="?", default="", help="report: rated rows to hold the judge against")
    flags.add_config(parser, "config file of the round, or a recipe's name", required=False)
    flags.add_workdir(parser, "folder of the round (default: feedback/NAME)")
    add("--max_requests", type=flags.at_least(0), default=0, help="stop after so many; 0: no limit")
    add("--max_cost", type=float, default=0.0, help="stop at so many dollars; 0: no limit")
    planned = "print how many requests, tokens and dollars it would take, and ask nothing"
    add("--dry_run", action="store_true", help=planned)


def run(args: argparse.Namespace) -> None:
    of_collect = ("config", "overrides", "max_requests", "max_cost", "dry_run")
    foreign = of_collect if args.action == "report" else ("recorded",)
    if unused := [name for name in foreign if getattr(args, name)]:
        raise ValueError(f"{unused[0]} has no effect on {args.action}; leave it out")
    if not args.max_cost >= 0:
        raise ValueError(f"--max_cost={args.max_cost} must be 0 or more dollars")
    if args.action == "report":
        if not args.workdir:
            raise ValueError("report needs --workdir=DIR, the folder of a collected round")
        _report(Path(args.workdir), args.recorded)
        return
    if not args.config:
        raise ValueError("--config is missing; name a file, such as configs/feedback_on_policy.py")
    config = build(FeedbackConfig, read_file(args.config, args.overrides))
    folder = Path(args.workdir or Path("feedback") / config.name)
    if args.dry_run:
        sys.stdout.write(json.dumps(estimate(config), indent=1) + "\n")
        return
    spending = Spending(args.max_requests, args.max_cost)
    try:
        with flags.all_devices(1, 1):
            rows = collect(config, folder, spending)
    except (CapReached, KeyboardInterrupt) as error:
        reason = error if isinstance(error, CapReached) else "stopped by the keyboard"
        sys.stderr.write(f"{reason} after {spending}; the same command goes on from there\n")
        raise SystemExit(STOPPED) from None
    account = json.loads((folder / "account.json").read_text("utf-8"))
    lines = [f"{account['rows']} rows in {rows} ({spending} in this call)"]
    for name, counts in (account["answers"] | {"judge": account["judgements"]}).items():
        lines.append(f"  {name}: {', '.join(f'{kind} {n:,}' for kind, n in counts.items())}")
    sys.stdout.write("\n".join([*lines, f"next: prepare_data.py ultrafeedback --source={rows}\n"]))


def _report(folder: Path, recorded: str) -> None:
    quality, drawn = judge_quality(folder, recorded)
    page = Page("What the judge is worth")
    page.text(_LEAD)
    for finding in quality["findings"]:
        page.text(finding, "warning")
    counts = f"{quality['judgements']:,} judgements, {quality['unreadable']:,} of them unreadable."
    page.text(counts, "soft")
    for form, measures in quality["forms"].items():
        rows = []
        for name, one in measures.items():
            shown = "{:.3f}".format if name == "spearman" else percent  # the others are shares
            cells = [shown(one["value"]), f"{shown(one['low'])} to {shown(one['high'])}"]
            rows.append([MEASURES[name], *cells, f"{one['n']:,}"])
        page.heading(form.replace("_", " "), 3)
        page.table(["measure", "value", "95% interval", "n"], rows, 1)
        plots = [(title, values) for title, values in drawn[form].items() if len(values)]
        page.figures([Histogram(title, "rating", "answers", {"": x}) for title, x in plots])
    page.write(epath.Path(folder) / "judge.html")
    write_atomic(folder / "judge.json", json.dumps(quality, indent=1))
    found = quality["findings"] or ["no fault that these judgements could prove"]
    sys.stdout.write("\n".join([*found, f"numbers: {folder / 'judge.html'}", ""]))
