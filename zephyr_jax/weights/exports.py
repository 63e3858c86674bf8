"""Exports: what they may replace, their model card, and the files around Hugging Face weights.

Both generations of keys are written, so that transformers 4 and 5 read the same model. Next to a
SentencePiece model a `tokenizer.json` is generated: some releases of transformers 5 read
`tokenizer.model` alone without the dummy prefix, and so got other ids. A tokenizer that came as
JSON goes as it came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from absl import logging
from huggingface_hub import ModelCardData

from zephyr_jax._version import __version__
from zephyr_jax.chips import check_space
from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.chat import CHAT_TEMPLATE
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.data.tokenizer_files import FLAGS, tokenizer_json
from zephyr_jax.storage import MANIFEST, atomic_path, read_json, seal, write_atomic

# The optional fields of a model card. recipe: the run's configuration; data: data set -> digest;
# metrics: metric -> number; lineage: lines, oldest first; base_model and datasets: hub ids.
CARD_FIELDS = ("name", "summary", "license", "language", "base_model", "datasets", "tags")
CARD_FIELDS += ("recipe", "data", "metrics", "lineage")
_FRONT = ("license", "language", "base_model", "datasets")
METRICS_NAME = "metrics.json"  # every figure of a run's evaluation; the card has the main ones
_MAIN_FIGURES = 12
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
_CARD = "README.md"
# A metadata key of our own in a GGUF file: what else the configuration says, as JSON.
GGUF_KEY = "zephyr_jax.config"


@contextlib.contextmanager
def new_export(path: str | os.PathLike[str], overwrite: bool, needed: int) -> Iterator[Path]:
    """A temporary path, for a folder or a file, that takes the place of `path` at the end.

    After an error nothing is changed. A ValueError says that the disk has no room for `needed`
    bytes. A folder is sealed, but for its README.md.
    """
    check_replaceable(Path(path), overwrite)
    check_space(path, needed)
    with atomic_path(path, replace=True) as temporary:
        yield temporary
        if temporary.is_dir():
            seal(temporary, [name for name in os.listdir(temporary) if name != _CARD])


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Raises a FileExistsError unless `path` is new, or with `overwrite` an export of ours."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir():
        names, ours = sorted(os.listdir(path)), [MANIFEST, _CARD]
        if MANIFEST in names:
            ours += read_json(path / MANIFEST, "choose another name", ["files"])["files"]
        if not any(name.endswith(".safetensors") for name in ours):
            ours = []
        foreign = [name for name in names if name not in ours]
    else:
        with path.open("rb") as file:  # the key comes before the vocabulary
            foreign = [] if GGUF_KEY.encode() in file.read(1 << 20) else [path.name]
    if foreign:
        why = f"{path} exists and is not an export of zephyr_jax (it holds {foreign[0]})"
        raise FileExistsError(f"{why}; choose another name or move it away")
    if not overwrite:
        raise FileExistsError(f"{path} holds an earlier export; --overwrite replaces it")


def check_card(card: Mapping[str, Any]) -> None:
    """Raises a ValueError for a field that is not in CARD_FIELDS."""
    if unknown := ", ".join(sorted(set(card) - set(CARD_FIELDS))):
        known = ", ".join(CARD_FIELDS)
        raise ValueError(f"unknown fields of the model card: {unknown}; it has {known}")


def write_card(
    folder: Path, card: Mapping[str, Any], name: str, about: str, usage: str | None, **front: Any
) -> None:
    """Writes README.md by `card.txt`, and METRICS_NAME where the card has metrics.

    `front` and fields of `card` are its YAML front matter, `about` and `usage` (None: that of a
    whole model) are Markdown, and the other fields of `card` are text, which is escaped.
    """
    check_card(card)
    metrics = card.get("metrics") or {}
    if metrics:
        write_atomic(folder / METRICS_NAME, json.dumps(metrics, indent=1) + "\n")
    named = {key: card[key] for key in _FRONT if card.get(key)}
    named["tags"] = ["zephyr_jax", *front.pop("tags"), *card.get("tags", ())]
    fields: dict[str, Any] = {"license": "unknown"} | front | named
    for key, value in fields.items():
        fields[key] = [*map(_line, value)] if isinstance(value, list | tuple) else _line(value)
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.filters["plain"] = plain
    text = environment.from_string((Path(__file__).parent / "card.txt").read_text("utf-8")).render(
        matter=ModelCardData(**fields).to_yaml(),
        title=card.get("name") or name,
        card=card,
        about=about,
        usage=usage,
        version=__version__,
        packages=", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        figures=[key for key in metrics if "source/" not in key][:_MAIN_FIGURES],
        metrics_file=METRICS_NAME,
        recipe=json.dumps(card.get("recipe"), indent=2).replace("`", "\\u0060"),
    )
    write_atomic(folder / _CARD, text)


def plain(text: object) -> str:
    """A text on one line in which no character is Markdown's or HTML's."""
    words = _line(f"{text:.4g}" if isinstance(text, float) else text)
    words = re.sub(r"([\\`*~\[\]<>|&$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", words)
    words = re.sub(r"^([#+=-])(?=[#+=\s-]|$)", r"\\\1", words)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", words)


def _line(text: object) -> str:
    return " ".join(str(text).split())


def write_files(
    folder: Path, cfg: MistralConfig, tok: Tokenizer, dtype: str, card: dict[str, Any], name: str
) -> None:
    """Writes everything of an export but the weights; a ValueError says what does not fit."""
    check_tokenizer(cfg, tok)
    cfg = dataclasses.replace(cfg, eos_token_id=end_ids(cfg, tok))
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": cfg.eos_token_id}
    generation = ids | {"pad_token_id": tok.pad_id}
    files = {"config.json": config_json(cfg, dtype), "generation_config.json": generation}
    write_json(folder, files)
    write_tokenizer(folder, cfg, tok)
    window = cfg.sliding_window
    visible = "the whole text" if window is None else f"the last {window} tokens (sliding window)"
    about = (
        f"A Mistral model of {cfg.num_hidden_layers} layers and width {cfg.hidden_size}, weights "
        f"in {dtype}, positions up to {cfg.max_position_embeddings}; a token sees {visible}."
    )
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    write_card(folder, card, name, about, None, tags=["mistral"], **front)


def write_tokenizer(folder: Path, cfg: MistralConfig, tok: Tokenizer) -> None:
    """Writes the tokenizer with its chat template; a ValueError says that it is not the model's."""
    check_tokenizer(cfg, tok)
    if isinstance(tok, SentencePieceTokenizer):
        files = {
            "tokenizer.json": tokenizer_json(tok.vocabulary, tok.tokens["bos_token"]),
            "tokenizer_config.json": _tokenizer_config(cfg, tok),
            "special_tokens_map.json": tok.tokens,
        }
        write_json(folder, files)
        write_atomic(folder / "chat_template.jinja", CHAT_TEMPLATE)
    tok.save(folder)


