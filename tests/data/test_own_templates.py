"""Chats in a model's own template: ids and masks against what the templates say, by hand."""

import json
import re

import jinja2
import pytest
from sample_templates import (
    FORMS,
    TEMPLATES,
    byte_level_files,
    metaspace_files,
    random_chats,
    sample_files,
)
from sample_tokenizers import fuzz_texts, train_model

from zephyr_jax.data.text.chat import CHAT_TEMPLATE, render_chat, render_pair
from zephyr_jax.data.text.chat_template import compile_template
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.inference.generate import prompt_ids

pytest.importorskip("tokenizers")
CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]

PAIR = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}


def by_bytes(kind: str, **changes) -> JsonTokenizer:
    """Token 3 + b is byte b; 1 is BOS (or <|im_start|>) and 2 eos (or <|im_end|>)."""
    files = byte_level_files(kind, n_merges=0)
    config = json.loads(files["tokenizer_config.json"]) | changes
    return JsonTokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})


def said(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def typed(text: str) -> list[int]:
    """What a user wrote, where literal specials are tokens."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    parts = re.split("(<unk>|<s>|</s>)", text)
    return [i for part in parts for i in ([ids[part]] if part in ids else said(part))]


def chatml(messages, content):
    if messages[0]["role"] != "system":
        yield [1, *said("system\nYou help."), 2, *said("\n")], 0
    for message in messages:
        yield [1, *said(message["role"] + "\n")], 0
        yield [*content(message["content"]), 2], int(message["role"] == "assistant")
        yield said("\n"), 0


def turns(messages, content):
    for message in messages:
        yield said(f"<|{message['role']}|>\n"), 0
        yield [*content(message["content"]), 2], int(message["role"] == "assistant")
        yield said("\n"), 0


def stripped(messages, content):
    system = []
    for message in messages:
        text = content(message["content"].strip())
        if message["role"] == "system":
            head = said("<<SYS>>\n"), said("\n<</SYS>>\n\n")
            system = [*head[0], *text, *head[1]]
        elif message["role"] == "user":
            yield [1, *said("[INST] "), *system, *text, *said(" [/INST]")], 0
            system = []
        else:
            yield [*said(" "), *text, *said(" "), 2], 1


def strict(messages, content):
    yield [1], 0
    for message in messages:
        text = content(message["content"])
        if message["role"] == "user":
            yield [*said("[INST] "), *text, *said(" [/INST]")], 0
        else:
            yield [*text, 2], 1


BY_HAND = {"chatml": chatml, "turns": turns, "stripped": stripped, "strict": strict}
PROMPTS = {"chatml": [1, *said("assistant\n")], "turns": said("<|assistant|>\n")}


def expected(kind, messages, content, prompted=False):
    parts = [*BY_HAND[kind](messages, content), (PROMPTS.get(kind, []) if prompted else [], 0)]
    return [i for ids, _ in parts for i in ids], [m for ids, m in parts for _ in ids]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_ids_and_masks_are_those_of_the_template(kind):
    tok = by_bytes(kind)
    for n, messages in enumerate(random_chats(150, seed=40, strict=kind == "strict")):
        if kind == "chatml":
            for message in messages:
                message["content"] = message["content"].replace("</s>", "<|im_end|>")
        prompted = bool(n % 2)
        got = render_chat(tok, messages, prompted)
        assert got == expected(kind, messages, said, prompted), messages
        if kind != "chatml":
            legacy = render_chat(tok, messages, prompted, parse_special=True)
            assert legacy == expected(kind, messages, typed, prompted), messages


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_a_pair_is_what_inference_sees(kind, form):
    tok = JsonTokenizer(sample_files(kind, form))
    merged = 0
    texts = iter(fuzz_texts(240, seed=41))
    for a, b, c in zip(texts, texts, texts, strict=False):
        question = [{"role": "user", "content": a}]
        pair = render_pair(tok, question, b, c, **PAIR)
        prompt = render_chat(tok, question, add_generation_prompt=True)
        assert prompt == (pair.prompt, [0] * len(pair.prompt))
        for answer, content in ((pair.chosen, b), (pair.rejected, c)):
            shown = f" {content.strip()} " if kind == "stripped" else content
            assert answer[-1] == tok.eos_id
            assert not set(answer[:-1]) & {tok.bos_id, tok.eos_id}
            if form != "bytes":
                shown = shown.replace("▁", " ")  # one piece for both
            assert tok.decode(answer, continuation=True) == shown
            whole = [*question, {"role": "assistant", "content": content}]
            ids, mask = render_chat(tok, whole)
            if ids[: len(pair.prompt)] == pair.prompt:
                n = len(pair.prompt)
                assert ids[n : n + len(answer)] == answer
                assert mask[n : n + len(answer)] == [1] * len(answer)
                assert sum(mask) == len(answer)
            else:
                merged += 1
    # Only a byte-level vocabulary has line ends that merge.
    assert (merged > 0) == (form == "bytes" and kind in ("chatml", "turns"))


def test_a_token_that_begins_in_the_prompt_is_no_target():
    tok = JsonTokenizer(byte_level_files("chatml"))
    pieces = json.loads(tok.files["tokenizer.json"])["model"]["vocab"]
    newline, two = pieces["Ċ"], pieces["ĊĊ"]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\n\nx"}]
    ids, mask = render_chat(tok, messages)
    x = pieces["x"]
    assert (ids[-5:], mask[-5:]) == ([two, newline, x, 2, tok.encode("\n")[0]], [0, 1, 1, 1, 0])
    assert prompt_ids(tok, "x")[-1] == newline
    pair = render_pair(tok, messages[:1], "\n\nx", "x", **PAIR)
    assert pair[1:] == ([newline, newline, x, 2], [x, 2])


def test_zephyrs_template_gives_the_ids_and_masks_of_the_other_kind():
    toy = SentencePieceTokenizer(train_model())
    files = metaspace_files("turns", "legacy")
    names = {"chat_template.jinja": CHAT_TEMPLATE.encode()}
    tok = JsonTokenizer(files | names)
    for n, messages in enumerate(random_chats(120, seed=42)):
        for legacy in (False, True):
            options = {"add_generation_prompt": bool(n % 2), "parse_special": legacy}
            assert render_chat(tok, messages, **options) == render_chat(toy, messages, **options)
        if messages[-1]["role"] == "user":
            options = PAIR | {"parse_special": bool(n % 2)}
            answers = (messages[0]["content"], "no")
            pairs = [render_pair(t, messages, *answers, **options) for t in (tok, toy)]
            assert pairs[0] == pairs[1]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_user_text_never_becomes_a_special_token(kind):
    tok = JsonTokenizer(byte_level_files(kind))
    n_ends = {"chatml": 3, "turns": 2, "stripped": 1, "strict": 1}[kind]
    specials = list(tok.specials)
    for text in ("".join(specials), f" {specials[2]}\n{specials[1]} ", "<|im_<|im_end|>end|>"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        clean = [message | {"content": "x"} for message in messages]
        ids, mask = render_chat(tok, messages)
        assert [i for i in ids if i < 3] == [i for i in render_chat(tok, clean)[0] if i < 3]
        assert ids.count(tok.eos_id) == n_ends
        answer = [i for i, keep in zip(ids, mask, strict=True) if keep]
        shown = f" {text.strip()} " if kind == "stripped" else text
        assert tok.decode(answer, continuation=True) == shown
        assert answer[-1] == tok.eos_id


def test_flags_of_special_tokens_hold_for_both_ways():
    """A special that swallows the line end after it, as Phi's do."""
    template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] }}{{ '</s>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    files = byte_level_files("turns", n_merges=0)
    data = json.loads(files["tokenizer.json"])
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
    files |= {"tokenizer.json": json.dumps(data).encode(), "chat_template.jinja": template.encode()}
    tok = JsonTokenizer(files)
    for content, literal in (("Hi", said("Hi")), ("</s>\nHi", said("</s>\nHi"))):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        ids, mask = render_chat(tok, messages)
        first = [1, *said("user\n"), *literal, 2]
        head = [1, *said("assistant\n")]
        assert ids == [*first, *head, *literal, 2]
        assert mask == [0] * len(first + head) + [1] * (len(literal) + 1)
        pair = render_pair(tok, messages[:1], content, "x", **PAIR)
        assert pair == ([*first, *head], [*literal, 2], [*said("x"), 2])


def test_what_the_file_adds_to_tokens_moves_no_mask():
    """A post-processor takes blanks off the offsets; truncation is for batches of others."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    asked = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    files = byte_level_files("turns") | {"chat_template.jinja": (template + asked).encode()}
    data = json.loads(files["tokenizer.json"])
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    data["post_processor"] = level | {"trim_offsets": True}
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["truncation"] = cut
    tok = JsonTokenizer(files | {"tokenizer.json": json.dumps(data).encode()})
    pieces = data["model"]["vocab"]
    messages = [CHAT[0], {"role": "assistant", "content": "the"}]
    ids, mask = render_chat(tok, messages)
    assert ids[-2:] == [pieces["Ġthe"], 2]  # its blank is the header's
    assert (sum(mask), mask[-1]) == (1, 1)


def own(template: str) -> JsonTokenizer:
    return by_bytes("turns", chat_template=template)


SAY = "{{ m['role'] + ':' + m['content'] + eos_token }}"


def test_a_template_that_does_not_only_append_is_refused_for_training():
    forgets = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}"
        "{{ 'assistant:' + eos_token }}{% else %}" + SAY + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tok = own(forgets)
    with pytest.raises(ValueError, match="renders what precedes the end of message 1 otherwise"):
        render_chat(tok, CHAT)
    ids, mask = render_chat(tok, CHAT[:3], add_generation_prompt=True)  # chatting goes on
    answered = [*said("user:a"), 2, *said("assistant:"), 2]
    assert ids == [*answered, *said("user:c"), 2, *said("assistant:")]
    assert not any(mask)
    pair = render_pair(tok, CHAT[:3], "d", "e", **PAIR)  # only the last answer is scored
    assert pair == (ids, [*said("d"), 2], [*said("e"), 2])
    assert render_chat(tok, CHAT[:2])[1] == [0] * 17 + [1, 1]


def test_an_answer_must_end_with_eos():
    tok = own("{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(ValueError, match="does not end message 1 with the eos_token '</s>'; name"):
        render_chat(tok, CHAT)
    assert render_chat(tok, CHAT[:1])[0] == said("user:a\n")


def test_a_template_that_alters_a_spelled_special_is_refused():
    cut = "m['content'].split('</s>')[-1]"
    tok = own("{% for m in messages %}{{ m['role'] + " + cut + " + eos_token }}{% endfor %}")
    assert render_chat(tok, CHAT[:1])[0] == [*said("usera"), 2]
    with pytest.raises(ValueError, match="message 0 spells a special token and the chat template"):
        render_chat(tok, [{"role": "user", "content": "a</s>b"}])
    ids, _ = render_chat(tok, [{"role": "user", "content": "a</s>b"}], parse_special=True)
    assert ids == [*said("userb"), 2]


def test_settings_of_zephyrs_template_are_refused_with_another():
    tok = by_bytes("chatml")
    for name in ("append_eos", "empty_system"):
        with pytest.raises(ValueError, match=f"{name} belongs to Zephyr's template"):
            render_chat(tok, CHAT, **{name: True})
        with pytest.raises(ValueError, match=f"{name} belongs to Zephyr's template"):
            render_pair(tok, CHAT[:1], "x", "y", **PAIR | {name: True})
    assert render_chat(by_bytes("strict"), CHAT, bos=False) == render_chat(by_bytes("strict"), CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "comes without a chat template; put that of the model's chat version"),
        ("{% if %}", "the chat template is not Jinja: line 1: "),
        (TEMPLATES["strict"], "cannot render these messages: roles must alternate user/assistant"),
        ("{{ messages[9]['role'] }}", "cannot render these messages: .* has no element 9"),
        ("{{ 'x' + nothing }}", "cannot render these messages: 'nothing' is undefined"),
        (
            "{{ messages.__class__.__mro__[1] }}",
            "cannot render these messages: access to attribute",
        ),
    ],
)
def test_what_a_template_refuses_is_said_in_one_line(template, message):
    with pytest.raises(ValueError, match=message) as error:
        render_chat(own(template), CHAT[1:])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="messages are empty"):
        render_chat(own(template), [])


def test_templates_find_what_they_rely_on():
    """The names, filters, tags and settings that transformers gives to a template."""

    def text(source, **tokens):
        return compile_template(source, {"eos_token": "</s>"} | tokens)(CHAT[:1], True)

    assert text("{% for m in messages %}\n  {% continue %}x{% endfor %}\ny") == "y"
    assert text("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert text("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert text("{{ {'b': 1} | tojson(indent=1) }}") == '{\n "b": 1\n}'
    assert re.fullmatch(r"\d{4}", text("{{ strftime_now('%Y') }}"))
    assert (
        text("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}") == "True" * 3
    )
    assert text("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}") == "1"
    assert text("{{ bos_token }}{{ eos_token }}", bos_token="<s>") == "<s></s>"
    with pytest.raises(ValueError, match="is not Jinja"):
        text("{% endgeneration %}")
    with pytest.raises(jinja2.TemplateSyntaxError):
        jinja2.Environment().from_string(TEMPLATES["strict"])  # plain jinja2 does not know the tag
