"""The hub as a real HTTP server on this machine: downloads whole, cut, slow, refused; pushes."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
from flax import traverse_util
from hub_server import TOKEN, HubServer, Repo
from huggingface_hub import constants
from sample_tokenizers import train_model

from zephyr_jax.checkpoint import find_tokenizer, load_model, resolve
from zephyr_jax.config import MistralConfig
from zephyr_jax.data.tokenizer import SentencePieceTokenizer
from zephyr_jax.interop import hub_transfer
from zephyr_jax.interop.hub import check_login, download, push, split_name
from zephyr_jax.interop.huggingface import export_hf, load_hf
from zephyr_jax.models.mistral import param_shapes

NAME = "org/little"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in shards with an index, the largest of a few hundred kilobytes."""
    tok = SentencePieceTokenizer(train_model())
    cfg = dataclasses.replace(MistralConfig.tiny(), vocab_size=424, hidden_size=64)
    rng = np.random.default_rng(0)
    flat = {k: rng.normal(size=s).astype(np.float32) for k, s in param_shapes(cfg).items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    path = tmp_path_factory.mktemp("hub") / "model"
    return export_hf(cfg, params, tok, path, max_shard_bytes=150_000)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A server with the model and much that nobody wants, and an empty cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_transfer, "WAIT", 0.01)
    huggingface_hub.close_session()
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.repos[NAME] = Repo()
        extra = ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors")
        extra += ("model.Q4.gguf", "onnx/model.onnx", "notes.txt")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        server.repos[NAME].commit(files | dict.fromkeys(extra, b"x" * 100))
        yield server
    huggingface_hub.close_session()


@contextlib.contextmanager
def hub_offline():
    """As HF_HUB_OFFLINE=1, which the client reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


def largest(folder):
    """The largest weight file's name and size."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    return max(sizes.items(), key=lambda item: item[1])


