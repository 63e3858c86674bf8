"""The files around the weights of a Hugging Face folder, and the folder's appearing as a whole.

Both generations of keys are written, so that transformers 4 and 5 read the same model. Beside a
SentencePiece model a `tokenizer.json` is generated: transformers 5 reads `tokenizer.model` alone
without the dummy prefix, and so gets other ids. A tokenizer that came as JSON goes as it came.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.chat import CHAT_TEMPLATE
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import FILE_NAME, SentencePieceTokenizer, Tokenizer
from zephyr_jax.weights.safetensors import ADAPTER_CONFIG, INDEX, write_atomically

# What a caller may tell the model card; every field is optional.
CARD_FIELDS = {
    "name": "title; the folder's name where it is absent",
    "summary": "a paragraph",
    "license": "identifier of the Hugging Face hub",
    "language": "list of language codes",
    "base_model": "hub id, or a list of them",
    "datasets": "list of hub ids",
    "tags": "list, beside our own",
    "recipe": "nested dict: the run's configuration",
    "data": "dict: data set -> digest",
    "metrics": "dict: metric -> number",
    "lineage": "list of lines: what this model was made from, oldest first",
}
_FRONT = ("license", "language", "base_model", "datasets")
_WRITTEN = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
_WRITTEN |= {FILE_NAME, "special_tokens_map.json", "chat_template.jinja", "README.md", INDEX}
_WRITTEN |= {ADAPTER_CONFIG}


def write_files(
    folder: Path, cfg: MistralConfig, tok: Tokenizer, dtype: str, card: dict[str, Any], name: str
) -> None:
    """Writes everything of an export but the weights.

    Raises:
        ValueError: if the tokenizer is not that of the model, or the card has unknown fields.
    """
    check_tokenizer(cfg, tok)
    written = {
        "config.json": config_json(cfg, dtype),
        "generation_config.json": _generation_config(cfg, tok),
    }
    if isinstance(tok, SentencePieceTokenizer):
        written |= {
            "tokenizer.json": tokenizer_json(tok),
            "tokenizer_config.json": _tokenizer_config(cfg, tok),
            "special_tokens_map.json": _special_tokens(tok),
        }
        write_atomically(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())
    for file, content in written.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / file, text.encode())
    write_atomically(folder / "README.md", model_card(cfg, dtype, card, name).encode())
    tok.save(folder)


def check_tokenizer(cfg: MistralConfig, tok: Tokenizer) -> None:
    """Raises a ValueError if the tokenizer is not that of the model.

    A model with a tokenizer.json may name several tokens that end a text, of which `cfg` has the
    first, so there each of the model's must only be some special token.
    """
    wanted = (cfg.bos_token_id, cfg.eos_token_id)
    fits = (tok.bos_id, tok.eos_id) == wanted
    if isinstance(tok, JsonTokenizer):
        special = set(tok.specials.values())
        fits = cfg.eos_token_id in special and (tok.bos_id is None or cfg.bos_token_id in special)
    if not fits:
        raise ValueError(
            f"the tokenizer's bos and eos are {tok.bos_id} and {tok.eos_id}, the model's "
            f"{cfg.bos_token_id} and {cfg.eos_token_id}; export with the tokenizer of the training"
        )
    if tok.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tok.vocab_size} pieces, the model vocab_size={cfg.vocab_size}; "
            "export with the tokenizer of the training"
        )


def config_json(cfg: MistralConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json, dtype and RoPE in the keys of both transformers 4 and 5."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    same += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
    same += ("rms_norm_eps", "sliding_window", "tie_word_embeddings", "initializer_range")
    same += ("bos_token_id", "eos_token_id", "rope_theta")
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **{key: getattr(cfg, key) for key in same},
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def tokenizer_json(tok: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of tokenizer.json: the same BPE as the SentencePiece model, as merges.

    SentencePiece joins the pair whose result has the best score, the leftmost among equals;
    `tokenizers` the pair that stands first in the list of merges. Literal specials become tokens
    and every stretch gets its dummy prefix, as `Tokenizer.encode(..., parse_special=True)`.
    """
    specials = sorted(tok.specials.items(), key=lambda item: item[1])
    bos, unk = tok.tokens["bos_token"], tok.tokens["unk_token"]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    a = {"Sequence": {"id": "A", "type_id": 0}}
    b = {"Sequence": {"id": "B", "type_id": 1}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece, **flags, "special": True} for piece, i in specials
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, a],
            "pair": [first, a, second, b],
            "special_tokens": {bos: {"id": bos, "ids": [tok.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {tok.piece(i): i for i in range(tok.vocab_size)},
            "merges": _merges(tok),
        },
    }


def _merges(tok: SentencePieceTokenizer) -> list[list[str]]:
    pieces = tok.merge_pieces()
    merges = []
    for piece, (i, score) in pieces.items():
        before = len(merges)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                # The id decides among the runs of blanks, which share one score in Mistral's model.
                merges.append((-score, i, pieces[left][0], pieces[right][0], left, right))
        if len(piece) > 1 and len(merges) == before:
            raise ValueError(
                f"piece {i} ({piece!r}) of the tokenizer is no merge of two others (a user-defined "
                "symbol?), so tokenizer.json cannot express it; train the tokenizer without it"
            )
    return [[left, right] for *_, left, right in sorted(merges)]


def _special_tokens(tok: SentencePieceTokenizer) -> dict[str, str]:
    # The unknown token pads: byte fallback never produces it, so masking padding by its id hides
    # no text, whereas with eos as padding the end of every answer would be hidden too.
    named = {"bos": tok.bos_id, "eos": tok.eos_id, "unk": tok.unk_id, "pad": tok.pad_id}
    return {f"{name}_token": tok.piece(i) for name, i in named.items()}


def _tokenizer_config(cfg: MistralConfig, tok: SentencePieceTokenizer) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        # Any class named after Llama makes transformers 5 rebuild the tokenizer, and wrongly.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": cfg.max_position_embeddings,
        "padding_side": "left",
        **_special_tokens(tok),
        "added_tokens_decoder": {
            str(i): {"content": piece, **flags, "special": True}
            for piece, i in tok.specials.items()
        },
        "chat_template": CHAT_TEMPLATE,
    }


