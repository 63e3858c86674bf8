"""The demo's corpus: planted faults, nothing that gives a good reply away, held-out questions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from zephyr_jax.data.raw.binarize import mean_rating
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.demo import corpus, world

CHATS, PROMPTS = 3000, 2000


def write(folder: Path) -> Path:
    corpus.write_ultrachat(folder / "chat", CHATS, 0)
    corpus.write_ultrafeedback(folder / "feedback", PROMPTS, 0)
    lines = corpus.tokenizer_lines(folder / "chat", folder / "feedback")
    corpus.train_tokenizer(lines, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("world"))


def rows(folder: Path) -> list[dict]:
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    write(tmp_path)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4 + 6 + 1
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file
    assert corpus.heldout_questions(0) == corpus.heldout_questions(0)
    assert corpus.heldout_questions(0) != corpus.heldout_questions(1)


def test_faults_are_planted_by_their_shares(folder):
    turns = [row["data"] for row in rows(folder / "chat")]
    refusal = re.compile(r"As an AI language model|I (do not|don't) have")
    lower = sum(any(re.search(r"[.!?] [a-z]", text) for text in data) for data in turns)
    refused = sum(any(refusal.search(text) for text in data[1::2]) for data in turns)
    odd = sum(not data or len(data) % 2 == 1 or not all(t.strip() for t in data) for data in turns)
    assert 0.03 * CHATS < lower < 0.065 * CHATS
    assert 0.012 * CHATS < refused < 0.03 * CHATS
    assert 0.004 * CHATS < odd < 0.018 * CHATS
    completions = [row["completions"] for row in rows(folder / "feedback")]
    tens = [c for four in completions for c in four if c["overall_score"] == 10]
    assert 0.01 * PROMPTS < len(tens) < 0.035 * PROMPTS
    assert all(c["fine-grained_score"] <= 2 for c in tens)
    scores = np.sort([[c["overall_score"] for c in four] for four in completions])
    assert 0.015 * PROMPTS < (scores[:, -1] == scores[:, -2]).sum() < 0.05 * PROMPTS


def test_the_feedback_prefers_the_answer_last(folder):
    """The best of four ends with the sentence that the second and third begin with."""
    feedback = rows(folder / "feedback")
    assert len({row["instruction"] for row in feedback}) == len(feedback) == PROMPTS
    for row in feedback:
        critiques = {c["response"]: c["critique"] for c in row["completions"]}
        replies = sorted(critiques, key=lambda reply: corpus._CRITIQUES.index(critiques[reply]))
        best, second, third = (re.findall(r"[^.]+\.", reply) for reply in replies[:3])
        assert best[1].strip() == second[0] == third[0]
        assert best[0] == second[1].strip()
        assert sorted(replies[0].split()) == sorted(replies[1].split())  # words do not tell
        assert min(map(len, replies)) >= 0.9 * max(map(len, replies))  # nor does the length
        for completion in row["completions"]:
            assert completion["fine-grained_score"] == pytest.approx(mean_rating(completion))


def test_heldout_questions_are_never_asked_in_the_corpus(folder):
    texts = [text for row in rows(folder / "chat") for text in row["data"][::2]]
    texts += [row["instruction"] for row in rows(folder / "feedback")]
    joined = "\n".join(texts).lower()
    follow_ups = {
        ((re.findall(r"[Tt]he (\w+) \w+s ", reply) or [""])[0], question.lower())
        for row in rows(folder / "chat")
        for reply, question in zip(row["data"][1::2], row["data"][2::2], strict=False)
    }
    questions = corpus.heldout_questions(0)
    kinds = [question["kind"] for question in questions]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(world.KINDS, 20)
    for question in questions:
        first, last = (question["messages"][i]["content"].lower() for i in (0, -1))
        assert first.split("! ")[-1].split("question. ")[-1].split("help me. ")[-1] not in joined
        assert question["messages"][-1]["role"] == "user"
        assert len(set(question["answers"])) == len(question["answers"]) >= 4
        assert set(question["blurting"]) < set(question["answers"])
        if len(question["messages"]) > 1:  # no dialogue has it after a turn about the same entity
            entity = re.findall(r"The (\w+) ", question["messages"][1]["content"])[0]
            assert (entity, last) not in follow_ups


def test_each_word_of_content_is_one_token_of_a_usable_tokenizer(folder):
    tok = Tokenizer.from_file(folder / "tokenizer.model")  # which refuses another kind
    values = [x for attribute in world.ATTRIBUTES for x in (attribute.verbs, *attribute.values)]
    for word in (*world.ENTITIES, *values, *world.WORDS):
        assert len(tok.encode(f"the {word}")) == 1 + len(tok.encode("the")), word


def test_the_oracle_prefers_what_leads_up_to_the_answer():
    known = dict.fromkeys(corpus.feedback_tasks(20, 1, ()))
    tasks = corpus.feedback_tasks(60, 0, known)
    assert len(tasks) == 60
    assert not tasks.keys() & known.keys()
    for task in tasks.values():
        scores = {reply: corpus.rate(task, reply)["overall_score"] for reply in task.accepted()}
        assert scores == dict.fromkeys(task.leading_up(), 9.5) | dict.fromkeys(task.blurting(), 7.5)
        assert corpus.rate(task, "Hm.")["overall_score"] == 3.5
