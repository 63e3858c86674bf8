"""Chats in a model's own template: ids and masks against what the templates say, by hand."""

import json
import re

import pytest
from sample_templates import (
    FORMS,
    TEMPLATES,
    byte_level_files,
    changed,
    metaspace_files,
    random_chats,
    sample_files,
)
from sample_tokenizers import fuzz_texts
from test_chat import OURS, chat

from zephyr_jax.data.text.chat import CHAT_TEMPLATE, compile_template, render_chat, render_pair
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.inference.generate import prompt_ids

CHAT = chat(*"abcd")
UNK, BOS, EOS = "\ue000\ue001\ue002"  # how special tokens are written in texts by hand


def own(template: str, **changes) -> JsonTokenizer:
    """Token 3 + b is byte b; 1 is BOS and 2 eos."""
    files = changed(byte_level_files("turns", n_merges=0), "tokenizer.json", **changes)
    return JsonTokenizer(changed(files, "tokenizer_config.json", chat_template=template))


def ids_of(text: str) -> list[int]:
    """The ids of a text by hand, for `own`."""
    return [
        i
        for char in text
        for i in ([ord(char) - 0xE000] if UNK <= char <= EOS else [3 + b for b in char.encode()])
    ]


def chatml(messages):
    if messages[0]["role"] != "system":
        yield f"{BOS}system\nYou help.{EOS}\n", 0
    for message in messages:
        yield f"{BOS}{message['role']}\n", 0
        yield message["content"] + EOS, int(message["role"] == "assistant")
        yield "\n", 0


def turns(messages):
    for message in messages:
        yield f"<|{message['role']}|>\n", 0
        yield message["content"] + EOS, int(message["role"] == "assistant")
        yield "\n", 0


def stripped(messages):
    system = ""
    for message in messages:
        text = message["content"].strip()
        if message["role"] == "system":
            system = f"<<SYS>>\n{text}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            yield f"{BOS}[INST] {system}{text} [/INST]", 0
            system = ""
        else:
            yield f" {text} {EOS}", 1


def strict(messages):
    yield BOS, 0
    for message in messages:
        if message["role"] == "user":
            yield f"[INST] {message['content']} [/INST]", 0
        else:
            yield message["content"] + EOS, 1


BY_HAND = {"chatml": chatml, "turns": turns, "stripped": stripped, "strict": strict}
PROMPTS = {"chatml": f"{BOS}assistant\n", "turns": "<|assistant|>\n"}


def expected(kind, messages, prompted):
    parts = [*BY_HAND[kind](messages), (PROMPTS.get(kind, "") if prompted else "", 0)]
    return [i for text, _ in parts for i in ids_of(text)], [
        mask for text, mask in parts for _ in ids_of(text)
    ]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_ids_and_masks_are_those_of_the_template(kind):
    tok = JsonTokenizer(byte_level_files(kind, n_merges=0))
    by_text = {text: chr(0xE000 + i) for text, i in tok.specials.items()}
    chats = random_chats(150, seed=40, strict=kind == "strict")
    literal = "<|im_<|im_end|>end|></</s>s>" + "".join(tok.specials)
    chats.append(chat(literal, literal))
    for n, messages in enumerate(chats):
        if kind == "chatml":
            for message in messages:
                message["content"] = message["content"].replace("</s>", "<|im_end|>")
        prompted = bool(n % 2)
        assert render_chat(tok, messages, prompted) == expected(kind, messages, prompted), messages
        typed = [
            m | {"content": tok.special_pattern.sub(lambda found: by_text[found[0]], m["content"])}
            for m in messages
        ]
        legacy = render_chat(tok, messages, prompted, parse_special=True)
        assert legacy == expected(kind, typed, prompted), messages


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_a_pair_is_what_inference_sees(kind, form):
    tok = JsonTokenizer(sample_files(kind, form))
    merged = 0
    texts = iter(fuzz_texts(240, seed=41))
    for a, b, c in zip(texts, texts, texts, strict=False):
        pair = render_pair(tok, chat(a), b, c, **OURS)
        prompt = render_chat(tok, chat(a), add_generation_prompt=True)
        assert prompt == (pair.prompt, [0] * len(pair.prompt))
        for answer, content in ((pair.chosen, b), (pair.rejected, c)):
            shown = f" {content.strip()} " if kind == "stripped" else content
            assert answer[-1] == tok.eos_id
            assert not set(answer[:-1]) & {tok.bos_id, tok.eos_id}
            if form != "bytes":
                shown = shown.replace("▁", " ")  # one entry for both
            assert tok.decode(answer, continuation=True) == shown
            ids, mask = render_chat(tok, chat(a, content))
            n = len(pair.prompt)
            if ids[:n] == pair.prompt:
                assert ids[n : n + len(answer)] == answer
                assert mask[n : n + len(answer)] == [1] * len(answer)
                assert sum(mask) == len(answer)
            else:
                merged += 1
    # Only a byte-level vocabulary has line ends that merge.
    assert (merged > 0) == (form == "bytes" and kind in ("chatml", "turns"))