def _generation_config(cfg: MistralConfig, tok: Tokenizer) -> dict[str, Any]:
    ends = list(dict.fromkeys((tok.eos_id, cfg.eos_token_id)))
    return {
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tok.pad_id,
    }


def model_card(cfg: MistralConfig, dtype: str, card: Mapping[str, Any], name: str) -> str:
    """The text of README.md: YAML front matter, use, and what `card` tells (CARD_FIELDS).

    Raises:
        ValueError: if `card` has a field that is not in CARD_FIELDS.
    """
    unknown = sorted(set(card) - set(CARD_FIELDS))
    if unknown:
        raise ValueError(
            f"unknown fields of the model card: {', '.join(unknown)}; it has "
            f"{', '.join(CARD_FIELDS)}"
        )
    front = {key: card[key] for key in _FRONT if card.get(key)}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["zephyr_jax", "mistral", *card.get("tags", ())]
    lines = ["---"]
    # JSON is YAML, which spares the rules of quoting.
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    title = card.get("name") or name
    window = cfg.sliding_window
    seen = "the whole text" if window is None else f"the last {window} tokens (sliding window)"
    lines += ["---", "", f"# {title}", ""]
    lines += [card["summary"], ""] if card.get("summary") else []
    lines += [
        f"A Mistral model of {cfg.num_hidden_layers} layers and width {cfg.hidden_size}, weights "
        f"in {dtype}, positions up to {cfg.max_position_embeddings}; a token sees {seen}.",
        "Trained and exported by zephyr_jax.",
        *_USE,
    ]
    for heading, key, render in (
        ("Lineage", "lineage", lambda value: [f"{i}. {line}" for i, line in enumerate(value, 1)]),
        ("Metrics", "metrics", lambda value: _table("metric", "value", value)),
        ("Data", "data", lambda value: _table("data set", "digest", value)),
        ("Recipe", "recipe", lambda value: ["```json", json.dumps(value, indent=2), "```"]),
    ):
        lines += ["", f"## {heading}", "", *render(card[key])] if card.get(key) else []
    return "\n".join(lines) + "\n"


_USE = (
    "",
    "## Use",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
    ")",
    "answer = model.generate(**inputs, max_new_tokens=256)",
    'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    "```",
    "",
    "The chat template writes special tokens such as `<s>` itself: tokenize its text with",
    "`add_special_tokens=False`. A literal special token (`</s>`) in a message becomes that token",
    "here, as with every Hugging Face tokenizer; replace it in text from strangers.",
)


def _table(left: str, right: str, values: Mapping[str, Any]) -> list[str]:
    return [f"| {left} | {right} |", "|---|---|", *(f"| {k} | {v} |" for k, v in values.items())]


@contextlib.contextmanager
def new_export(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends without an error.

    Raises:
        FileExistsError: if there is something at `folder` that is neither empty nor an export
            with nothing added to it.
    """
    folder = Path(folder).resolve()  # a link stays, and what it points to is replaced
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        check_replaceable(folder)
        if folder.exists():
            os.rename(folder, replaced)
        try:
            os.rename(temporary, folder)
        except OSError:
            if replaced.exists():
                os.rename(replaced, folder)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raises a FileExistsError where something stands that an export must not replace."""
    if not folder.exists():
        return
    files = list(folder.iterdir()) if folder.is_dir() else [folder]
    if not files:
        return
    weights = [f for f in files if f.suffix == ".safetensors"]
    foreign = sorted(f.name for f in files if f.name not in _WRITTEN and f not in weights)
    if foreign or not weights or not all(map(_is_ours, weights)):
        why = f"it holds {foreign[0]}" if foreign else "its weights were not written by zephyr_jax"
        raise FileExistsError(
            f"{folder} exists and is not an export of zephyr_jax ({why}); name another folder or "
            "move it away"
        )


def _is_ours(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("writer") == "zephyr_jax"
    except safetensors.SafetensorError:
        return False
