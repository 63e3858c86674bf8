"""The files around the weights of a Hugging Face folder.

Both generations of keys are written, so that transformers 4 and 5 read the same model. Next to a
SentencePiece model a `tokenizer.json` is generated: some releases of transformers 5 read
`tokenizer.model` alone without the dummy prefix, and so got other ids. A tokenizer that came as
JSON goes as it came.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.chat_template import CHAT_TEMPLATE
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.data.tokenizer_files import FLAGS, tokenizer_json
from zephyr_jax.storage import write_atomic
from zephyr_jax.weights.exports import write_card

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


def write_files(
    folder: Path, cfg: MistralConfig, tok: Tokenizer, dtype: str, card: dict[str, Any], name: str
) -> None:
    """Writes everything of an export but the weights; a ValueError says what does not fit."""
    check_tokenizer(cfg, tok)
    cfg = dataclasses.replace(cfg, eos_token_id=end_ids(cfg, tok))
    files = {
        "config.json": config_json(cfg, dtype),
        "generation_config.json": {
            "bos_token_id": cfg.bos_token_id,
            "eos_token_id": cfg.eos_token_id,
            "pad_token_id": tok.pad_id,
        },
    }
    _write_json(folder, files)
    write_tokenizer(folder, cfg, tok)
    window = cfg.sliding_window
    visible = "the whole text" if window is None else f"the last {window} tokens (sliding window)"
    about = (
        f"A Mistral model of {cfg.num_hidden_layers} layers and width {cfg.hidden_size}, weights "
        f"in {dtype}, positions up to {cfg.max_position_embeddings}; a token sees {visible}."
    )
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    write_card(folder, card, name, about, _USAGE, tags=["mistral"], **front)


def write_tokenizer(folder: Path, cfg: MistralConfig, tok: Tokenizer) -> None:
    """Writes the tokenizer with its chat template; a ValueError says that it is not the model's."""
    check_tokenizer(cfg, tok)
    if isinstance(tok, SentencePieceTokenizer):
        files = {
            "tokenizer.json": tokenizer_json(tok.vocabulary, tok.tokens["bos_token"]),
            "tokenizer_config.json": _tokenizer_config(cfg, tok),
            "special_tokens_map.json": tok.tokens,
        }
        _write_json(folder, files)
        write_atomic(folder / "chat_template.jinja", CHAT_TEMPLATE)
    tok.save(folder)


def _write_json(folder: Path, files: dict[str, Any]) -> None:
    for file, content in files.items():
        write_atomic(folder / file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def end_ids(cfg: MistralConfig, tok: Tokenizer) -> tuple[int, ...]:
    """The ids of every token that ends a text: the tokenizer's, then the others of the model."""
    return tuple(dict.fromkeys((tok.eos_id, *cfg.end_ids)))


def check_tokenizer(cfg: MistralConfig, tok: Tokenizer) -> None:
    """Raises a ValueError if the tokenizer is not that of the model.

    A model with a tokenizer.json may end a text with other tokens than the tokenizer, so there some
    of the model's must only be special tokens.
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