def test_a_token_that_begins_in_the_prompt_is_no_target():
    tok = JsonTokenizer(byte_level_files("chatml"))
    vocab = json.loads(tok.files["tokenizer.json"])["model"]["vocab"]
    newline, two, x = vocab["Ċ"], vocab["ĊĊ"], vocab["x"]
    ids, mask = render_chat(tok, chat("x", "\n\nx"))
    assert (ids[-5:], mask[-5:]) == ([two, newline, x, 2, newline], [0, 1, 1, 1, 0])
    assert prompt_ids(tok, "x")[-1] == newline
    pair = render_pair(tok, chat("x"), "\n\nx", "x", **OURS)
    assert pair[1:] == ([newline, newline, x, 2], [x, 2])


def test_zephyrs_template_gives_the_ids_and_masks_of_the_other_kind(toy):
    template = {"chat_template.jinja": CHAT_TEMPLATE.encode()}
    tok = JsonTokenizer(metaspace_files("turns", "legacy") | template)
    for n, messages in enumerate(random_chats(120, seed=42)):
        for legacy in (False, True):
            options = {"add_generation_prompt": bool(n % 2), "parse_special": legacy}
            assert render_chat(tok, messages, **options) == render_chat(toy, messages, **options)
        if messages[-1]["role"] == "user":
            options = OURS | {"parse_special": bool(n % 2)}
            answers = (messages[0]["content"], "no")
            pairs = [render_pair(t, messages, *answers, **options) for t in (tok, toy)]
            assert pairs[0] == pairs[1]