def assert_same_model(a, b):
    (cfg_a, params_a), (cfg_b, params_b) = load_hf(a), load_hf(b)
    assert cfg_a == cfg_b
    for x, y in zip(jax.tree.leaves(params_a), jax.tree.leaves(params_b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def leftovers(tmp_path):
    return [p.name for p in (tmp_path / "cache").rglob("*.incomplete")]


def refused(match, name=NAME, revision=None):
    with pytest.raises(FileNotFoundError, match=match) as caught:
        download(name, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_download_holds_what_a_model_needs_and_nothing_else(hub, folder, tmp_path):
    got = download(NAME)
    assert got.name == hub.repos[NAME].refs["main"]
    wanted = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}
    assert {p.name: p.read_bytes() for p in got.iterdir()} == wanted
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 3
    assert_same_model(got, folder)
    assert not hub.asked("bin|gguf|onnx|consolidated|original|notes")
    weights = hub.asked("GET /cdn/")
    assert len(weights) == len([n for n in wanted if n.endswith(".safetensors")])
    assert not any(r.authorized for r in weights)  # another host, which the token is not for
    assert hub.asked("HEAD /org")[0].authorized
    assert not leftovers(tmp_path)
    hub.log.clear()
    assert download(NAME) == got
    assert not hub.asked("GET .*resolve|cdn")
    model = load_model(NAME)
    assert model.lineage == {"lineage": [f"ported from {NAME}@{got.name}"]}


def test_the_tokenizer_comes_without_the_weights(hub, folder):
    got = resolve(NAME, weights=False)
    assert find_tokenizer(got).digest == find_tokenizer(folder).digest
    assert not hub.asked("cdn")
    with hub_offline():
        assert resolve(NAME, weights=False) == got
        with pytest.raises(FileNotFoundError, match="is not whole in"):
            resolve(NAME)
    assert_same_model(resolve(NAME), folder)


def test_a_single_file_is_preferred_and_may_stand_alone(hub, folder, tmp_path):
    files = dict(hub.repos[NAME].files)
    cfg, params = load_hf(folder)
    tok = SentencePieceTokenizer(train_model())
    export_hf(cfg, params, tok, tmp_path / "single")
    files |= {p.name: p.read_bytes() for p in (tmp_path / "single").iterdir()}
    hub.repos[NAME].commit(files)
    got = download(NAME)
    assert [p.name for p in got.glob("*.safetensors")] == ["model.safetensors"]
    assert_same_model(got, folder)


def test_a_revision_is_pinned(hub, folder):
    repo = hub.repos[NAME]
    first, files = repo.refs["main"], repo.files
    repo.refs["v1"] = first
    config = json.loads(files["config.json"]) | {"rms_norm_eps": 0.5}
    second = repo.commit(files | {"config.json": json.dumps(config).encode()})
    for name, revision, commit in (
        (NAME, None, second),
        (NAME, "v1", first),
        (f"{NAME}@v1", None, first),
        (f"{NAME}@{first}", None, first),
        (f"{NAME}@main", "main", second),
    ):
        got = download(name, revision)
        assert got.name == commit
        assert (load_hf(got)[0].rms_norm_eps == 0.5) == (commit == second)
    assert load_model(NAME, revision="v1").lineage["lineage"] == [f"ported from {NAME}@{first}"]
    assert load_model(f"{NAME}@v1").lineage["lineage"] == [f"ported from {NAME}@{first}"]
    hub.log.clear()
    assert download(NAME, first).name == first
    assert not hub.log  # what a commit holds never changes
    for name, revision in ((f"{NAME}@v1", "v2"), (f"{NAME}@", None)):
        with pytest.raises(ValueError, match="give one of them|has to follow"):
            split_name(name, revision)
    with pytest.raises(ValueError, match="revision v1 belongs to a hub id"):
        load_model(folder, revision="v1")


def test_a_cut_file_goes_on_where_it_stopped(hub, folder):
    file, size = largest(folder)
    hub.fault(f"GET /cdn/.*{file}", cut=70_000)
    hub.fault(f"GET /cdn/.*{file}", cut=120_001)
    got = download(NAME)
    assert [r.start for r in hub.asked(f"GET /cdn/.*{file}")] == [0, 70_000, 120_001]
    assert size > 120_001
    assert_same_model(got, folder)


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(hub, folder, tmp_path):
    file, _ = largest(folder)
    hub.fault(f"GET /cdn/.*{file}", times=100, cut=90_000)
    said = refused("could not be fetched from http.* the same command goes on from what has come")
    assert "peer closed connection" in said
    assert len(hub.asked(f"GET /cdn/.*{file}")) == 1 + hub_transfer.TRIES
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    assert partial.stat().st_size == 90_000
    with pytest.raises(FileNotFoundError):  # and nothing of it is taken for a model
        load_model(NAME)
    hub.faults.clear()
    hub.log.clear()
    assert_same_model(download(NAME), folder)
    assert [r.start for r in hub.asked(f"GET /cdn/.*{file}")] == [90_000]
    assert not leftovers(tmp_path)


def test_a_server_without_ranges_begins_anew(hub, folder):
    file, _ = largest(folder)
    hub.fault(f"GET /cdn/.*{file}", cut=70_000)
    hub.fault(f"GET /cdn/.*{file}", ranges=False)
    assert_same_model(download(NAME), folder)


def test_wrong_bytes_are_fetched_again_and_never_kept(hub, folder, tmp_path):
    file, _ = largest(folder)
    hub.fault(f"GET /cdn/.*{file}", flip=True)
    assert_same_model(download(NAME), folder)
    assert [r.start for r in hub.asked(f"GET /cdn/.*{file}")] == [0, 0]
    shutil.rmtree(tmp_path / "cache")
    hub.fault(f"GET /cdn/.*{file}", times=2, flip=True)
    refused("twice with other bytes than the hub announced")
    assert not leftovers(tmp_path)
    assert_same_model(download(NAME), folder)


def test_slow_and_silent_servers(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    slow, size = largest(folder)
    silent = next(p.name for p in folder.glob("*.safetensors") if p.name != slow)
    hub.fault(f"GET /cdn/.*{slow}", pause=0.04)  # never silent, but longer than the timeout in all
    hub.fault(f"GET /cdn/.*{silent}", stall=0.6)
    assert_same_model(download(NAME), folder)
    assert size / 10_000 * 0.04 > 0.3
    assert [r.start for r in hub.asked(f"GET /cdn/.*{slow}")] == [0]
    assert [r.start for r in hub.asked(f"GET /cdn/.*{silent}")] == [0, 10_000]


def test_a_hub_that_stumbles_is_asked_again(hub, folder):
    for pattern in ("GET /api/models", f"HEAD /{NAME}/resolve/.*safetensors$", "GET /cdn/"):
        hub.fault(pattern, status=503)
    assert_same_model(download(NAME), folder)
    assert len(hub.asked("GET /api/models")) == 2


def test_what_the_hub_refuses_is_said_in_one_line(hub, monkeypatch):
    refused(
        "no/such is not a model: .*check the spelling or, where it is private, log in", "no/such"
    )
    refused("has no revision v9 at http", revision="v9")
    hub.repos[NAME].gated = True
    refused(f"is gated: accept its licence at {hub.url}/{NAME}, then log in .*HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "another")
    refused("is gated")
    hub.repos[NAME].gated = False
    hub.fault("GET /api/models", status=401)
    refused("refuses org/little: log in")
    hub.fault(f"HEAD /{NAME}/resolve", status=403)
    refused("refuses org/little: log in")
    hub.repos[NAME].private = True
    refused("where it is private, log in")
    with pytest.raises(FileNotFoundError, match="no/such is not a model"):
        load_model("no/such")
    for name in ("nowhere", "a/b/c", "./a/b", "runs/none"):
        with pytest.raises(FileNotFoundError, match="is not a model: expected a workdir"):
            load_model(name)
    assert not hub.asked("nowhere|runs|a/b")
    refused("sp ace/x is not a model", "sp ace/x")


def test_repositories_without_safetensors_say_what_to_do(hub):
    files = hub.repos[NAME].files
    bare = {k: v for k, v in files.items() if "safetensors" not in k}
    for kind, match in ((".gguf", "only .bin files"), (".bin", "GGUF files and name that file")):
        kept = {k: v for k, v in bare.items() if not k.endswith(kind)}
        hub.repos["org/other"] = Repo()
        hub.repos["org/other"].commit(kept)
        refused(match, "org/other")
    hub.repos["org/other"].commit({k: v for k, v in files.items() if "00002-of" not in k})
    refused(f"lacks model-00002-of-.*, which its {INDEX} names", "org/other")
    assert not hub.asked("cdn/org/other")


def test_without_a_network_a_whole_cache_serves_and_a_part_does_not(hub, folder, monkeypatch):
    file, _ = largest(folder)
    hub.fault(f"GET /cdn/.*{file}", times=100, cut=10)
    refused("could not be fetched")
    hub.faults.clear()
    with hub_offline():
        refused("could not be fetched from .*offline mode is enabled.*is not whole in")
    got = download(NAME)
    said = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *args: said.append(text % args))
    with hub_offline():
        assert download(NAME) == got
    for status in (503, 429):
        hub.fault("GET /api/models", status=status, times=1)
        assert download(NAME) == got
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
        assert download(NAME) == got
        huggingface_hub.close_session()
    assert len(said) == 4
    assert all(f"{NAME} at {got.name} is taken from the cache" in line for line in said)


def test_a_push_leaves_exactly_the_folder(hub, folder, tmp_path):
    check_login("org/new")
    assert push(folder, "org/new") == f"{hub.url}/org/new"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repo = hub.repos["org/new"]
    assert repo.private
    assert {k: v for k, v in repo.files.items() if k != ".gitattributes"} == files
    assert len(repo.commits) == 2  # one for everything, so nothing half-written is ever seen
    got = download("org/new")
    assert_same_model(got, folder)
    # Another export in its place: its weights replace the others, what is not ours stays.
    repo.commit(repo.files | {"notes.md": b"mine"})
    cfg, params = load_hf(folder, dtype="bfloat16")
    tok = SentencePieceTokenizer(train_model())
    export_hf(cfg, params, tok, tmp_path / "one", dtype="bfloat16")
    push(tmp_path / "one", "org/new", private=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert repo.files == files | {"notes.md": b"mine", ".gitattributes": b"*.safetensors lfs"}
    assert repo.private  # an existing one stays as it is
    push(tmp_path / "one", "me/public", private=False)
    assert not hub.repos["me/public"].private


def test_a_push_of_one_file_deletes_nothing(hub, tmp_path):
    before = hub.repos[NAME].files
    (tmp_path / "little-F32.gguf").write_bytes(b"GGUF")
    push(tmp_path / "little-F32.gguf", NAME)
    assert hub.repos[NAME].files == before | {"little-F32.gguf": b"GGUF"}


def test_a_failed_push_says_how_to_repeat_it(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.fault("POST /api/models/.*/commit", status=500)
    push(folder, "org/new")  # asked once more
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {k: v for k, v in hub.repos["org/new"].files.items() if k != ".gitattributes"} == files
    hub.uploaded.clear()
    hub.fault("PUT /lfs", status=500, times=100)
    with pytest.raises(ValueError, match=r"is whole, but its upload to org/other failed: .* '500"):
        push(folder, "org/other")
    assert set(hub.repos["org/other"].files) == {".gitattributes"}


def test_nobody_works_for_a_push_that_cannot_be(hub, monkeypatch, tmp_path):
    for name in ("little", "a/b/c", "org/x@main", "/x", "org/"):
        with pytest.raises(ValueError, match="cannot be pushed to; name it org/name"):
            check_login(name)
    with pytest.raises(ValueError, match="me cannot push to other/x, only to me, org"):
        check_login("other/x")
    hub.role = "read"
    with pytest.raises(ValueError, match="token of me may only read; make one that may write"):
        check_login("org/x")
    hub.role = "fineGrained"
    check_login("other/x")  # only the hub knows
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match="does not accept the login: Invalid user token"):
        check_login("org/x")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="a push to org/x needs an account: log in"):
        check_login("org/x")


def test_the_command_line_through_hf_endpoint(hub, folder, tmp_path):
    """A process of its own, as a user starts it: hub -> checkpoint -> hub."""
    first = hub.repos[NAME].refs["main"]
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "XLA_FLAGS": "",
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)

    def run(*words):
        command = [sys.executable, "-m", "zephyr_jax", "port_weights", *words]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )

    done = run("export", NAME, "back", "--revision=main", "--dtype=float32", "--push=org/back")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/org/back" in done.stderr
    assert_same_model(tmp_path / "back", folder)
    files = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    pushed = hub.repos["org/back"].files
    assert {k: v for k, v in pushed.items() if k != ".gitattributes"} == files
    card = files["README.md"].decode()
    assert f"1. ported from {NAME}@{first}" in card
    assert f'base_model: "{NAME}"' in card
