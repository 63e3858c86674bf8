"""An answer that is begun is continued: the ids of one text."""

import pytest
from sample_templates import FORMS, random_chats, sample_files

from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.inference.generate import prompt_ids

QUESTION = {"role": "user", "content": "Who are you?"}
BEGUN = [QUESTION, {"role": "assistant", "content": "I am a small"}]


@pytest.mark.parametrize("content", ["I am a small", "I am ", " I", "a\n\n", "</s>", ""])
def test_an_answer_that_is_begun_is_neither_ended_nor_followed_by_a_turn(tok, content):
    begun = [QUESTION, {"role": "assistant", "content": content}]
    ids = prompt_ids(tok, begun)
    header = "\n<|assistant|>\n"
    prompt = render_chat(tok, [QUESTION], add_generation_prompt=True)[0]
    turn = tok.encode(header + content)[len(tok.encode(header)) :]
    assert ids == prompt + turn
    assert ids == render_chat(tok, begun)[0][: len(ids)]
    assert tok.eos_id not in turn


@pytest.mark.parity
@pytest.mark.parametrize("form", [*FORMS, ("zephyr", "sentencepiece")], ids="-".join)
def test_ids_equal_those_of_transformers(form, tok, tmp_path):
    from test_template_ids import theirs_of  # which needs transformers

    ours = tok if form[0] == "zephyr" else JsonTokenizer(sample_files(*form))
    theirs = theirs_of(ours, tmp_path)
    chats, n = random_chats(150, 7, strict=form[0] == "strict"), 0
    for i, chat in enumerate(chats):
        for message in chat * (form[0] == "chatml"):
            message["content"] = message["content"].replace("</s>", "<|im_end|>")
        if chat[-1]["role"] != "assistant":
            continue
        chat[-1]["content"] += ("", " ", "\n", "  \n ", " the")[i % 5]
        chat[-1]["content"] = ("", " ", "\n")[i % 3] + chat[-1]["content"]
        try:
            want = theirs.apply_chat_template(chat, continue_final_message=True, return_dict=False)
        except ValueError:
            continue
        if ours.special_pattern.search("".join(m["content"] for m in chat)):
            continue  # for transformers these are tokens
        n += 1
        assert prompt_ids(ours, chat) == want, chat
    assert n > 15


def test_a_template_that_drops_the_end_of_a_message_is_refused():
    files = sample_files(*FORMS[0])
    tok = JsonTokenizer(files)
    tok.chat_template = "{% for m in messages %}{{ m.content[:5] + eos_token }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out the end of the last message"):
        prompt_ids(tok, BEGUN)