def write_json(folder: Path, files: dict[str, Any]) -> None:
    """Writes the contents of files, by their names, as JSON."""
    for file, content in files.items():
        write_atomic(folder / file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def end_ids(cfg: MistralConfig, tok: Tokenizer) -> tuple[int, ...]:
    """The ids of every token that ends a text: the tokenizer's, then the others of the model."""
    return tuple(dict.fromkeys((tok.eos_id, *cfg.end_ids)))


def check_tokenizer(cfg: MistralConfig, tok: Tokenizer) -> None:
    """Raises a ValueError if the tokenizer is not that of the model.

    A tokenizer.json may name another end than the model, one of whose ends must then be special.
    """
    ends = {tok.eos_id}
    fits = tok.bos_id == cfg.bos_token_id
    if isinstance(tok, JsonTokenizer):
        ends |= set(tok.specials.values())
        fits = tok.bos_id is None or cfg.bos_token_id in tok.specials.values()
    fits = fits and (not cfg.end_ids or bool(ends.intersection(cfg.end_ids)))
    if not fits or tok.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tok.vocab_size} tokens, bos {tok.bos_id} and eos {tok.eos_id}, "
            f"the model vocab_size={cfg.vocab_size}, {cfg.bos_token_id} and {cfg.eos_token_id}; "
            "export with the tokenizer of the training"
        )


def config_json(cfg: MistralConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json, dtype and RoPE in the keys of both transformers 4 and 5."""
    kind: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    kind |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True}
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    fields = {**dataclasses.asdict(cfg), "rope_parameters": rope}
    return kind | fields | {"dtype": dtype, "torch_dtype": dtype}


def _tokenizer_config(cfg: MistralConfig, tok: SentencePieceTokenizer) -> dict[str, Any]:
    return {
        # Any class named after Llama makes transformers 5 rebuild the tokenizer, and wrongly.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": cfg.max_position_embeddings,
        "padding_side": "left",
        # The unknown token pads: byte fallback never produces it, so masking padding by its id
        # hides no text. With eos as padding the end of every answer would be hidden too.
        **tok.tokens,
        "added_tokens_decoder": {
            str(i): {"content": token, **FLAGS, "special": True}
            for token, i in tok.specials.items()
        },
        "chat_template": CHAT_TEMPLATE,
    }


def check_exportable(cfg: MistralConfig, tok: Tokenizer) -> None:
    """Raises a ValueError where an export would be refused; of one to GGUF it is logged why."""
    import gguf  # which is slow to import

    from zephyr_jax.weights.gguf import add_tokenizer  # which imports this module

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), cfg, tok)
    try:
        add_tokenizer(gguf.GGUFWriter(None, "llama"), cfg, tok)  # without a path it only collects
    except ValueError as error:
        logging.warning("what this run trains cannot become a GGUF file: %s", error)
