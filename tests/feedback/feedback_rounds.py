"""Small rounds of feedback against a server on loopback that answers and judges by a rule."""

import json
import re
from pathlib import Path
from typing import Any

from raw_rows import write

from zephyr_jax.config import build
from zephyr_jax.feedback.config import FeedbackConfig

MODELS = ("a", "bb", "ccc", "dddd")


def by_length(answer: str) -> int:
    """A rating from 1 to 5 that depends on the answer alone."""
    return 1 + len(answer.strip()) % 5


def scripted(fault: Any = lambda n, request: None) -> Any:
    """What `judge_server` replies: an answer, ratings by length, or what the fault is instead."""

    def reply(request: dict[str, Any], n: int) -> Any:
        sent = fault(n, request)
        return _text(request) if sent is None else sent

    return reply


def _text(request: dict[str, Any]) -> str:
    system, *_ = [m["content"] for m in request["messages"] if m["role"] == "system"] or [""]
    user = next(m["content"] for m in request["messages"] if m["role"] == "user")
    if "You rate" not in system:
        return f"{request['model']} says {user} {'long ' * (len(request['model']) % 5)}"
    _, *answers = re.split(r"\n\n\[Answer \d+\]\n", user)
    scale = 2 if "to 10" in system else 1
    entries = [
        {"answer": i, "rationale": "Because.", "rating": str(scale * by_length(answer))}
        for i, answer in enumerate(answers, 1)
    ]
    if request.get("response_format"):
        return json.dumps({"ratings": entries})
    lines = "Answer {answer}\nRating: {rating}\nRationale: {rationale}"
    return "\n\n".join(lines.format(**entry) for entry in entries)


def write_prompts(folder: Path, n: int) -> Path:
    """`n` prompts, then an empty one, one again, and two rows without any."""
    lines = [{"prompt": f"Question {i}, is it {'x' * i}?"} for i in range(n)]
    lines += [{"prompt": " "}, lines[0], {"prompt": ["not", "text"]}, {"prompt": "half \ud800"}]
    return write(folder / "prompts.jsonl", lines)


def round_of(url: str, prompts: Path, **changes: Any) -> FeedbackConfig:
    """Four endpoint models on these prompts, judged there too."""
    return build(FeedbackConfig, tree_of(url, prompts, **changes))


def words_of(url: str, prompts: Path, folder: Path, **changes: Any) -> list[str]:
    """The same as a command."""
    fields = tree_of(url, prompts, **changes).items()
    words = ["collect_feedback", "--config=feedback_on_policy", f"--workdir={folder}"]
    return [*words, *(f"--config.{name}={value!r}" for name, value in fields)]


def tree_of(url: str, prompts: Path, **changes: Any) -> dict[str, Any]:
    """Its fields; contestants, and a judge with a kind, change as a whole."""
    tree: dict[str, Any] = {
        "seed": 3,
        "name": "round",
        "prompts": {"source": str(prompts)},
        "endpoints": {"server": {"url": url, "retries": 1, "timeout": 5.0, "concurrency": 4}},
        "contestants": {name: {"endpoint": "server", "model": name} for name in MODELS},
        "judge": {"kind": "endpoint", "endpoint": "server", "model": "judge"},
    }
    for name, value in changes.items():
        if name == "endpoint":
            tree["endpoints"]["server"] |= value
        elif name == "contestants" or not isinstance(value, dict) or "kind" in value:
            tree[name] = value
        else:
            tree[name] = tree.get(name, {}) | value
    return tree


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
