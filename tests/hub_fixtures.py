"""A small model and a hub that serves it, for the tests of the hub."""

import contextlib

import huggingface_hub
import pytest
from hub_server import TOKEN, HubServer, Repo
from huggingface_hub import constants
from port_files import assert_same_tree, random_tree, small_config

from zephyr_jax.weights.huggingface import export_hf, load_hf

NAME = "org/little"


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    """A model in shards with an index, the largest of a few hundred kilobytes."""
    cfg = small_config(hidden_size=64)
    path = tmp_path_factory.mktemp("hub") / "model"
    return export_hf(cfg, random_tree(cfg), toy, path, max_shard_bytes=150_000)


@contextlib.contextmanager
def serving(tmp_path, monkeypatch):
    """An empty server and an empty cache; no waiting between two tries."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _: None)
    huggingface_hub.close_session()
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A server with the model and much that is not needed, and an empty cache."""
    with serving(tmp_path, monkeypatch) as server:
        server.repos[NAME] = Repo()
        extra = ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors")
        extra += ("model.Q4.gguf", "onnx/model.onnx", "notes.txt")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        server.repos[NAME].commit(files | dict.fromkeys(extra, b"x" * 100))
        yield server


@contextlib.contextmanager
def hub_offline():
    """As HF_HUB_OFFLINE=1, which the client reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


def assert_same_model(a, b):
    (cfg_a, params_a), (cfg_b, params_b) = load_hf(a), load_hf(b)
    assert cfg_a == cfg_b
    assert_same_tree(params_a, params_b)
