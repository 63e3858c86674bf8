"""What an export may replace, the model card that it carries, and its upload to the hub."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import ModelCardData, constants
from huggingface_hub.errors import LocalTokenNotFoundError

from zephyr_jax._version import __version__
from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.data.tokenizer_files import MODEL_NAME
from zephyr_jax.hub import ERRORS, LOGIN, api, one_line, retried
from zephyr_jax.storage import atomic_path, write_atomic
from zephyr_jax.weights.safetensors import ADAPTER_CONFIG, INDEX, SINGLE, WRITER

# The optional fields of a model card. recipe: the run's configuration; data: data set -> digest;
# metrics: metric -> number; lineage: lines, oldest first; base_model and datasets: hub ids.
CARD_FIELDS = ("name", "summary", "license", "language", "base_model", "datasets", "tags")
CARD_FIELDS += ("recipe", "data", "metrics", "lineage")
_FRONT = ("license", "language", "base_model", "datasets")
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
METRICS_NAME = "metrics.json"  # every figure of a run's evaluation; the card has the main ones
_MAIN_FIGURES = 12
_WRITTEN = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
_WRITTEN |= {MODEL_NAME, "special_tokens_map.json", "chat_template.jinja", "README.md", INDEX}
_WRITTEN |= {ADAPTER_CONFIG, METRICS_NAME}
# A metadata key of our own in a GGUF file: what else the configuration says, as JSON.
GGUF_KEY = "zephyr_jax.config"


@contextlib.contextmanager
def new_export(path: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A temporary path, for a folder or a file, that takes the place of `path` at the end.

    After an error nothing is changed. A FileExistsError is as of `check_replaceable`.
    """
    path = Path(path).resolve()  # a link stays, and its target is replaced
    check_replaceable(path, overwrite)
    with atomic_path(path, replace=True) as temporary:
        yield temporary


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Raises a FileExistsError unless `path` is new, or with `overwrite` an export of ours."""
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
    if files and not overwrite:
        raise FileExistsError(f"{path} holds an earlier export; --overwrite replaces it")


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


def write_card(
    folder: Path, card: Mapping[str, Any], name: str, about: str, usage: str, **front: Any
) -> None:
    """Writes README.md, and METRICS_NAME where the card has metrics.

    The page has YAML front matter (`front` and fields of `card`), `about` and `usage`, which are
    Markdown, and the other fields of `card`, which are text and are escaped.
    """
    check_card(card)
    metrics = card.get("metrics") or {}
    if metrics:
        write_atomic(folder / METRICS_NAME, json.dumps(metrics, indent=1) + "\n")
    named = {key: card[key] for key in _FRONT if card.get(key)}
    named["tags"] = ["zephyr_jax", *front.pop("tags"), *card.get("tags", ())]
    fields: dict[str, Any] = {"license": "unknown"} | front | named
    for key, value in fields.items():
        is_list = isinstance(value, list | tuple)
        fields[key] = [*map(_line, value)] if is_list else _line(value)
    matter = ModelCardData(**fields).to_yaml()
    versions = {"zephyr_jax": __version__} | {name: version(name) for name in _PACKAGES}
    main = [key for key in metrics if "source/" not in key][:_MAIN_FIGURES]
    lineage = enumerate(card.get("lineage") or (), 1)
    sections = {
        "Lineage": "\n".join(f"{i}. {_plain(line)}" for i, line in lineage),
        "Metrics": _table("metric", "value", {key: metrics[key] for key in main}),
        "Data": _table("data set", "digest", card.get("data") or {}),
        "Versions": _table("package", "version", versions),
    }
    if len(metrics) > len(main):
        sections["Metrics"] += f"\n\nAll {len(metrics)} figures are in `{METRICS_NAME}`."
    if card.get("recipe"):
        text = json.dumps(card["recipe"], indent=2).replace("`", "\\u0060")
        sections["Recipe"] = f"```json\n{text}\n```"
    lines = ["---", matter, "---", "", f"# {_plain(card.get('name') or name)}", ""]
    lines += [_plain(card["summary"]), ""] if card.get("summary") else []
    lines += [about, "Trained and exported by zephyr_jax.", usage]
    lines += [f"\n## {heading}\n\n{text}" for heading, text in sections.items() if text]
    write_atomic(folder / "README.md", "\n".join(lines) + "\n")


def _plain(text: object) -> str:
    """A text on one line in which no character is Markdown's or HTML's."""
    words = _line(f"{text:.4g}" if isinstance(text, float) else text)
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", words)


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _table(left: str, right: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {_plain(key)} | {_plain(value)} |" for key, value in values.items()]
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


def check_login(name: str) -> None:
    """Raises a ValueError unless `name` can be a repository, and the hub knows the login."""
    if name.count("/") != 1 or "@" in name or name.startswith((".", "/")) or name.endswith("/"):
        raise ValueError(f"{name!r} cannot be pushed to; name it org/name or user/name")
    try:
        retried(api().whoami)
    except LocalTokenNotFoundError as error:
        raise ValueError(f"a push to {name} needs an account: {LOGIN}") from error
    except ERRORS as error:
        raise ValueError(
            f"{constants.ENDPOINT} does not accept the login: {one_line(error)}"
        ) from error


def push(path: Path, name: str, *, private: bool = True) -> str:
    """Uploads an export, a folder or a file, in one commit; returns the address of its page.

    A missing repository is created, `private` or not. Weights of an earlier export that this one
    lacks are deleted; other files stay. If the upload fails (a ValueError), nothing of it shows.
    """
    options: dict[str, Any] = {"commit_message": f"Export by zephyr_jax {__version__}"}
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        options["delete_patterns"] = ["*.safetensors", INDEX]  # those that are not uploaded again

    def upload() -> None:
        api().create_repo(name, private=private, exist_ok=True)
        if path.is_dir():
            api().upload_folder(repo_id=name, folder_path=path, **options)
        else:
            api().upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name, **options)

    try:
        retried(upload)
    except (*ERRORS, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        raise ValueError(
            f"{path} is complete, but its upload to {name} failed: {one_line(cause or error)}; "
            f"`hf upload {name} {path}` repeats the upload alone"
        ) from error
    return f"{constants.ENDPOINT}/{name}"
