"""The command generate: replies in order; bad input is refused before any reply is generated."""

import json
import shutil

import pytest

from zephyr_jax.__main__ import main
from zephyr_jax.inference import generate as generation


def no_reply(*_, **__):
    raise AssertionError("a reply was generated")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"}', "is not a line with prompt or messages"),
        ("7", "is not a line with prompt or messages"),
        ('{"prompt": 5}', "content of type int"),
        ('{"messages": "b"}', "a list of at least one dict"),
        ('{"messages": [{"role": "bot", "content": "b"}]}', "role 'bot'"),
        ('{"messages": [{"role": "system", "content": "b"}]}', "message 1 is a system message"),
        ('{"prompt": "a", "id": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named_before_the_model_is_loaded(refused, tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n{"prompt": "a"}\n' + line + "\n")
    words = (f"--prompts={path}", f"--output={tmp_path / 'o'}", "--system=be kind")
    error = refused("generate", "--model=nowhere", *words)
    assert f"{path}:3" in error
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a " * 300, "max_position_embeddings=256"), ("\ud800", "surrogates not allowed")],
)
def test_a_prompt_that_does_not_fit_is_named_before_any_reply(
    hf_folder, refused, tmp_path, monkeypatch, prompt, message
):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a", "b", prompt)))
    monkeypatch.setattr(generation, "decode", no_reply)
    words = (f"--prompts={path}", f"--output={tmp_path / 'o'}", "--batch_size=1")
    error = refused("generate", f"--model={hf_folder}", *words)
    assert f"{path}:3" in error
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_file_without_prompts_and_an_output_that_cannot_be_are_refused(refused, tmp_path):
    path, words = tmp_path / "prompts", ["generate", "--model=nowhere", f"--output={tmp_path}/o"]
    assert "Is a directory" in refused(*words, f"--prompts={tmp_path}")
    bad = b'{"prompt": "\xff"}\n'
    for content, message in ((b"\n \n", "holds no prompts"), (bad, "is not UTF-8")):
        path.write_bytes(content)
        assert f"{path} {message}" in refused(*words, f"--prompts={path}")
    path.write_text('{"prompt": "a"}\n')
    words = ("generate", "--model=nowhere", f"--prompts={path}")
    for output in (tmp_path, tmp_path / "none" / "o"):
        error = refused(*words, f"--output={output}")
        assert f"--output: {output} is not a file in an existing" in error
    assert "File name too long" in refused(*words, f"--output={tmp_path / ('o' * 300)}")


def test_every_line_gets_a_reply_and_a_failed_run_leaves_earlier_files(
    hf_folder, tmp_path, monkeypatch, capsys
):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "o"
    rows = [{"prompt": "a", "id": 7}, {"messages": [{"role": "user", "content": "b"}]}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "o.tmp").write_text("mine")
    main(
        ["generate", f"--model={hf_folder}", "--prompt=a", "--max_new_tokens=3", "--temperature=0"]
    )
    words = ["generate", f"--model={hf_folder}", f"--prompts={path}", f"--output={output}"]
    main([*words, "--max_new_tokens=3", "--temperature=0", "--batch_size=1"])
    replies = [json.loads(line) for line in output.read_text().splitlines()]
    assert f"{replies[0].pop('reply')}\n" == capsys.readouterr().out
    assert replies[1].pop("reply")
    assert replies == rows
    first = output.read_bytes()
    monkeypatch.setattr(generation, "decode", no_reply)
    with pytest.raises(AssertionError):
        main(words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "o.tmp", "prompts.jsonl"]
    assert (tmp_path / "o.tmp").read_text() == "mine"
    assert output.read_bytes() == first


def test_a_damaged_template_is_named_when_it_is_loaded(hf_folder, refused, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(hf_folder, folder)
    (folder / "digests.json").unlink()  # as in others' folders
    (folder / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    error = refused("generate", f"--model={folder}", "--prompt=a")
    assert f"{folder}: chat_template.jinja: it is damaged" in error


def test_prompts_of_a_file_are_continued_and_said(hf_folder, tmp_path, monkeypatch, capsys):
    question = {"role": "user", "content": "Who are you?"}
    rows = [
        {"messages": [question, {"role": "assistant", "content": "I am a small"}]},
        {"messages": [question]},
        {"messages": [{"role": "system", "content": "Be brief."}]},
    ]
    path, output, seen = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl", []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def generate_each(cfg, params, tok, prompts, *_, **__):
        seen.extend(tok.decode(ids) for ids in prompts)
        return enumerate([" model"] * len(prompts))

    monkeypatch.setattr(generation, "generate_each", generate_each)
    main(["generate", f"--model={hf_folder}", f"--prompts={path}", f"--output={output}"])
    begun = "<|user|>\nWho are you?\n<|assistant|>\nI am a small"
    assert [text.replace("</s>", "") for text in seen] == [
        begun,
        "<|user|>\nWho are you?\n<|assistant|>\n",
        "<|system|>\nBe brief.\n<|assistant|>\n",
    ]
    replies = [json.loads(line) for line in output.read_text().splitlines()]
    assert replies == [row | {"reply": " model"} for row in rows]
    log = capsys.readouterr().err
    assert "1 of 3 conversations end with an answer, which is continued" in log
