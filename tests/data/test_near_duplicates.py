import random
import zlib
from importlib import metadata

import numpy as np

from zephyr_jax.data.raw.filters import METHOD, near_duplicates, signature

WORDS = [
    f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "al", "un")
]


def text_of(rng, length):
    return " ".join(rng.choice(WORDS) for _ in range(length))


def changed(rng, text, times):
    parts = text.split()
    for _ in range(times):
        parts[rng.randrange(len(parts))] = rng.choice(WORDS)
    return " ".join(parts)


def families(seed, count):
    """Texts of which many are changed copies of earlier ones, in chains."""
    rng = random.Random(seed)
    texts = [text_of(rng, rng.randint(1, 80))]
    while len(texts) < count:
        if rng.random() < 0.4:
            texts.append(text_of(rng, rng.randint(1, 80)))
        else:
            texts.append(changed(rng, rng.choice(texts[-60:]), rng.choice([0, 0, 1, 1, 2, 4])))
    return texts


def signed(texts):
    return np.stack([signature(text) for text in texts])


def brute_force(signatures):
    """Compares every row with every kept row before it."""
    repeated = np.full(len(signatures), -1, np.int64)
    for row in range(len(signatures)):
        kept = np.flatnonzero(repeated[:row] < 0)
        similar = (signatures[kept] == signatures[row]).mean(axis=1) >= 0.8
        if similar.any():
            repeated[row] = kept[np.argmax(similar)]
    return repeated


def test_rows_are_dropped_greedily_in_their_order_as_by_brute_force():
    signatures = signed(families(1, 600))
    for order in (np.arange(600), np.random.default_rng(0).permutation(600)):
        expected = brute_force(signatures[order])
        assert 60 < np.count_nonzero(expected >= 0) < 540
        np.testing.assert_array_equal(near_duplicates(signatures[order]), expected)


def test_a_signature_sees_words_only():
    one = signature("How  do I, please, CLEAN my car?")
    assert (one.shape, one.dtype) == ((64,), np.uint32)
    for text in ("how do i please clean my car", "how do i please clean my\u2026car"):
        np.testing.assert_array_equal(one, signature(text))
    texts = ["", "???", "!", "hi", "hi there", "there hi", "a b c d e", "a b c d", "中文"]
    assert len(np.unique(signed(texts), axis=0)) == len(texts)
    assert (near_duplicates(signed(texts)) == -1).all()
    np.testing.assert_array_equal(signature(""), signature(" \n"))


def test_signatures_of_this_version_are_known():
    """Signatures decide which rows stay, so reports name the version that computed them."""
    assert METHOD.startswith(f"rensa {metadata.version('rensa')}")
    digests = [zlib.crc32(signature(text).tobytes()) for text in ("", "so be it", "é " * 9)]
    assert digests == [491254263, 2544225162, 3804926432]


def test_a_chain_does_not_drop_what_is_far_from_every_kept_row():
    a = np.arange(64, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    b[:10] += 1000  # a-b 54/64, b-c 54/64, a-c 44/64
    c[:20] = np.r_[b[:10], c[10:20] + 1000]
    d = a.copy()
    d[:13] += 5000  # a-d 51/64, just below 0.8
    for rows, expected in (
        ([a, b, c, c], [-1, 0, -1, 2]),
        ([b, a, c, c], [-1, 0, 0, 0]),
        ([a, c, b, b, c], [-1, -1, 0, 0, 1]),  # the first kept row, not the nearest
        ([a, d, d], [-1, -1, 1]),
    ):
        np.testing.assert_array_equal(near_duplicates(np.stack(rows)), expected)
    np.testing.assert_array_equal(near_duplicates(np.stack([a, b, c]), 44 / 64), [-1, 0, 0])
    np.testing.assert_array_equal(near_duplicates(np.stack([a, d, a]), 1.0), [-1, -1, 0])
    assert near_duplicates(np.empty((0, 64), np.uint32)).shape == (0,)


def test_the_rows_of_a_template_cost_no_square():
    """All rows share whole bands, and too few entries to be dropped; each is compared to 128."""
    rng = np.random.default_rng(0)
    template = np.repeat(signed(["the same prompt again and again"]), 4_000, axis=0)
    template[:, 40:] = rng.integers(0, 2**32, (4_000, 24), np.uint32)
    template[3_999, 40:60] = template[3, 40:60]
    repeated = near_duplicates(template)
    assert repeated[3_999] == 3
    assert (repeated[:3_999] == -1).all()
