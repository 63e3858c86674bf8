"""What an export may replace, and the model card that it carries."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.data.tokenizer_files import MODEL_NAME
from zephyr_jax.storage import atomic_path
from zephyr_jax.weights.safetensors import ADAPTER_CONFIG, INDEX, WRITER

# The optional fields of a model card. recipe: the run's configuration; data: data set -> digest;
# metrics: metric -> number; lineage: lines, oldest first; base_model and datasets: hub ids.
CARD_FIELDS = ("name", "summary", "license", "language", "base_model", "datasets", "tags")
CARD_FIELDS += ("recipe", "data", "metrics", "lineage")
_FRONT = ("license", "language", "base_model", "datasets")
_WRITTEN = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
_WRITTEN |= {MODEL_NAME, "special_tokens_map.json", "chat_template.jinja", "README.md", INDEX}
_WRITTEN |= {ADAPTER_CONFIG}
# A metadata key of our own in a GGUF file: what else the configuration says, as JSON.
GGUF_KEY = "zephyr_jax.config"


@contextlib.contextmanager
def new_export(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path, for a folder or a file, that takes the place of `path` at the end.

    After an error nothing is changed. A FileExistsError is as of `check_replaceable`.
    """
    path = Path(path).resolve()  # a link stays, and its target is replaced
    check_replaceable(path)
    with atomic_path(path, replace=True) as temporary:
        yield temporary


def check_replaceable(path: Path) -> None:
    """Raises a FileExistsError for anything but an export of ours, a folder or a GGUF file."""
    if not path.exists():
        return
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    weights = [file for file in files if file.suffix in (".safetensors", ".gguf")]
    ours = [file for file in weights if _is_ours(file)]
    foreign = [file.name for file in files if file.name not in _WRITTEN and file not in ours]
    if files and (foreign or not ours):
        raise FileExistsError(
            f"{path} exists and is not an export of zephyr_jax (it holds "
            f"{(foreign or [files[0].name])[0]}); choose another name or move it away"
        )


def _is_ours(path: Path) -> bool:
    if path.suffix == ".gguf":
        with path.open("rb") as file:
            return GGUF_KEY.encode() in file.read(1 << 20)  # it comes before the vocabulary
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return WRITER.items() <= (file.metadata() or {}).items()
    except safetensors.SafetensorError:
        return False


def check_card(card: Mapping[str, Any]) -> None:
    """Raises a ValueError for a field that is not in CARD_FIELDS."""
    if unknown := sorted(set(card) - set(CARD_FIELDS)):
        raise ValueError(
            f"unknown fields of the model card: {', '.join(unknown)}; it has "
            f"{', '.join(CARD_FIELDS)}"
        )


def render_card(cfg: MistralConfig, dtype: str, card: Mapping[str, Any], name: str) -> str:
    """The text of README.md: YAML front matter, usage, and the fields of `card`."""
    check_card(card)
    front = {key: card[key] for key in _FRONT if card.get(key)}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["zephyr_jax", "mistral", *card.get("tags", ())]
    window = cfg.sliding_window
    visible = "the whole text" if window is None else f"the last {window} tokens (sliding window)"
    # JSON is YAML, which spares the rules of quoting.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    lines = ["---", *lines, "---", "", f"# {card.get('name') or name}", ""]
    if card.get("summary"):
        lines += [card["summary"], ""]
    lines += [
        f"A Mistral model of {cfg.num_hidden_layers} layers and width {cfg.hidden_size}, weights "
        f"in {dtype}, positions up to {cfg.max_position_embeddings}; a token sees {visible}.",
        "Trained and exported by zephyr_jax.",
        _USAGE,
    ]
    sections = {
        "Lineage": numbered(card.get("lineage") or ()),
        "Metrics": _table("metric", "value", card.get("metrics") or {}),
        "Data": _table("data set", "digest", card.get("data") or {}),
    }
    if card.get("recipe"):
        sections["Recipe"] = f"```json\n{json.dumps(card['recipe'], indent=2)}\n```"
    lines += [f"\n## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n".join(lines) + "\n"


_USAGE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The chat template writes special tokens such as `<s>` itself: tokenize its text with
`add_special_tokens=False`. A literal special token (`</s>`) in a message becomes that token
here, as with every Hugging Face tokenizer; replace it in untrusted text."""


def numbered(lines: Iterable[str]) -> str:
    """A numbered list in Markdown."""
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def _table(left: str, right: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in values.items()]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *rows]) if rows else ""


def export_problems(cfg: MistralConfig, tok: Tokenizer) -> dict[str, str]:
    """Format -> why an export of such a model would be refused; its weights are not needed."""
    from zephyr_jax.weights.gguf_tokenizer import add_tokenizer  # which imports this module
    from zephyr_jax.weights.huggingface_files import write_files

    def write_hf() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), cfg, tok, "float32", {}, "name")

    problems = {}
    for name, write in (("hf", write_hf), ("gguf", lambda: add_tokenizer(_Nowhere(), cfg, tok))):
        try:
            write()
        except ValueError as error:
            problems[name] = str(error)
    return problems


class _Nowhere:
    """A GGUF writer that writes nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None
