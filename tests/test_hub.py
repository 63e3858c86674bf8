"""Downloads from a real HTTP server on this machine: whole, cut, slow, refused, offline."""

import hashlib
import json
import shutil

import hub_fixtures
import huggingface_hub
import pytest
from hub_fixtures import NAME, assert_same_model, hub_offline
from hub_server import Repo
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from sample_tokenizers import train_model

from zephyr_jax import hub as hub_transfer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.hub import split_name
from zephyr_jax.weights.checkpoint import find_tokenizer, load_model, resolve
from zephyr_jax.weights.hub import download
from zephyr_jax.weights.huggingface import export_hf, load_hf
from zephyr_jax.weights.safetensors import INDEX

folder, hub = hub_fixtures.folder, hub_fixtures.hub


def largest(folder):
    """The largest weight file's name and size."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    return max(sizes.items(), key=lambda item: item[1])


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
    files = {k: v for k, v in files.items() if k != "generation_config.json"}
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
        assert (got / "generation_config.json").exists() == (commit == first)
    assert load_model(NAME, revision="v1").lineage["lineage"] == [f"ported from {NAME}@{first}"]
    assert load_model(f"{NAME}@v1").lineage["lineage"] == [f"ported from {NAME}@{first}"]
    hub.log.clear()
    assert download(NAME, first).name == first
    assert not hub.log  # what a commit holds never changes
    third = repo.commit(files | {"config.json": files["config.json"] + b" "})
    assert download(NAME).name == third  # a branch is asked for anew
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
    assert [r.start for r in hub.asked(f"GET /cdn/.*{file}")] == [0, 70_000]


def test_wrong_bytes_are_fetched_again_and_never_kept(hub, folder, tmp_path):
    file, _ = largest(folder)
    hub.fault(f"GET /cdn/.*{file}", flip=True)
    assert_same_model(download(NAME), folder)
    assert [r.start for r in hub.asked(f"GET /cdn/.*{file}")] == [0, 0]
    shutil.rmtree(tmp_path / "cache")
    hub.fault(f"GET /cdn/.*{file}", times=2, flip=True)
    refused("twice with other bytes than the hub announced")
    # Of the other files, whose streams end with this one's error, a part may be there.
    wrong = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    assert f"{wrong}.incomplete" not in leftovers(tmp_path)
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
    refused(f"is gated: accept its license at {hub.url}/{NAME}, then log in .*HF_TOKEN")
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


def test_offline_is_no_fault_that_passes(monkeypatch):
    asked = []

    def ask():
        asked.append(1)
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(hub_transfer, "_wait", lambda *_: None)
    with pytest.raises(OfflineModeIsEnabled):
        hub_transfer.patiently(ask)
    assert len(asked) == 1


def test_without_a_network_a_whole_cache_serves_and_a_part_does_not(hub, folder, monkeypatch):
    file, _ = largest(folder)
    hub.fault(f"GET /cdn/.*{file}", times=100, cut=10)
    refused("could not be fetched")
    hub.faults.clear()
    with hub_offline(), monkeypatch.context() as patch:
        patch.setattr(hub_transfer, "_wait", lambda *_: pytest.fail("waited, though offline"))
        said = refused(f"HF_HUB_OFFLINE is set and {NAME} is not whole in .*; unset it")
        assert "goes on" not in said
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
