"""Replies: equal to the full forward pass, ended by tokens, strings and positions, streamed.

Every kind of draw, number of rows and size of a chunk is a program to compile, so tests share them.
"""

import dataclasses
import functools
import itertools
import time
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import device_mesh, random_params
from test_sampling import changed_in_float64

import zephyr_jax as zj
from zephyr_jax.cli.flags import all_devices
from zephyr_jax.inference import decoding
from zephyr_jax.inference import generate as generation
from zephyr_jax.inference.decoding import rounded
from zephyr_jax.inference.generate import Reply, stream
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.models.cache import next_slots
from zephyr_jax.models.parameters import param_shardings

CHAT = [{"role": "user", "content": "what is the color of the lorn?"}]
SAMPLED = {"temperature": 1.5, "top_k": 40, "seed": 3}


@pytest.fixture(scope="module")
def model(cfg, tok):
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size, num_hidden_layers=2)
    return cfg, random_params(cfg)


@pytest.fixture(scope="module")
def prompts(model):
    """Unequal ones, three longer than the window of 5, one a single token."""
    rng = np.random.default_rng(0)
    return [list(map(int, rng.integers(3, model[0].vocab_size, n))) for n in (3, 30, 1, 11, 7)]


_forward = jax.jit(zj.forward, static_argnums=0)
FORBIDDEN = 7  # a token that is made likely and not allowed
PENALTIES = {"repetition": 1.3, "presence": 0.5, "frequency": 0.6}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def greedy_by_full_forward(cfg, params, prompt, n, stops, sampling=None):
    """New tokens by the full forward pass, chosen by the definitions in float64, and log-probs."""
    ids, logps = list(prompt), []
    for step in range(n):
        padded = jnp.asarray([ids + [0] * (64 - len(ids))])
        logits = values = np.asarray(_forward(cfg, params, padded)[0, len(ids) - 1])
        if sampling:
            penalties = [getattr(sampling, f"{x}_penalty") for x in PENALTIES]
            reply, bias = ids[len(prompt) :], sampling.logit_bias
            values = changed_in_float64(logits, prompt, reply, bias, *penalties)
            values[[FORBIDDEN, *(stops if step < sampling.min_new_tokens else ())]] = -np.inf
        ids.append(int(values.argmax()))
        logps.append(log_softmax(logits))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :], logps


@pytest.fixture(scope="module")
def greedy(model, prompts, tok):
    """What each prompt's reply of at most 20 tokens is, past three windows."""
    replies = (greedy_by_full_forward(*model, p, 20, [tok.eos_id])[0] for p in prompts)
    return [[token for token in reply if token != tok.eos_id] for reply in replies]


def texts_of(tok, replies):
    return [tok.decode(ids, continuation=True) for ids in replies]


def test_greedy_equals_the_full_forward_for_unequal_prompts(model, tok, prompts, greedy):
    assert min(map(len, greedy)) > 15
    got = zj.generate(*model, tok, prompts, max_new_tokens=20)
    assert got == texts_of(tok, greedy)


def by_position(cache):
    """Of each row the positions in the cache, in order, and the last layer's values there."""
    values = np.asarray(cache.v[-1]).swapaxes(1, 2)
    orders = [np.argsort(row)[(row < 0).sum() :] for row in np.asarray(cache.positions)]
    return [(cache.positions[i, at], values[i, at]) for i, at in enumerate(orders)]


def inputs_of(cfg, rows, chunk=512):
    """The program that greedy decoding of prompts begins with, the prompts, and how it draws."""
    program = decoding._Program(cfg, SamplingParams().kind(), cfg.vocab_size, 128, chunk)
    prompts, none = decoding._padded(rows, chunk), np.zeros(0, np.int32)
    numbers = np.arange(len(prompts[0]), dtype=np.int32)
    values, ended = SamplingParams().numbers(), np.zeros(len(numbers), bool)
    draw = decoding._DrawInputs(values, np.uint32(0), numbers, none, ended)
    return program, prompts, draw


def prefilled(cfg, params, rows, chunk=512):
    """The state behind the prompts."""
    program, prompts, draw = inputs_of(cfg, rows, chunk)
    return decoding._prefill(program, params, *prompts, draw)[1]


