import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import zephyr_jax as zj
from zephyr_jax.generation import Sampling, sample


@pytest.fixture(scope="module")
def model(cfg, tok):
    import dataclasses

    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size)
    return cfg, zj.init_params(cfg, jax.random.key(3))


def greedy_by_full_forward(cfg, params, ids, n, eos):
    ids, new = list(ids), []
    step = jax.jit(lambda t: zj.forward(cfg, params, t))
    for _ in range(n):
        padded = jnp.asarray([ids + [0] * (64 - len(ids))])
        token = int(step(padded)[0, len(ids) - 1].argmax())
        if token == eos:
            break
        ids.append(token)
        new.append(token)
    return new


def test_greedy_equals_the_full_forward_for_unequal_prompts(model, tok):
    cfg, params = model
    rng = np.random.default_rng(0)
    prompts = [list(map(int, rng.integers(3, cfg.vocab_size, n))) for n in (3, 11, 7)]
    got = zj.generate(cfg, params, tok, prompts, max_new_tokens=20)
    want = [greedy_by_full_forward(cfg, params, p, 20, tok.eos_id) for p in prompts]
    assert got == [tok.decode(ids, continuation=True) for ids in want]


def test_a_stop_token_ends_one_reply_and_not_the_other(model, tok):
    cfg, params = model
    prompts = [[5, 6, 7], [9, 10, 11, 12]]
    first = greedy_by_full_forward(cfg, params, prompts[0], 12, -1)
    stop = first[4]
    got = zj.generate(cfg, params, tok, prompts, max_new_tokens=12, stop_ids=[stop])
    for text, prompt in zip(got, prompts, strict=True):
        want = greedy_by_full_forward(cfg, params, prompt, 12, stop)
        assert text == tok.decode(want, continuation=True)


def test_streaming_shows_the_same_text(model, tok):
    cfg, params = model
    pieces: list[str] = []
    messages = [{"role": "user", "content": "what is the colour of the lorn?"}]
    settings = {"max_new_tokens": 15, "temperature": 1.0, "seed": 4}
    streamed = zj.generate(cfg, params, tok, [messages], on_text=pieces.append, **settings)
    assert "".join(pieces) == streamed[0]
    assert len(pieces) > 1
    assert streamed == zj.generate(cfg, params, tok, [messages], **settings)


def test_seeds_reproduce_and_differ(model, tok):
    cfg, params = model
    replies = [
        zj.generate(cfg, params, tok, "hello", max_new_tokens=12, temperature=1.5, seed=s)
        for s in (1, 1, 2)
    ]
    assert replies[0] == replies[1] != replies[2]


def test_sampling_follows_the_distribution_within_top_k_and_top_p():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities)), (20000, 1))

    def frequencies(**settings):
        drawn = sample(logits, jax.random.key(0), Sampling(temperature=1.0, **settings))
        return np.bincount(np.asarray(drawn), minlength=4) / 20000

    np.testing.assert_allclose(frequencies(), probabilities, atol=0.02)
    np.testing.assert_allclose(frequencies(top_k=2), [0.625, 0.375, 0, 0], atol=0.02)
    # 0.5 alone does not reach 0.6, so the second joins it
    np.testing.assert_allclose(frequencies(top_p=0.6), [0.625, 0.375, 0, 0], atol=0.02)
    np.testing.assert_allclose(frequencies(top_p=0.5), [1, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(
        frequencies(top_k=3, top_p=0.9), [10 / 19, 6 / 19, 3 / 19, 0], atol=0.02
    )
    cold = sample(logits[:50], jax.random.key(1), Sampling(temperature=0.01))
    assert (cold == 0).all()


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [
        ([], {}),
        ([[]], {}),
        ("x", {"temperature": -1.0}),
        ("x", {"top_p": 0.0}),
        ("x", {"max_new_tokens": 0}),
    ],
)
def test_bad_settings_are_named(model, tok, prompts, settings):
    with pytest.raises(ValueError, match="no prompt|must be >= 0"):
        zj.generate(*model, tok, prompts, **settings)


def test_generation_on_a_mesh_gives_the_same_text(model, tok, mesh):
    cfg, params = model
    from zephyr_jax.models.mistral import param_shardings

    host = jax.device_get(params)
    placed = jax.device_put(host, param_shardings(cfg))
    prompts = [[5, 6, 7], [9, 10, 11, 12], [20]]
    got = zj.generate(cfg, placed, tok, prompts, max_new_tokens=8)
    want = (
        [greedy_by_full_forward(cfg, placed, p, 8, tok.eos_id) for p in prompts]
        if (mesh is None)
        else None
    )
    if want is not None:
        test_generation_on_a_mesh_gives_the_same_text.want = [
            tok.decode(w, continuation=True) for w in want
        ]
    assert got == test_generation_on_a_mesh_gives_the_same_text.want


def test_sampling_on_a_mesh(model, tok, mesh):
    cfg, params = model
    from zephyr_jax.models.mistral import param_shardings

    placed = jax.device_put(jax.device_get(params), param_shardings(cfg))
    settings = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 1}
    got = zj.generate(cfg, placed, tok, [[5, 6, 7]], **settings)
    assert got == zj.generate(cfg, placed, tok, [[5, 6, 7]], **settings)


def test_one_message_list_is_not_a_list_of_prompts(model, tok):
    # with runtime-checked annotations, as here, the type says it first
    with pytest.raises((ValueError, TypeCheckError), match="prompts"):
        zj.generate(*model, tok, [{"role": "user", "content": "x"}])