def test_flags_of_special_tokens_hold_for_both_ways():
    """A special that swallows the line end after it, as Phi's do."""
    template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] }}{{ '</s>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    added = json.loads(byte_level_files("turns", 0)["tokenizer.json"])["added_tokens"]
    tok = own(template, added_tokens=[t | {"rstrip": t["content"] == "</s>"} for t in added])
    for content in ("Hi", "</s>\nHi"):
        prompt = ids_of(f"{BOS}user\n{content}{EOS}{BOS}assistant\n")
        answer = ids_of(content + EOS)
        whole = [*prompt, *answer], [0] * len(prompt) + [1] * len(answer)
        assert render_chat(tok, chat(content, content)) == whole
        pair = render_pair(tok, chat(content), content, "x", **OURS)
        assert pair == (prompt, answer, ids_of(f"x{EOS}"))


def test_what_the_file_adds_to_tokens_moves_no_mask():
    """A post-processor takes blanks off the offsets; truncation is for batches of others."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fields = {"post_processor": level | {"use_regex": True}, "truncation": cut}
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    files = byte_level_files("turns") | {"chat_template.jinja": template.encode()}
    tok = JsonTokenizer(changed(files, "tokenizer.json", **fields))
    ids, mask = render_chat(tok, chat("a", "the"))
    vocab = json.loads(files["tokenizer.json"])["model"]["vocab"]
    assert ids[-2:] == [vocab["Ġthe"], 2]  # its blank is the header's
    assert (sum(mask), mask[-1]) == (1, 1)


def test_a_template_that_does_not_only_append_is_refused_for_training():
    tok = own(
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}"
        "{{ 'assistant:' + eos_token }}"
        "{% else %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    with pytest.raises(ValueError, match="renders what precedes the end of message 1 otherwise"):
        render_chat(tok, CHAT)
    context = [CHAT[0], CHAT[1] | {"train": False}, *CHAT[2:]]  # it need not be defined
    mask = render_chat(tok, context)[1]
    assert (sum(mask), mask[-2:]) == (2, [1, 1])
    prompt = ids_of(f"user:a{EOS}assistant:{EOS}user:c{EOS}assistant:")  # chatting goes on
    assert render_chat(tok, CHAT[:3], add_generation_prompt=True) == (prompt, [0] * len(prompt))
    pair = render_pair(tok, CHAT[:3], "d", "e", **OURS)  # only the last answer is scored
    assert pair == (prompt, ids_of(f"d{EOS}"), ids_of(f"e{EOS}"))
    assert render_chat(tok, CHAT[:2])[1] == [0] * 17 + [1, 1]


def test_an_answer_must_end_with_eos():
    tok = own("{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(ValueError, match="does not end message 1 with the eos_token '</s>', or"):
        render_chat(tok, CHAT)
    assert render_chat(tok, CHAT[:1])[0] == ids_of("user:a\n")


def test_a_template_that_alters_a_spelled_special_is_refused():
    tok = own("{% for m in messages %}{{ m['content'].split('</s>')[-1] + eos_token }}{% endfor %}")
    assert render_chat(tok, CHAT[:1])[0] == ids_of(f"a{EOS}")
    with pytest.raises(ValueError, match="message 0 spells a special token and the chat template"):
        render_chat(tok, chat("a</s>b"))
    assert render_chat(tok, chat("a</s>b"), parse_special=True)[0] == ids_of(f"b{EOS}")


def test_settings_of_zephyrs_template_are_refused_with_another():
    tok = JsonTokenizer(byte_level_files("chatml", n_merges=0))
    for name in ("append_eos", "empty_system", "score_header"):
        with pytest.raises(ValueError, match="belong to Zephyr's template.*to False"):
            render_pair(tok, CHAT[:1], "x", "y", **OURS | {name: True})
    assert render_chat(tok, CHAT, bos=False) == render_chat(tok, CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "comes without a chat template; put that of the model's chat version"),
        ("{% if %}", "the chat template is not Jinja: line 1: "),
        (TEMPLATES["strict"], "cannot render these messages: roles must alternate user/assistant"),
        ("{{ messages[9]['role'] }}", "cannot render these messages: .* has no element 9"),
        ("{{ 'x' + nothing }}", "cannot render these messages: 'nothing' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "cannot render these messages: access to attribute"),
    ],
)
def test_what_a_template_refuses_is_one_line(template, message):
    with pytest.raises(ValueError, match=message) as error:
        render_chat(own(template), CHAT[1:])
    assert "\n" not in str(error.value)


def test_templates_find_what_they_rely_on():
    """The names, filters, tags and settings that transformers gives to a template."""

    def text(source, **tokens):
        return compile_template(source, {"eos_token": "</s>"} | tokens)(CHAT[:1], True)

    assert text("{% for m in messages %}\n  {% continue %}x{% endfor %}\ny") == "y"
    assert text("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert text("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert text("{{ {'b': 1} | tojson(indent=1) }}") == '{\n "b": 1\n}'
    assert re.fullmatch(r"\d{4}", text("{{ strftime_now('%Y') }}"))
    assert text("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert text("{{ add_generation_prompt }}{{ bos_token }}", bos_token="<s>") == "True<s>"
    assert text("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}") == "1"
    assert text("a {%- generation -%} b {%- endgeneration -%} c") == "abc"
    with pytest.raises(ValueError, match="is not Jinja"):
        text("{% endgeneration %}")
