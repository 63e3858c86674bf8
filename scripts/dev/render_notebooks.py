"""Runs notebooks and stores their outputs for the site: render_notebooks.py [NAME ...].

Needs the extra `notebooks`. Printed lines go to notebooks/outputs/NAME.json, figures to PNG files
of a few colors next to it. To be run again whenever a notebook's code changes.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from site_pages import NOTEBOOKS, OUTPUTS, ROOT, code_digest, notebook_cells

_LINES, _WIDTH = 40, 160  # of a cell's printed output that are kept
_COLORS = 64


def render(name: str) -> None:
    """Runs one notebook in a scratch folder and replaces its outputs."""
    import jupytext  # pyright: ignore[reportMissingImports]
    import nbclient  # pyright: ignore[reportMissingImports]

    path = NOTEBOOKS / f"{name}.py"
    notebook = jupytext.read(path)
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(environment, TMPDIR=scratch)
        client = nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3")
        client.execute(cwd=scratch)
    for old in OUTPUTS.glob(f"{name}_*.png"):
        old.unlink()
    assert len(notebook.cells) == len(notebook_cells(path))
    cells, figures = {}, 0
    for number, cell in enumerate(notebook.cells):
        text, pictures = [], []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                figures += 1
                pictures.append(f"{name}_{figures}.png")
                write_figure(base64.b64decode(data["image/png"]), OUTPUTS / pictures[-1])
            elif output.get("name") == "stdout":
                text.append(output["text"])
            elif "text/plain" in data:
                text.append(data["text/plain"] + "\n")
        kept = shortened("".join(text).replace(scratch, "/tmp"))
        if kept or pictures:
            cells[str(number)] = {"text": kept, "figures": pictures}
    stored: dict[str, Any] = {"code": code_digest(path), "cells": cells}
    OUTPUTS.mkdir(exist_ok=True)
    file = OUTPUTS / f"{name}.json"
    file.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", "utf-8")


def shortened(text: str) -> str:
    """Printed lines without their ends beyond a width, and at most so many of them."""
    lines = [
        line if len(line) <= _WIDTH else f"{line[:_WIDTH]} …" for line in text.rstrip().splitlines()
    ]
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], f"… {len(lines) - _LINES} more lines"]
    return "\n".join(lines)


def write_figure(png: bytes, path: Path) -> None:
    """Writes a figure with few colors: a third of the size."""
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(_COLORS).save(path, optimize=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or sorted(path.stem for path in NOTEBOOKS.glob("*.py")):
        render(each)
        sys.stdout.write(f"{each}: {OUTPUTS / each}.json\n")
