import jinja2
import pytest
from sample_tokenizers import fuzz_texts, golden

from zephyr_jax.data.packing import packing
from zephyr_jax.data.text.chat import CHAT_TEMPLATE, render_chat, render_pair, render_text
from zephyr_jax.data.text.tokenizer import Tokenizer

PUBLISHED = {"bos": True, "parse_special": True, "append_eos": True, "empty_system": True}
OURS = dict.fromkeys(PUBLISHED, False) | {"bos": True}
PROMPT = [{"role": "user", "content": "Which?"}]
HEADER = [28705, 13, 28789, 28766, 489, 11143, 28766, 28767, 13]  # "\n<|assistant|>\n"


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def masked_text(tok: Tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    """The text of every run of masked tokens; each must end with eos."""
    runs, run = [], []
    for token, keep in zip(ids, mask, strict=True):
        if keep:
            run.append(token)
            if token == tok.eos_id:
                runs.append(tok.decode(run, continuation=True))
                run = []
        else:
            assert not run, "a masked run that does not end with eos"
    return runs


def test_ids_masks_and_text_equal_the_recorded_ones(mistral):
    for case in golden("chat_cases"):
        messages, prompted = case["messages"], case["add_generation_prompt"]
        ids, mask = render_chat(mistral, messages, prompted, bos=False, parse_special=True)
        assert (ids, mask) == (case["ids"], case["assistant_mask"]), case["text"]
        assert render_text(messages, prompted) == case["text"]
        with_bos, mask_bos = render_chat(mistral, messages, prompted, parse_special=True)
        assert (with_bos, mask_bos) == ([1, *ids], [0, *mask])


def test_the_published_recipe_gives_its_published_ids(mistral):
    ids, mask = render_chat(
        mistral, chat("Hi there", "Hello!"), empty_system=True, append_eos=True, bos=True
    )
    system = [1, 523, 28766, 6574, 28766, 28767, 13, 2]
    user = [28705, 13, 28789, 28766, 1838, 28766, 28767, 13, 23809, 736, 2]
    assert ids == [*system, *user, *HEADER, 16230, 28808, 2, 28705, 13, 2]
    assert [i for i, keep in zip(ids, mask, strict=True) if keep] == [16230, 28808, 2]


def test_the_second_eos_ends_a_finished_chat_only(toy):
    plain, mask = render_chat(toy, chat("a", "b"))
    ended, ended_mask = render_chat(toy, chat("a", "b"), append_eos=True)
    assert (ended, ended_mask) == ([*plain, toy.eos_id], [*mask, 0])
    prompts = [render_chat(toy, chat("a"), True, append_eos=end) for end in (False, True)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("choice", [OURS, PUBLISHED], ids=["ours", "published"])
def test_a_pair_is_its_two_chats(toy, mistral, choice):
    texts = fuzz_texts(300, seed=8)
    for tok in (toy, mistral):
        for a, b, c in zip(*[iter(texts)] * 3, strict=True):
            pair = render_pair(tok, chat(a), b, c, **choice)
            for answer, content in ((pair.chosen, b), (pair.rejected, c)):
                ids, mask = render_chat(tok, chat(a, content), **choice)
                tail = [] if choice["append_eos"] else tok.encode("\n")
                assert pair.prompt + answer + tail == ids
                assert mask[len(pair.prompt) :][: mask.count(1)] == [1] * mask.count(1)


def test_an_answer_keeps_a_beginning_that_both_share(mistral):
    pair = render_pair(mistral, PROMPT, "Hello there", "Hello you", **OURS)
    assert pair.prompt[-9:] == HEADER
    assert pair.chosen == [16230, 736, 2]  # as after a newline, not the 22557 of a text's start
    assert pair.rejected[0] == 16230
    same = render_pair(mistral, PROMPT, "Hello", "Hello", **OURS)
    assert same.chosen == same.rejected == [16230, 2]
    tail = render_pair(mistral, PROMPT, "Hello", "", **PUBLISHED)
    assert tail.chosen == [16230, 2, 28705, 13, 2]
    assert tail.rejected == [2, 28705, 13, 2]
    assert tail.prompt[:9] == [1, 523, 28766, 6574, 28766, 28767, 13, 2, 28705]


@pytest.mark.parametrize("trim", [False, True], ids=["plain", "trimmed"])
def test_the_template_renders_what_render_text_does(trim):
    template = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim).from_string(CHAT_TEMPLATE)
    cases = [(c["messages"], c["add_generation_prompt"]) for c in golden("chat_cases")]
    texts = fuzz_texts(300, seed=9)
    cases += [(chat(*texts[i : i + 3], system=texts[i]), bool(i % 2)) for i in range(0, 300, 3)]
    for messages, prompted in cases:
        names = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": prompted}
        text = template.render(messages=messages, **names)
        assert text == "<s>" + render_text(messages, prompted)
    with pytest.raises(jinja2.exceptions.UndefinedError):  # raise_exception where an engine has it
        template.render(messages=[{"role": "tool", "content": "x"}], bos_token="", eos_token="")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one dict"),
        ("Hello", "messages must be a list of at least one dict"),
        (["Hello"], "message 0 must be a dict with role and content"),
        ([{"role": "user"}], "message 0 must be a dict with role and content"),
        ([{"role": "human", "content": "x"}], "message 0 has role 'human'; use one of system"),
        ([*PROMPT, {"role": "system", "content": "x"}], "message 1 is a system message"),
        ([{"role": "user", "content": None}], "message 0 has content of type NoneType"),
    ],
)
def test_what_is_no_chat_is_refused_in_one_line(toy, messages, message):
    for render in (render_text, lambda m: render_chat(toy, m)):
        with pytest.raises(ValueError, match=message) as error:
            render(messages)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("choice", [OURS, PUBLISHED], ids=["ours", "published"])
