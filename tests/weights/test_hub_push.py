"""Pushes to a hub on this machine, and the command line through HF_ENDPOINT."""

import os
import subprocess
import sys

import hub_fixtures
import pytest
from hub_fixtures import NAME, assert_same_model
from hub_server import Fault
from huggingface_hub import constants
from sample_tokenizers import train_model

from zephyr_jax import hub as hub_module
from zephyr_jax.__main__ import main
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer
from zephyr_jax.weights.hub import check_login, download, push
from zephyr_jax.weights.huggingface import export_hf, load_hf

folder, hub = hub_fixtures.folder, hub_fixtures.hub


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_push_leaves_exactly_the_folder(hub, folder, tmp_path):
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
    tok = SentencePieceTokenizer(train_model())
    export_hf(cfg, params, tok, tmp_path / "one", dtype="bfloat16")
    push(tmp_path / "one", "org/new", private=False)
    assert repo.files == contents(tmp_path / "one") | attributes | {"notes.md": b"mine"}
    assert repo.private  # an existing one stays as it is
    push(tmp_path / "one", "me/public", private=False)
    assert not hub.repos["me/public"].private


def test_a_push_of_one_file_deletes_nothing(hub, tmp_path):
    before = hub.repos[NAME].files
    (tmp_path / "little-F32.gguf").write_bytes(b"GGUF")
    push(tmp_path / "little-F32.gguf", NAME)
    assert hub.repos[NAME].files == before | {"little-F32.gguf": b"GGUF"}


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
    hub.role = "read"
    with pytest.raises(ValueError, match="token of me may only read; create one that may write"):
        check_login("org/x")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match="does not accept the login: Invalid user token"):
        check_login("org/x")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="a push to org/x needs an account: log in"):
        check_login("org/x")


def test_the_command_line_through_hf_endpoint(hub, folder, tmp_path):
    """A process of its own, as a user starts it: hub -> export -> hub."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "XLA_FLAGS": "",
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    words = ("port_weights", "export", NAME, "back", "--dtype=float32", "--push=org/back")
    done = subprocess.run(
        [sys.executable, "-m", "zephyr_jax", *words],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/org/back" in done.stderr
    assert_same_model(tmp_path / "back", folder)
    assert contents(tmp_path / "back").items() <= hub.repos["org/back"].files.items()
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"1. ported from {NAME}@{hub.repos[NAME].refs['main']}" in card
    assert f'base_model: "{NAME}"' in card


def test_a_gguf_is_pushed_next_to_the_weights(hub, folder, tmp_path):
    pytest.importorskip("gguf")
    push(folder, "me/little")
    before = hub.repos["me/little"].files
    words = ("export", str(folder), str(tmp_path / "little.gguf"), "--format=gguf")
    main(["port_weights", *words, "--push=me/little", "--dtype=float32"])
    expected = before | {"little.gguf": (tmp_path / "little.gguf").read_bytes()}
    assert hub.repos["me/little"].files == expected
