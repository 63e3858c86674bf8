"""Small rounds of feedback against the scripted server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripted_server import Script

from zephyr_jax.config import build
from zephyr_jax.feedback.config import FeedbackConfig

MODELS = ("a", "bb", "ccc", "dddd")


def by_length(prompt: str, answers: list[str]) -> list[int]:
    """A judge whose ratings depend on the answer alone."""
    return [1 + len(answer.strip()) % 5 for answer in answers]


def write_prompts(folder: Path, n: int) -> Path:
    """`n` prompts, then an empty one, one again, and a row without any."""
    lines = [{"prompt": f"Question {i}, is it {'x' * i}?"} for i in range(n)]
    lines += [{"prompt": " "}, lines[0], {"prompt": ["not", "text"]}]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def round_of(url: str, prompts: Path, **changes: Any) -> FeedbackConfig:
    """Four endpoint models on these prompts, judged there too; contestants change as a whole."""
    tree: dict[str, Any] = {
        "name": "round",
        "seed": 3,
        "prompts": {"source": str(prompts)},
        "endpoints": {"server": {"url": url, "retries": 1, "timeout": 1.0, "concurrency": 4}},
        "contestants": {name: {"endpoint": "server", "model": name} for name in MODELS},
        "judge": {"kind": "endpoint", "endpoint": "server", "model": "judge"},
    }
    for name, value in changes.items():
        whole = name == "contestants" or "kind" in value if isinstance(value, dict) else True
        tree[name] = value if whole else tree.get(name, {}) | value
    return build(FeedbackConfig, tree)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def fair_script(**options: Any) -> Script:
    """A server whose judge rates by the answer alone."""
    return Script(judge=by_length, **options)
