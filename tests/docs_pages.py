"""The Markdown of the project taken apart: pages, fenced blocks, links, headings, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^( *)(```+|~~~+)([\w+-]*)\s*$")
_MARK = re.compile(r"^ *<!-- (setup|run|not run)(?:: (.+?))? -->$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
_SNIPPET = re.compile(r'^--8<-- "(.+)"$')


class Block(NamedTuple):
    """A fenced block: its language ("" for none), and the comment right above it."""

    page: Path
    line: int
    language: str
    text: str
    mark: str  # "setup", "run", "not run" or ""
    said: str  # what stands behind the mark

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every Markdown file of the project."""
    found = [*ROOT.glob("*.md")]
    for folder in ("docs", "zephyr_jax", "benchmarks", "notebooks"):
        found += (ROOT / folder).rglob("*.md")
    return sorted(found)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, opened, lines, mark = [], None, [], ("", "")
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if marked := _MARK.match(line):
                mark = marked[1], marked[2] or ""
            elif fence:
                opened, lines = (number, fence), []
            elif line.strip():
                mark = ("", "")
        elif fence and fence[2] == opened[1][2] and not fence[3]:
            indent = len(opened[1][1])
            text = "".join(f"{one[indent:]}\n" for one in lines)
            found.append(Block(page, opened[0], opened[1][3], text, *mark))
            opened, mark = None, ("", "")
        else:
            lines.append(line)
    assert opened is None, f"{page}:{opened[0]} is a block without an end"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks and code spans; what it includes is put in its place."""
    out, fence = [], None
    for line in page.read_text("utf-8").splitlines():
        found = _FENCE.match(line)
        if fence is None and found:
            fence = found[2]
        elif fence and found and found[2] == fence and not found[3]:
            fence = None
        elif fence is None:
            out.append(line)
    return re.sub(r"`[^`\n]*`", "``", "\n".join(out))


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: headings as GitHub and as MkDocs spell them, where alike."""
    found, seen = set(), set()
    text, fenced = page.read_text("utf-8"), False
    for line in text.splitlines():
        if line.startswith("::: "):  # a name of the reference
            found.add(line[4:])
        if _FENCE.match(line):
            fenced = not fenced
        heading = re.match(r"^#+ (.+?)(?: \{#([\w-]+)\})?$", line)
        if fenced or not heading:
            continue
        if heading[2]:
            found.add(heading[2])
            continue
        words = re.sub(r"[`*]", "", heading[1])
        github = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        mkdocs = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())
        if github == mkdocs and github not in seen:
            found.add(github)
        seen.add(github)
    return found


def included(page: Path) -> list[str]:
    """What a page takes from other files: `FILE` or `FILE:SECTION`."""
    return [found[1] for line in page.read_text().splitlines() if (found := _SNIPPET.match(line))]


def commands(block: Block) -> list[list[str]]:
    """The words of every command line of a shell block; lines that go on with a backslash joined.

    Left out are lines that use the shell's own variables, `"${train[@]}"` and the like: what they
    stand for is not known before they run.
    """
    found = []
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", block.text, flags=re.DOTALL)  # given to stdin
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip() and "${" not in line:
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # an array or a string over several lines
                continue
            found += _apart(words)
    return found


def _apart(words: list[str]) -> list[list[str]]:
    """A line's commands, at `&&`, `;`, `|` and `&`, without what goes to files."""
    found: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", ";", "|", "&", ">", ">>"):
            found.append([] if word[0] != ">" else ["cat"])
        else:
            found[-1].append(word)
    return [command for command in found if command]
