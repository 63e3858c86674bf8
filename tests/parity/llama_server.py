"""llama.cpp in this process (the package xllamacpp), queried over HTTP like by any client."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp comes with make parity")


class LlamaServer:
    """A server with one GGUF file, stopped when it is collected; keys and values are float32."""

    def __init__(self, path: Path, context: int = 1024) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.prefill_assistant = False  # a last answer is a turn like any
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def ask(self, route: str, **body: Any) -> Any:
        """The server's answer."""
        address = f"{self._server.listening_address}/{route}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str, specials: bool, bos: bool = False) -> list[int]:
        """The ids of a text; with `specials` its literal special tokens are tokens."""
        body = {"content": text, "parse_special": specials, "add_special": bos}
        return self.ask("tokenize", **body)["tokens"]

    def chat_ids(self, messages: list[dict], add_generation_prompt: bool) -> list[int]:
        """The ids of a chat in the file's own template, as the server itself feeds them."""
        options = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self.tokenize(self.ask("apply-template", **options)["prompt"], True, bos=True)

    def logps(self, ids: list[int], vocab: int) -> np.ndarray:
        """The log-probabilities of all tokens that may follow."""
        # The server reports none where the end of the text or half a character is drawn, so the
        # bias draws an "e"; the probabilities are those before the bias.
        drawn = {"logit_bias": [[self.tokenize("e", specials=False)[-1], 1000.0]]}
        answer = self._complete(ids, n_predict=1, n_probs=vocab, **drawn)
        steps = answer["completion_probabilities"]
        out = np.full(vocab, np.nan)
        for token in steps[0]["top_logprobs"]:
            out[token["id"]] = token["logprob"]
        assert not np.isnan(out).any(), "llama.cpp left tokens out"
        return out

    def greedy(self, ids: list[int], n: int) -> tuple[list[int], list[float]]:
        """The likeliest continuation, and by how much each token leads the second."""
        answer = self._complete(ids, n_predict=n, n_probs=2, ignore_eos=False)
        steps = [step["top_logprobs"] for step in answer["completion_probabilities"]]
        gaps = [first["logprob"] - second["logprob"] for first, second in steps]
        return [step[0]["id"] for step in steps], gaps

    def _complete(self, ids: list[int], **options: Any) -> Any:
        plain = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
        return self.ask("completion", prompt=ids, **plain, **options)
