"""Every cell of the parity matrix in transformers: torch, float32, eager attention.

`errors(cell)` is the comparison; test_matrix.py holds it against TOLERANCES, and
make_parity_table.py writes it into docs/parity.md. What a dozen cells give is stored for
`make test`, which needs neither torch nor transformers, by

    PYTHONPATH=.:tests python tests/parity/matrix.py
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import transformers
from cells import DOZEN, ORACLE, Batch, Cell, Outputs, batch, ours, sample, weights

# Float32 against float32 with other orders of summation; docs/parity.md has the measured errors.
TOLERANCES = {
    "logits": 5e-5,  # absolute
    "logits, relative": 1e-4,  # |error| / (0.1 + |logit|), that is rtol 1e-4 and atol 1e-5
    "packed pass": 5e-5,  # absolute: logits of a packed layout against torch's own packed rows
    "logps": 5e-5,  # absolute, nats
    "loss": 1e-5,  # relative
    "gradients": 1e-4,  # relative to the largest entry of each parameter's gradient
}
ATTENTIONS = ("einsum", "tiled")  # those that run on a CPU


def errors(cell: Cell, **options: Any) -> dict[str, float]:
    """The largest error of every quantity of TOLERANCES; `options` are of `zj.ForwardOptions`."""
    got, want = ours(cell, **options), theirs(cell)
    assert np.abs(want.logits).max() > 3, f"{cell}: the logits are too small to show a difference"
    assert got.grads.keys() == want.grads.keys(), f"{cell}: gradients of other parameters"
    relative = np.abs(got.logits - want.logits) / (0.1 + np.abs(want.logits))
    found = {
        "logits": _largest(got.logits, want.logits),
        "logits, relative": float(relative.max()),
        "logps": _largest(got.logps, want.logps),
        "loss": abs(got.loss - want.loss) / abs(want.loss),
        "gradients": max(_relative(got.grads[name], want.grads[name]) for name in want.grads),
    }
    if cell.layout == "packed":
        # With the documents separated by a mask, and by their positions as transformers does.
        passes = ({"attention_mask": _mask(cell)}, {"use_cache": False})
        found["packed pass"] = max(_largest(got.logits, _one_pass(cell, x)) for x in passes)
    return found


def _largest(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max())


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    largest = np.abs(want).max()
    assert largest > 0, "a gradient that is 0 everywhere shows nothing"
    return _largest(got, want) / float(largest)


@functools.cache
def theirs(cell: Cell) -> Outputs:
    """Logits, log-probs of the targets, transformers' own loss, and torch's gradients.

    Padded rows run as one batch under an attention mask, and packed documents each alone.
    """
    rows, model = batch(cell), _model(cell)
    logits = np.zeros((*rows.tokens.shape, cell.cfg.vocab_size), np.float32)
    logps = np.zeros(rows.tokens.shape, np.float32)
    targets, loss = int(rows.loss_mask.sum()), 0.0
    for place, inputs in _calls(cell, rows):
        ids = torch.tensor(rows.tokens[place], dtype=torch.long)
        labels = torch.where(torch.tensor(rows.loss_mask[place]), ids, -100)
        out = model(ids, labels=labels, num_items_in_batch=targets, **inputs)
        out.loss.backward()
        loss += out.loss.item()
        logits[place] = out.logits.detach().numpy()
        of_next = out.logits.detach().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        logps[place][:, 1:] = of_next.numpy()
    logits[rows.segments == 0] = 0
    logps[~rows.loss_mask] = 0
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return Outputs(logits, logps, loss, grads)


def _model(cell: Cell) -> Any:
    torch.set_num_threads(1)
    cfg = cell.cfg
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    same += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    same += ("rms_norm_eps", "sliding_window", "tie_word_embeddings", "bos_token_id")
    config = transformers.MistralConfig(
        **{name: getattr(cfg, name) for name in same},
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        eos_token_id=cfg.eos_token_id,
    )
    model = transformers.MistralForCausalLM._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    state = {name: torch.tensor(array) for name, array in weights(cell).items()}
    if cell.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    return model.eval()


def _calls(cell: Cell, rows: Batch) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """What transformers runs in one call: an index of whole rows or of a document, and inputs."""
    everything = (slice(None), slice(None))
    seen = torch.tensor(rows.segments > 0, dtype=torch.long)
    if cell.layout == "full":
        return [(everything, {})]
    if cell.layout == "right":
        return [(everything, {"attention_mask": seen})]
    if cell.layout == "left":
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        return [(everything, {"attention_mask": seen, "position_ids": positions})]
    documents = []
    for row, segments in enumerate(rows.segments):
        for k in range(1, segments.max() + 1):
            start, stop = np.flatnonzero(segments == k)[[0, -1]]
            documents.append(((slice(row, row + 1), slice(start, stop + 1)), {}))
    return documents


def _positions(rows: Batch) -> torch.Tensor:
    """Positions that restart at every document, and at the padding."""
    out = np.zeros_like(rows.segments)
    for row, segments in enumerate(rows.segments):
        for k in np.unique(segments):
            out[row, segments == k] = np.arange((segments == k).sum())
    return torch.tensor(out, dtype=torch.long)


def _mask(cell: Cell) -> torch.Tensor:
    """The additive mask `B 1 T T` of the packed rows."""
    rows = batch(cell)
    seen = np.zeros((len(rows.segments), 1, cell.length, cell.length), bool)
    for row, segments in enumerate(rows.segments):
        for query in range(cell.length):
            first = 0 if cell.window is None else max(0, query - cell.window + 1)
            for key in range(first, query + 1):
                seen[row, 0, query, key] = segments[key] == segments[query]
    return torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)


def _one_pass(cell: Cell, inputs: dict[str, Any]) -> np.ndarray:
    """Logits of the packed rows in one call, 0 at padding."""
    rows = batch(cell)
    ids = torch.tensor(rows.tokens, dtype=torch.long)
    with torch.no_grad():
        out = _model(cell)(ids, position_ids=_positions(rows), **inputs)
    return np.where(rows.segments[:, :, None] > 0, out.logits.numpy(), 0)


def store() -> None:
    """Writes what the dozen cells give."""
    arrays: dict[str, Any] = {}
    for cell in DOZEN:
        out = theirs(cell)
        arrays |= {f"{cell}/logits": out.logits, f"{cell}/loss": out.loss}
        arrays |= {f"{cell}/grad/{name}": sample(grad) for name, grad in out.grads.items()}
    np.savez_compressed(ORACLE, **arrays)


if __name__ == "__main__":
    store()
