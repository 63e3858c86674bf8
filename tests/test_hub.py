"""A hub on this machine: models from it (complete, cut, refused, offline), and pushes to it."""

import json
import re

import hub_server
import pytest
from hub_server import NAME, Fault, Repo, assert_same_model, hub_offline
from huggingface_hub import constants

from zephyr_jax import hub as hub_module
from zephyr_jax.__main__ import main
from zephyr_jax.hub import check_login, push, split_name
from zephyr_jax.weights.huggingface import export_hf, load_hf
from zephyr_jax.weights.sources import download, find_tokenizer, load_model, resolve

folder, hub = hub_server.folder, hub_server.hub


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(match, name=NAME):
    with pytest.raises(FileNotFoundError, match=match) as caught:
        download(name)
    assert "\n" not in str(caught.value)


def test_a_download_holds_what_a_model_needs_and_nothing_else(hub, folder):
    path = download(NAME)
    assert path.name == hub.repos[NAME].refs["main"]
    expected = contents(folder)
    del expected["README.md"], expected["digests.json"]
    assert contents(path) == expected
    assert len([name for name in expected if name.endswith(".safetensors")]) > 3
    assert_same_model(path, folder)
    assert not hub.requests("bin|gguf|onnx|consolidated|original|notes")
    hub.log.clear()
    assert download(NAME) == path
    assert not hub.requests("resolve")
    assert load_model(NAME).lineage == {"lineage": [f"ported from {NAME}@{path.name}"]}


def test_the_tokenizer_comes_without_the_weights(hub, folder):
    path = resolve(NAME, weights=False)
    assert find_tokenizer(path).digest == find_tokenizer(folder).digest
    assert not hub.requests("safetensors$")
    with hub_offline():
        assert resolve(NAME, weights=False) == path
        with pytest.raises(FileNotFoundError, match="is not complete in"):
            resolve(NAME)
    assert_same_model(resolve(NAME), folder)


def test_a_single_file_is_preferred_to_shards(hub, folder, toy, tmp_path):
    cfg, params = load_hf(folder)
    export_hf(cfg, params, toy, tmp_path / "single")
    hub.repos[NAME].commit(hub.repos[NAME].files | contents(tmp_path / "single"))
    assert [p.name for p in download(NAME).glob("*.safetensors")] == ["model.safetensors"]


def test_a_revision_is_pinned(hub, folder):
    repo = hub.repos[NAME]
    first, files = repo.refs["main"], repo.files
    repo.refs["v1"] = first
    config = json.loads(files["config.json"]) | {"rms_norm_eps": 0.5}
    second = repo.commit(files | {"config.json": json.dumps(config).encode()})
    for revision, commit in {"": second, "@v1": first, f"@{first}": first, "@main": second}.items():
        path = download(NAME + revision)
        assert path.name == commit
        assert (load_hf(path)[0].rms_norm_eps == 0.5) == (commit == second)
    assert load_model(f"{NAME}@v1").lineage["lineage"] == [f"ported from {NAME}@{first}"]
    hub.log.clear()
    assert download(f"{NAME}@{first}").name == first
    assert not hub.log  # the content of a commit never changes
    with pytest.raises(ValueError, match="has to follow"):
        split_name(f"{NAME}@")


def test_a_bad_connection_and_a_failing_hub_are_retried(hub, folder):
    shard = next(folder.glob("model-00002*.safetensors")).name
    hub.faults += [
        Fault("GET /api/models/[^/]*/[^/]*/tree", status=503),
        Fault(f"HEAD .*{shard}", status=503),
        Fault(f"GET .*{shard}", cut=7_000),
        Fault("GET .*tokenizer.model", status=500),
    ]
    assert_same_model(download(NAME), folder)
    assert not any(fault.times for fault in hub.faults)
    hub.faults += [Fault("GET /api/models", status=503, times=hub_module.TRIES - 1)]
    hub.repos["org/other"] = hub.repos[NAME]
    assert_same_model(download("org/other"), folder)


def test_a_download_that_is_not_what_the_hub_has_is_named(hub, folder):
    path = download(NAME)
    for name in ("config.json", next(folder.glob("model-00002*")).name):
        file = (path / name).resolve()
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"{name} is not what http.* has: remove it, and"):
            download(NAME)
        file.unlink()
        (path / name).unlink()
        assert (download(NAME) / name).read_bytes() == before


