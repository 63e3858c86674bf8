"""Eight fake CPU devices, exact matmuls, no silent rank promotion, runtime-checked annotations."""

import os
import signal
import sys
from collections import Counter
from pathlib import Path

# Test files import each other's cases, whatever room they are in.
sys.path[:0] = [str(path) for path in Path(__file__).parent.iterdir() if path.is_dir()]

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the suite's time: these leave out LLVM's passes, and the newer and slower one
# of XLA's two ways to compile a fusion on a CPU, where it still has both.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)

from jaxtyping import install_import_hook

# Only modules whose annotations are arrays: the hook costs import time.
_CHECKED = [
    f"zephyr_jax.{name}"
    for name in (
        *("losses.tokens", "training.steps", "inference.sampling", "models.layers"),
        *("models.attention", "models.cache", "models.mistral"),
    )
]
install_import_hook(_CHECKED, "beartype.beartype")

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raw_rows import write_raw, write_world
from sample_tokenizers import mistral_tokenizer, train_model

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same small step; the second one, of any worker and any run, finds it here.
_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
    Path(__file__).parents[1] / ".jax_cache"
)
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.data.packing import packing
from zephyr_jax.data.text import chat
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.demo import corpus
from zephyr_jax.types import Rows


@pytest.fixture(scope="session", autouse=True)
def no_trials():
    """Chat templates of tests are not tried in a process of their own, but for a test of that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "trial", lambda *_: "")
        yield


@pytest.fixture(scope="session")
def cfg() -> zj.MistralConfig:
    """Every dimension different; a window shorter than the sequences that the tests use."""
    return dataclasses.replace(zj.MistralConfig.tiny(), sliding_window=5, initializer_range=0.2)


def random_params(cfg):
    """Large weights and norm scales that are not 1, so that nothing cancels by luck."""
    params = zj.init_params(cfg, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 3))
    layers = params["layers"]
    for tree, name in ((layers, "attention_norm"), (layers, "mlp_norm"), (params, "final_norm")):
        tree[name] = tree[name] + 0.3 * jax.random.normal(next(keys), tree[name].shape)
    return params


@pytest.fixture(scope="session")
def params(cfg):
    return random_params(cfg)


@pytest.fixture(scope="session")
def tok(tmp_path_factory) -> zj.Tokenizer:
    """A SentencePiece model of 380 pieces, trained on the embedded corpus."""
    root = tmp_path_factory.mktemp("tok")
    corpus.write_ultrachat(root / "u", 60, 0)
    path = root / "tokenizer.model"
    corpus.train_tokenizer(corpus.tokenizer_lines(root / "u"), path, 380)
    return zj.Tokenizer.from_file(path)


@pytest.fixture(scope="session")
def hf_folder(cfg, tok, tmp_path_factory) -> Path:
    """A small random model with 256 positions as a Hugging Face folder."""
    sizes = {"max_position_embeddings": 256, "num_hidden_layers": 1}
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size, **sizes)
    return zj.export_hf(cfg, random_params(cfg), tok, tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="session")
def toy() -> zj.Tokenizer:
    """The SentencePiece model of `train_model`."""
    return SentencePieceTokenizer(train_model())


@pytest.fixture(scope="session")
def mistral() -> zj.Tokenizer:
    return mistral_tokenizer()


@pytest.fixture(params=["toy", "mistral"])
def sp_tok(request) -> zj.Tokenizer:
    """Either SentencePiece tokenizer."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def raw(tmp_path) -> Path:
    """Raw files of 80 dialogues."""
    return write_raw(tmp_path / "raw")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Raw records, a tokenizer and both prepared sets of a little world."""
    return write_world(tmp_path_factory.mktemp("world"), 400)


@pytest.fixture(scope="session")
def sft_run(world, tmp_path_factory):
    """Ten steps of SFT on one device, with checkpoints of steps 5 and 10; copy it to change it."""
    from runs import config_of, finished

    return finished(config_of(world, "sft"), tmp_path_factory.mktemp("sft") / "run%41 #?")


@pytest.fixture(scope="session")
def dpo_run(world, tmp_path_factory):
    """Ten steps of DPO from random weights on one device; copy it to change it."""
    from runs import config_of, finished

    return finished(config_of(world, "dpo"), tmp_path_factory.mktemp("dpo") / "run")


@pytest.fixture
def cache_events():
    """How often JAX's cache was asked for a program, and had it."""
    seen = Counter()

    def count(name, **_):
        seen[name.removeprefix("/jax/compilation_cache/")] += 1

    jax.monitoring.register_event_listener(count)
    yield seen
    jax.monitoring.unregister_event_listener(count)


def device_mesh(*shape: int) -> jax.sharding.Mesh:
    """The first devices as an explicit mesh of these sizes: data, fsdp, tensor."""
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=explicit)


NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


MESHES = [
    pytest.param((1, 2, 2), id="1x2x2"),
    pytest.param((1, 1, 1), id="1x1x1", marks=pytest.mark.slow),
    pytest.param((2, 2, 2), id="2x2x2", marks=pytest.mark.slow),
]


@pytest.fixture(params=MESHES)
def sharded_mesh(request):
    """Four devices; in the slow suite also one and eight. The test runs inside it."""
    with jax.set_mesh(device_mesh(*request.param)):
        yield


@pytest.fixture(params=[pytest.param(None, id="no mesh"), *MESHES])
def mesh(request):
    """No mesh, and those of `sharded_mesh`. The test runs inside it."""
    if request.param is None:
        yield None
        return
    with jax.set_mesh(device_mesh(*request.param)):
        yield jax.sharding.get_mesh()


@pytest.fixture(scope="module")
def one_device():
    """The module's tests, and its own fixtures, run on a mesh of the first device."""
    with jax.set_mesh(device_mesh(1, 1, 1)):
        yield


@pytest.fixture
def refused(capsys):
    """The one line on stderr with which a command refuses."""

    def refuse(*words):
        with pytest.raises(SystemExit, match="^2$"):
            main([*map(str, words)])
        (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
        return line

    return refuse


def with_fields(config, **changes):
    """The config with other values; a dict replaces fields of a section, such as `train`."""
    for name, value in changes.items():
        if isinstance(value, dict):
            changes[name] = dataclasses.replace(getattr(config, name), **value)
    return dataclasses.replace(config, **changes)


def random_pair(rng, vocab=104, prompt=6, chosen=5, rejected=7, pair_id=1):
    """(prompt, chosen, rejected) ids and their document."""
    parts = [list(map(int, rng.integers(3, vocab, n))) for n in (prompt, chosen, rejected)]
    return (*parts, packing.pair_document(*parts, pair_id))


def stack_rows(rows) -> Rows:
    """Rows as the steps take them, from a list of structured rows."""
    return Rows(*map(jnp.asarray, packing.row_arrays(np.stack(rows))))
