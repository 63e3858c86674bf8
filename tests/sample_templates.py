"""Chat templates in the style of known models, and small tokenizer.json files to go with them.

The templates mark answers by `generation` tags, by which transformers makes its masks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from sample_tokenizers import SENTENCES, fuzz_texts, train_model

from zephyr_jax.data.tokenizer_files import Vocabulary, tokenizer_json

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Line ends after the tags, which trim_blocks removes, and no BOS.
TURNS = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}

{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
# As Llama 2: contents are stripped, the system message is inside the first user turn.
STRIPPED = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% set text = message['content'].strip() %}"
    "{% if loop.first and system %}"
    "{% set text = '<<SYS>>\n' + system.strip() + '\n<</SYS>>\n\n' + text %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + text + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + text + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
# As Mistral-Instruct: one BOS, strict turns, no system message.
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "turns": TURNS, "stripped": STRIPPED, "strict": STRICT}
CHATML_NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
CHATML_NAMES |= {"unk_token": "<|endoftext|>"}
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>"]
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
# Which template goes with which tokenizer: ChatML's special tokens are in the byte-level one alone.
FORMS = [("chatml", "bytes")]
FORMS += [(k, f) for k in list(TEMPLATES)[1:] for f in ("bytes", "legacy", "first", "always")]


def json_files(model: dict, template: str, names: dict[str, str], specials: Sequence[str], **parts):
    """The files of a JsonTokenizer; `model` and `parts` are fields of its tokenizer.json."""
    ids = [(model["vocab"][text], text) for text in specials]
    added = [{"id": i, "content": text, **FLAGS, "special": True} for i, text in ids]
    data = {"version": "1.0", "added_tokens": added, "model": model} | parts
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | names
    texts = {"tokenizer.json": data, "tokenizer_config.json": config}
    return {name: json.dumps(content).encode() for name, content in texts.items()}


def changed(files: dict[str, bytes], name: str, **changes) -> dict[str, bytes]:
    """The files with fields of one of them replaced; None removes a field."""
    data = json.loads(files.get(name, b"{}")) | changes
    data = {key: value for key, value in data.items() if value is not None}
    return files | {name: json.dumps(data).encode()}


def byte_level_files(kind: str, n_merges: int = 150) -> dict[str, bytes]:
    """A byte-level tokenizer like SmolLM2's (special tokens 0 to 2, then bytes, then merges)."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, level])
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + n_merges, initial_alphabet=level.alphabet(), show_progress=False
    )
    trained.train_from_iterator([*SENTENCES, "\n\n", "user\n", "  \n \n"] * 20, trainer)
    data = json.loads(trained.to_str())
    visible, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    of_bytes = [chr(byte if byte in visible else next(others)) for byte in range(256)]
    names, specials = LLAMA_NAMES, LLAMA_SPECIALS
    if kind == "chatml":
        names, specials = CHATML_NAMES, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = ["".join(pair) for pair in data["model"]["merges"]]
    tokens = dict.fromkeys([*specials, *of_bytes, *merged])
    model = data["model"] | {"vocab": {token: i for i, token in enumerate(tokens)}}
    parts = {name: data[name] for name in ("pre_tokenizer", "decoder")}
    return json_files(model, TEMPLATES[kind], names, specials, **parts)


def metaspace_files(kind: str, scheme: str) -> dict[str, bytes]:
    """The SentencePiece model of `train_model` as tokenizer.json.

    `scheme` says where a blank is put before text: "legacy" as `tokenizer_json` does, or the
    prepend_scheme of Metaspace, "first" or "always".
    """
    data = tokenizer_json(Vocabulary.of_model(train_model()), "<s>")
    parts = {name: data[name] for name in ("normalizer", "pre_tokenizer", "decoder")}
    if scheme != "legacy":
        meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        parts |= {"normalizer": None, "pre_tokenizer": meta}
    return json_files(data["model"], TEMPLATES[kind], LLAMA_NAMES, LLAMA_SPECIALS, **parts)


def write_chatml(
    folder: Path, added: Sequence[str], special: Sequence[str] = (), **config: object
) -> Path:
    """Writes a folder as fine-tunes of 2023 have it: a SentencePiece model, tokens added to it.

    Of `added`, which get the ids from 420 on, `special` are special; `config` replaces fields of
    tokenizer_config.json, of which None removes one.
    """
    ids = {text: 420 + i for i, text in enumerate(added)}
    tokens = {i: {"content": x, **FLAGS, "special": x in special} for x, i in ids.items()}
    names = LLAMA_NAMES | ({"eos_token": special[0]} if special else {})
    fields = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    fields |= {"added_tokens_decoder": tokens, "chat_template": CHATML, **names, **config}
    fields = {key: value for key, value in fields.items() if value is not None}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_model())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    return folder


def sample_files(kind: str, form: str) -> dict[str, bytes]:
    """The files of one of FORMS."""
    return byte_level_files(kind) if form == "bytes" else metaspace_files(kind, form)


def random_chats(n: int, seed: int, *, strict: bool = False) -> list[list[dict[str, str]]]:
    """Seeded chats of `fuzz_texts`, about half with a system message, of one to five turns."""
    rng = random.Random(seed)
    texts = iter(fuzz_texts(6 * n, seed))
    chats = []
    for _ in range(n):
        roles = ("user", "assistant", "user", "assistant", "user")[: rng.randrange(1, 6)]
        roles = roles if strict or rng.random() < 0.5 else ("system", *roles)
        chats.append([{"role": role, "content": next(texts)} for role in roles])
    return chats
