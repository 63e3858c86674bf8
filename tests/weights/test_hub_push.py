"""Pushes to a hub on this machine, by function and by the command line."""

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
    hub.role = "write"
    with pytest.raises(ValueError, match="me cannot push to other/x, only to me, org"):
        check_login("other/x")
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


def test_the_command_line_goes_from_hub_to_hub(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["port_weights", "export", NAME, "back", "--dtype=float32", "--push=org/back"])
    assert_same_model(tmp_path / "back", folder)
    files = hub.repos["org/back"].files
    assert contents(tmp_path / "back").items() <= files.items()
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"1. ported from {NAME}@{hub.repos[NAME].refs['main']}" in card
    assert f'base_model: "{NAME}"' in card
    pytest.importorskip("gguf")
    words = ("export", str(folder), "back.gguf", "--format=gguf", "--dtype=float32")
    main(["port_weights", *words, "--push=org/back"])
    gguf = (tmp_path / "back.gguf").read_bytes()
    assert hub.repos["org/back"].files == files | {"back.gguf": gguf}