def test_the_header_moves_and_nothing_else(sp_tok, choice):
    prompt = render_chat(sp_tok, chat("a"), True)[0]
    header = prompt[len(render_chat(sp_tok, chat("a"))[0]) :]
    for a, b, c, d, e in zip(*[iter(fuzz_texts(240, seed=11))] * 5, strict=True):
        plain = render_pair(sp_tok, chat(a, b, c), d, e, **choice)
        moved = render_pair(sp_tok, chat(a, b, c), d, e, **choice, score_header=True)
        assert moved.prompt + header == plain.prompt
        assert moved.chosen == header + plain.chosen
        assert moved.rejected == header + plain.rejected
        shown, _ = render_chat(sp_tok, chat(a, b, c), **choice | {"append_eos": False})
        assert moved.prompt == shown


@pytest.mark.parametrize(
    ("limits", "plain", "moved"),
    [
        # the longer chat fits: <s>, a question of 11 and a header of 7, an answer of 8
        ((27, 10), (19, 8, 2), (12, 15, 9)),
        # one too long: the prompt keeps 10, counted with the header or without
        ((26, 10), (10, 8, 2), (10, 15, 9)),
        # the prompt is short enough without the header: the answers keep 26 - 12
        ((26, 12), (12, 8, 2), (12, 14, 9)),
        # both are too long with the header in the answers
        ((18, 8), (8, 8, 2), (8, 10, 9)),
    ],
)
def test_truncation_counts_the_header_where_it_stands(mistral, limits, plain, moved):
    answers = ("Hello you there , and you !", "Hi")
    for score_header, sizes in ((False, plain), (True, moved)):
        pair = render_pair(mistral, chat("Hi there"), *answers, **OURS, score_header=score_header)
        cut = packing.cut_pair(*pair, max_length=limits[0], max_prompt_length=limits[1], bos=True)
        assert tuple(map(len, cut)) == sizes
    assert cut[1][:7] == cut[2][:7] == HEADER[2:]