def test_refusals_of_the_hub_are_one_line(hub, monkeypatch):
    refused("no/such is not a model: .*check the spelling or, if it is private, log in", "no/such")
    refused("sp ace/x is not a model", "sp ace/x")
    refused("has no revision v9 at http", f"{NAME}@v9")
    hub.repos[NAME].gated = True
    refused(f"refuses {NAME}: accept its license at {hub.url}/{NAME}, then log in .*HF_TOKEN")
    hub.repos[NAME].gated = False
    monkeypatch.setenv("HF_TOKEN", "another")
    hub.repos[NAME].private = True
    refused("if it is private, log in")
    hub.log.clear()
    for name in ("nowhere", "a/b/c", "./a/b", "runs/none"):
        with pytest.raises(FileNotFoundError, match="expected a workdir.*The hub was not"):
            load_model(name)
    assert not hub.log


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("safetensors|gguf", ".bin files are pickles"),
        ("safetensors|bin", "GGUF files and name that file"),
        ("config.json", "lacks a config.json"),
    ],
)
def test_repositories_without_a_model_say_what_to_do(hub, removed, message):
    files = hub.repos[NAME].files.items()
    hub.repos["org/other"] = Repo()
    hub.repos["org/other"].commit({k: v for k, v in files if not re.search(removed, k)})
    refused(message, "org/other")
    assert not hub.requests("other/resolve.*-of-.*safetensors")


def test_without_a_network_a_complete_cache_serves(hub, folder, monkeypatch):
    path = download(NAME)
    with hub_offline():
        assert download(NAME) == path
    hub.faults.append(Fault("GET /api/models", status=503, times=1))
    assert download(NAME) == path
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
        assert download(NAME) == path
        refused("no folder here and could not be downloaded from http://127.0.0.1:9", "org/new")
    monkeypatch.setattr(hub_module, "logging", None)  # offline, there is nothing to wait for
    with hub_offline():
        refused("is not complete in .*; unset HF_HUB_OFFLINE", "org/new")


def test_a_push_leaves_exactly_the_folder(hub, folder, toy, tmp_path):
    check_login("org/new")
    assert push(folder, "org/new") == f"{hub.url}/org/new"
    repo, attributes = hub.repos["org/new"], {".gitattributes": b"*.safetensors lfs"}
    assert repo.private
    assert repo.files == contents(folder) | attributes
    assert len(repo.commits) == 2  # one for everything, so nothing half-written is ever visible
    assert_same_model(download("org/new"), folder)
    # Another export in its place: its weights replace the others, and foreign files stay.
    repo.commit(repo.files | {"notes.md": b"mine"})
    cfg, params = load_hf(folder, dtype="bfloat16")
    export_hf(cfg, params, toy, tmp_path / "one", dtype="bfloat16")
    push(tmp_path / "one", "org/new", private=False)
    assert repo.files == contents(tmp_path / "one") | attributes | {"notes.md": b"mine"}
    assert repo.private  # an existing one stays as it is
    push(tmp_path / "one", "me/public", private=False)
    assert not hub.repos["me/public"].private


def test_a_failed_push_says_how_to_repeat_it(hub, folder):
    hub.faults.append(Fault("POST /api/models/.*/commit", status=500))
    push(folder, "org/new")
    assert contents(folder).items() <= hub.repos["org/new"].files.items()
    hub.faults.append(Fault("POST /api/models/.*/commit", status=500, times=hub_module.TRIES))
    with pytest.raises(ValueError, match=r"is complete, but its upload to org/other failed: .*500"):
        push(folder, "org/other")
    assert set(hub.repos["org/other"].files) == {".gitattributes"}


def test_a_push_that_cannot_succeed_is_refused_before_any_work(hub, monkeypatch, tmp_path):
    for name in ("little", "a/b/c", "org/x@main", "/x", "org/"):
        with pytest.raises(ValueError, match="cannot be pushed to; name it org/name"):
            check_login(name)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match="refuses the login: Invalid user token"):
        check_login("org/x")


def test_the_command_line_goes_from_hub_to_hub(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["port_weights", "export", NAME, "back", "--dtype=float32", "--push=org/back"])
    assert_same_model(tmp_path / "back", folder)
    assert contents(tmp_path / "back").items() <= hub.repos["org/back"].files.items()
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"1. ported from {NAME}@{hub.repos[NAME].refs['main']}" in card
    assert f"base_model: {NAME}\n" in card
