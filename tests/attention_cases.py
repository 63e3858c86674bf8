"""Rows for the tests of attention, and attention in float64 NumPy, from the rule's own words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from zephyr_jax.models.attention import attention_over


class Case(NamedTuple):
    """Who may see whom (int32 `B T`), and which queries are tokens at all."""

    segments: np.ndarray
    branches: np.ndarray
    positions: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """True where there is a token: what attention gives elsewhere is never read."""
        return self.segments > 0


def pair(trunk: int, chosen: int, rejected: int) -> list[tuple[int, int]]:
    """(branch, position) of each token of a preference pair."""
    out = [(0, p) for p in range(trunk)]
    return out + [(b, trunk + i) for b, n in ((1, chosen), (2, rejected)) for i in range(n)]


def dialogue(n: int) -> list[tuple[int, int]]:
    """(branch, position) of each token of a document without branches."""
    return pair(n, 0, 0)


def packed(rows: list[list[list[tuple[int, int]]]], t: int) -> Case:
    """Rows of documents, filled up to `t` with padding."""
    out = np.zeros((3, len(rows), t), np.int32)
    for i, documents in enumerate(rows):
        at = 0
        for k, document in enumerate(documents):
            for branch, position in document:
                out[:, i, at] = k + 1, branch, position
                at += 1
    return Case(*out)


def pairs_and_padding(t: int) -> Case:
    """Pairs behind other documents, a row that one document fills, and one of padding alone."""
    return packed(
        [
            [dialogue(t // 5), pair(t // 4, t // 8, t // 5)],
            [pair(t // 4, t // 8, t // 9), pair(0, 3, 2), pair(t // 6, 1, t // 7)],
            [],
            [pair(t - 2 * (t // 3), t // 3, t // 3)],
        ],
        t,
    )


def dialogues_and_padding(t: int) -> Case:
    """Several dialogues a row, one a row, one token, and padding alone."""
    rows = [
        [dialogue(t // 3), dialogue(t // 2)],
        [dialogue(t)],
        [],
        [dialogue(1), dialogue(t // 4)],
    ]
    return packed(rows, t)


def sees(case: Case, row: int, query: int, key: int, window: int | None) -> bool:
    """The rule: same document, not later, in the trunk or the own branch, inside the window."""
    segments, branches, positions = (x[row] for x in case)
    same_document = segments[query] == segments[key] and segments[key] != 0
    own = branches[key] == 0 or branches[key] == branches[query]
    near = window is None or positions[query] - positions[key] < window
    return bool(same_document and key <= query and own and near)


def table(case: Case, window: int | None) -> np.ndarray:
    """`B T T`, True where `sees`."""
    b, t = case.segments.shape
    rows = [[[sees(case, i, q, k, window) for k in range(t)] for q in range(t)] for i in range(b)]
    return np.array(rows)


def reference(q, k, v, mask, cotangent):
    """Attention `B T K G H` and its gradients for q, k, v, in float64; 0 where no key is seen."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    scores = np.einsum("btkgh,bskh->bkgts", q, k) / np.sqrt(q.shape[-1])
    mask = mask[:, None, None]
    top = np.where(mask, scores, -np.inf).max(axis=-1, keepdims=True)
    weights = np.where(mask, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    out = np.einsum("bkgts,bskh->btkgh", weights, v)
    dv = np.einsum("bkgts,btkgh->bskh", weights, cotangent)
    dweights = np.einsum("btkgh,bskh->bkgts", cotangent, v)
    dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
    dscores /= np.sqrt(q.shape[-1])
    dq = np.einsum("bkgts,bskh->btkgh", dscores, k)
    return out, dq, np.einsum("bkgts,btkgh->bskh", dscores, q), dv


def attention(q, k, v, layout, window, implementation):
    """The attention of these arrays."""
    return attention_over(layout, window, implementation, q.shape[-1], str(q.dtype))(q, k, v)
