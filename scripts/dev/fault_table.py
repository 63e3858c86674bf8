"""Writes the table of docs/reliability.md from what the tests of faults measured.

python scripts/dev/fault_table.py RESULTS.xml...     (`make faults` runs both)

A test that passed and recorded a `cell`, which is station, fault and outcome, makes a line.
"""

from __future__ import annotations

import ast
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_MARKS = "<!-- measured -->", "<!-- end of measured -->"


def cells(paths: list[str]) -> list[list[str]]:
    """Station, fault and outcome of each test that passed, the last of those that are the same."""
    found: dict[str, dict[str, str]] = {}
    for case in (case for path in paths for case in ET.parse(path).iter("testcase")):
        if case.find("failure") is None and case.find("error") is None:
            for entry in case.iter("property"):
                station, fault, outcome = ast.literal_eval(entry.attrib["value"])
                found.setdefault(station, {})[fault] = outcome
    return [[station, *cell] for station, own in found.items() for cell in own.items()]


def main() -> None:
    """Replaces what stands between the two marks."""
    rows = [["Station or file", "Fault", "Outcome"], ["---"] * 3, *cells(sys.argv[1:])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    pattern, page = "(?s)(?<={})\n.*(?={})".format(*_MARKS), _PAGE.read_text()
    if not re.search(pattern, page):
        raise ValueError(f"{_PAGE} lacks {' and '.join(_MARKS)}")
    _PAGE.write_text(re.sub(pattern, lambda _: f"\n{table}\n", page))


if __name__ == "__main__":
    main()