@pytest.mark.parametrize("window", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_prefill_in_chunks_equals_prefill_at_once(model, prompts, window):
    cfg, params = model
    cfg = dataclasses.replace(cfg, sliding_window=window)
    states = [prefilled(cfg, params, prompts, chunk) for chunk in (512, 7)]
    whole, chunked = (by_position(state.cache) for state in states)
    lengths = (3, 30, 1, 11, 7, 0)  # a row of padding, so that few sizes are compiled
    assert [len(at) for at, _ in whole] == [min(window or 30, n) for n in lengths]
    for (at, values), (want_at, want) in zip(chunked, whole, strict=True):
        np.testing.assert_array_equal(at, want_at)
        np.testing.assert_allclose(values, want, atol=2e-5)
    np.testing.assert_array_equal(states[1].token, states[0].token)


def test_the_programs_are_traced_from_shapes(model, prompts):
    cfg, params = model
    _, decode, state = decoding.traced(cfg, params, (6, 64, 8), SamplingParams())
    assert (state.cache.k.shape, state.cache.k.dtype) == ((2, 6, 4, 5, 10), jnp.float32)
    assert decode.out_info[0][0].shape == (6, 8)


def test_a_slot_takes_the_last_column_that_falls_to_it():  # pitfall 31
    """Each slot is written once: which of two writes would win is open on GPU and TPU."""
    np.testing.assert_array_equal(next_slots(jnp.int32(4), 7, 3), [3, 3, 3, 3, 2, 0, 1])
    np.testing.assert_array_equal(next_slots(jnp.int32(5), 2, 3), [2, 0])


def test_decoding_ends_with_the_last_reply(model, tok, prompts, greedy):
    stop = texts_of(tok, greedy)[0][1:3]
    sampling = SamplingParams(max_new_tokens=60, stop=stop)
    rows, chunk = prompts[:1], generation.STOP_CHUNK
    steps = generation._steps(*model, tok, rows, sampling, chunk)
    assert len([*steps]) == 3  # the first token, one chunk, and what was held back


def test_stop_tokens_end_one_reply_and_not_the_others(model, tok, prompts, greedy):
    stops = [greedy[0][4], greedy[3][9]]
    got = zj.generate(*model, tok, prompts, max_new_tokens=12, stop_ids=stops)
    want = [list(itertools.takewhile(lambda i: i not in stops, ids[:12])) for ids in greedy]
    assert got == texts_of(tok, want)
    assert len(want[0]) < 5
    assert max(map(len, want)) == 12
    for ends in (greedy[0][3], (tok.eos_id, greedy[0][3])):  # by themselves
        cfg = dataclasses.replace(model[0], eos_token_id=ends)
        got = zj.generate(cfg, model[1], tok, prompts[:1], max_new_tokens=12)
        assert got == texts_of(tok, [greedy[0][: greedy[0].index(greedy[0][3])]])


def test_a_stop_string_ends_a_reply_where_it_is_complete(model, tok, prompts, greedy):
    texts = texts_of(tok, greedy)
    parts = [tok.decode([i], continuation=True) for i in greedy[1]]
    stop = parts[6][-1:] + parts[7][:1]  # spans two tokens
    assert len(stop) == 2
    assert stop in texts[1]
    got = zj.generate(*model, tok, prompts, max_new_tokens=20, stop=[stop, "\0never"])
    assert got == [text.split(stop)[0] for text in texts]
    alone = [prompts[1]]
    settings = {"max_new_tokens": 20, "stop": stop}
    assert zj.generate(*model, tok, alone, **settings) == got[1:2]
    shown = list(stream(*model, tok, alone[0], **settings))
    assert len(shown) > 1
    assert "".join(shown) == got[1]


def first_stop(text, stops):
    """By trying every end: where the stop string begins that is complete first."""
    for end in range(len(text) + 1):
        if found := [s for s in stops if text[:end].endswith(s)]:
            return end - max(map(len, found))
    return None


@pytest.mark.parametrize(
    "stop", [["bc", "abcd"], ["###", "#-"], ["aab"], ["aabaa", "ab"], ["cd", "abcd"], ["x"], []]
)
def test_a_reply_ends_before_the_stop_string_that_is_complete_first(stop):
    """Nothing that could be its beginning is shown before that is decided."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("aabcd#-"), 12))
        cuts = sorted(rng.integers(0, 13, 4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        want = text[: first_stop(text, stop)]
        fake = SimpleNamespace(stream=lambda ids, parts=parts: (parts[i] for i in ids))
        reply, shown = Reply(fake, SamplingParams(stop=stop)), ""
        for i in range(len(parts)):
            if reply.finish is None:
                shown += reply.add(i)
                assert want.startswith(shown)
        assert (reply.finish is None) == (first_stop(text, stop) is None)
        if reply.finish is None:
            shown += reply.end("length")
        assert shown == want


def test_stop_strings_are_looked_for_in_linear_time():
    stops = ["a" * n + "b" for n in range(984, 1000)]
    fake = SimpleNamespace(stream=lambda ids: ("a" for _ in ids))
    reply, start = Reply(fake, SamplingParams(stop=stops)), time.process_time()
    shown = sum(len(reply.add(0)) for _ in range(5000))
    assert time.process_time() - start < 2  # 0.1 s; 20 s where each beginning is compared
    assert shown == 5000 - 999


def test_a_reply_depends_on_its_number_and_not_on_its_company(model, tok, prompts):
    generate = functools.partial(zj.generate, *model, tok, max_new_tokens=12, **SAMPLED)
    replies = generate(prompts)
    assert generate(prompts, batch_size=2) == replies
    assert "".join(stream(*model, tok, prompts[0], max_new_tokens=12, **SAMPLED)) == replies[0]
    assert generate(prompts[:1], seed=4) != replies[:1]
    twins = generate([prompts[0]] * 2)
    assert twins[0] == replies[0] != twins[1]


def test_prompts_of_like_length_are_answered_together(model, tok, prompts):
    sampling = SamplingParams(max_new_tokens=12, **SAMPLED)
    each = [*generation.generate_each(*model, tok, prompts, sampling, 2)]
    assert [len(prompts[i]) for i, _ in each] == [30, 11, 7, 3, 1]
    some = generation.generate_each(*model, tok, prompts[2:], sampling, numbers=[2, 3, 4])
    assert {i + 2: text for i, text in some}.items() < dict(each).items()


def test_only_ids_of_the_tokenizer_are_drawn(model, tok):
    """Heads are often padded to a round number of rows."""
    cfg = dataclasses.replace(model[0], vocab_size=tok.vocab_size + 20)
    params = random_params(cfg)
    params["head"] = params["head"].at[:, tok.vocab_size :].mul(20)
    assert zj.generate(cfg, params, tok, "x", max_new_tokens=1, stop_ids=[])[0]


def test_few_programs_are_compiled(model, tok, prompts):
    settings = SAMPLED | {"max_new_tokens": 3, "stop": "\0"}
    zj.generate(*model, tok, prompts[:1], **settings)
    before = decoding._prefill._cache_size(), decoding._decode._cache_size()
    zj.generate(*model, tok, prompts[1:2], **settings | {"max_new_tokens": 50, "seed": 5})
    zj.generate(*model, tok, prompts[3:4], **settings | {"temperature": 2.0, "stop_ids": [4]})
    assert (decoding._prefill._cache_size(), decoding._decode._cache_size()) == before
    sizes = {rounded(n, 64) for n in range(1, 513)} | {rounded(n, 512) for n in range(513, 32769)}
    assert len(sizes) < 20
    assert all(n <= rounded(n, 64) <= max(128, 1.5 * n) for n in range(1, 3000))


def test_the_cache_is_donated_and_has_the_dtype_of_the_model(model, prompts):
    cfg, params = model
    program, padded, draw = inputs_of(dataclasses.replace(cfg, dtype="bfloat16"), prompts)
    cast = decoding.cast_params(program.cfg, params)
    prefill = functools.partial(decoding._prefill, program)
    _, state = jax.eval_shape(prefill, cast, *padded, draw)
    assert (state.cache.k.dtype, state.cache.k.shape) == (jnp.bfloat16, (2, 6, 4, 5, 10))
    program, _, draw = inputs_of(cfg, prompts)
    state = prefilled(cfg, params, prompts)
    old, where = state.cache.k, state.cache.k.unsafe_buffer_pointer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        _, state = decoding._decode(program, params, state, draw, 64, 4)
        jax.block_until_ready(state)
    assert old.is_deleted()
    assert state.cache.k.unsafe_buffer_pointer() == where


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, r"prompts is \[\]"),
        (CHAT[0], {}, "prompts is {'role': 'user', .* message lists"),
        ([1, 2, 3], {}, "a prompt is 1; give a string .* a list of messages"),
        ([[5], [1.7]], {}, r"a prompt is \[1\.7\]"),
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5, 380]], {}, "prompt 0 has token id 380, the model ids 0 to 379"),
        ([[5] * 600], {}, "prompt 0 has 600 tokens, .* max_position_embeddings=512"),
        ("x", {"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ("x", {"temperature": float("inf")}, "temperature=inf must be at least 0"),
        ("x", {"stop": ["a", ""]}, "stop has an empty string"),
        ("x", {"presence_penalty": float("nan")}, "presence_penalty=nan must be a number"),
        ("x", {"min_new_tokens": 300}, "min_new_tokens=300 must be from 0 to max_new_tokens=256"),
    ],
)
def test_bad_input_is_named(model, tok, prompts, settings, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        zj.generate(*model, tok, prompts, **settings)
    assert "\n" not in str(error.value)
    if prompts == "x":
        with pytest.raises(ValueError, match=message):
            stream(*model, tok, "x", **settings)  # at the call, not at the first part


def test_ids_may_be_arrays(tok):
    for ids in (np.asarray([5, 6]), jnp.asarray([5, 6]), (5, np.int32(6)), range(5, 7)):
        assert generation.prompt_ids(tok, ids) == [5, 6]
    with pytest.raises(ValueError, match="a prompt is "):
        generation.prompt_ids(tok, jnp.asarray([1.7]))


def test_a_reply_ends_where_the_positions_do(model, tok, prompts, greedy):
    cfg, rows = dataclasses.replace(model[0], max_position_embeddings=11), prompts[3:]
    got = zj.generate(cfg, model[1], tok, rows, max_new_tokens=20)
    assert got == texts_of(tok, [greedy[3][:1], greedy[4][:5]])
    endless = SamplingParams(max_new_tokens=10**7)  # no room is kept for what has no position
    assert sum(new.shape[1] for new, _ in decoding.decode(cfg, model[1], rows, endless)) == 5


def test_penalties_bias_and_log_probs_equal_the_full_forward(model, tok, prompts, greedy):
    cfg, params = model
    stops = (greedy[0][1], greedy[1][2])  # so that replies would end at once
    bias = {greedy[0][0]: -4.0, FORBIDDEN: 50.0, 9: 1.5}
    allowed = np.full((len(prompts), 12), 2**32 - 1, np.uint32)
    allowed[:, 0] -= np.uint32(1 << FORBIDDEN)
    settings = {f"{name}_penalty": value for name, value in PENALTIES.items()}
    settings |= {"logit_bias": bias, "min_new_tokens": 6, "stop_ids": stops}
    sampling = SamplingParams(max_new_tokens=12, **settings)
    with jax.set_mesh(device_mesh(1, 2, 2)):
        sharded = jax.device_put(jax.device_get(params), param_shardings(cfg))
        more = {"logps": True, "allowed": allowed, "chunk": 5}
        chunks, logps = zip(*decoding.decode(cfg, sharded, prompts, sampling, **more), strict=True)
    tokens = np.concatenate(chunks, axis=1)
    drawn, tops, top_ids = (np.concatenate(x, axis=1) for x in zip(*logps, strict=True))
    for i, prompt in enumerate(prompts):
        ids, want = greedy_by_full_forward(cfg, params, prompt, 12, stops, sampling)
        assert [t for t in tokens[i].tolist() if t >= 0] == ids
        assert len(ids) >= 6
        for step, (token, row) in enumerate(zip(ids, want, strict=True)):
            np.testing.assert_allclose(drawn[i, step], row[token], rtol=1e-4, atol=1e-5)
            best = np.sort(row)[::-1][:20]
            np.testing.assert_allclose(tops[i, step], best, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(row[top_ids[i, step]], best, rtol=1e-4, atol=1e-5)


def test_log_probs_of_prompts_equal_the_full_forward(model, prompts):
    cfg, params = model
    with jax.set_mesh(device_mesh(1, 2, 2)):
        sharded = jax.device_put(jax.device_get(params), param_shardings(cfg))
        got = decoding.prompt_logps(cfg, sharded, prompts, cfg.vocab_size - 5)
    for prompt, logps in zip(prompts, got, strict=True):
        whole = _forward(cfg, params, jnp.asarray([prompt + [0] * (64 - len(prompt))]))[0]
        assert logps.token.shape == (len(prompt) - 1,)
        for i, token in enumerate(prompt[1:]):
            want = log_softmax(whole[i])  # over all rows of the head
            np.testing.assert_allclose(logps.token[i], want[token], rtol=1e-4, atol=1e-5)
            best = np.sort(want[:-5])[::-1][:20]  # of those that have a text
            np.testing.assert_allclose(logps.top[i], best, rtol=1e-4, atol=1e-5)
            assert logps.token[i] <= logps.top[i, 0] or token >= cfg.vocab_size - 5


@pytest.mark.usefixtures("sharded_mesh")
def test_generation_on_a_mesh_gives_the_same_text(model, tok, prompts, greedy):
    cfg, params = model
    sharded = jax.device_put(jax.device_get(params), param_shardings(cfg))
    texts = texts_of(tok, greedy)
    stop = texts[1][5:7]
    got = zj.generate(cfg, sharded, tok, prompts, max_new_tokens=20, stop=stop)
    assert got == [text.split(stop)[0] for text in texts]


@pytest.mark.slow
def test_eight_heads_on_eight_devices(model, tok, prompts, monkeypatch):
    """Every device has one head, and the prompts come in chunks."""
    cfg = dataclasses.replace(model[0], num_key_value_heads=8, vocab_size=384)
    params = random_params(cfg)
    settings = {"max_new_tokens": 8, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    want = zj.generate(cfg, params, tok, prompts, **settings)
    monkeypatch.setattr(decoding, "CHUNK", 4)
    with all_devices(8, 1):
        sharded = jax.device_put(jax.device_get(params), param_shardings(cfg))
        assert zj.generate(cfg, sharded, tok, prompts, **settings) == want
