"""A round of feedback from real servers, and a preference run on its pairs; kills on the way."""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from conftest import random_params
from feedback_rounds import round_of, rows_of, scripted, words_of, write_prompts
from judge_server import judge_server
from llama_server import LlamaServer
from runs import ONE, config_of, mesh_of

import zephyr_jax as zj
from zephyr_jax.data.prepare.prepare import prepare
from zephyr_jax.evaluation.endpoints import Spending
from zephyr_jax.feedback.collect import collect
from zephyr_jax.inference import decoding
from zephyr_jax.inference.replies import ServedModel
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.inference.server import Engine, make_app
from zephyr_jax.weights.gguf import export_gguf
from zephyr_jax.weights.huggingface import export_hf

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def our_server(world):
    """The address of our own server, and its model."""
    tok = zj.Tokenizer.from_folder(world / "tokenizer")
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=400, initializer_range=0.2)
    params = random_params(cfg)
    sampling = SamplingParams(max_new_tokens=64, stop_ids=(tok.eos_id,))
    served = ServedModel(cfg, decoding.cast_params(cfg, params), tok, "ours", sampling)
    engine = Engine(served, 64)
    server = uvicorn.Server(uvicorn.Config(make_app(engine), log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", (cfg, params, tok)
        server.should_exit = True
        thread.join()


def test_four_kinds_of_contestants_make_a_set_that_trains(tmp_path, world, our_server):
    address, (cfg, params, tok) = our_server
    export_hf(cfg, params, tok, tmp_path / "hf", dtype="float32")
    llama = LlamaServer(export_gguf(cfg, params, tok, tmp_path / "a.gguf", dtype="float32"), 512)
    prompts = write_prompts(tmp_path, 20)
    with judge_server(scripted()) as (url, _):
        endpoints = {
            "server": {"url": url},
            "ours": {"url": address},
            "llama": {"url": f"{llama._server.listening_address}/v1", "concurrency": 1},
        }
        contestants = {
            "here": {"model": str(tmp_path / "hf"), "max_tokens": 12},
            "served": {"endpoint": "ours", "model": "ours", "max_tokens": 12},
            "llama": {"endpoint": "llama", "model": "a", "max_tokens": 12},
            "scripted": {"endpoint": "server", "model": "bb"},
        }
        config = round_of(url, prompts, endpoints=endpoints, contestants=contestants)
        rows = collect(config, tmp_path / "round", Spending())
    account = json.loads((tmp_path / "round" / "account.json").read_text())
    assert all(counts["answered"] >= 15 for counts in account["answers"].values()), account
    assert len(rows_of(rows)) == 20
    prepare("ultrafeedback", rows, tmp_path / "data")
    config = config_of(world, "dpo", max_steps=3)
    splits = ("train_prefs", "")  # none of these few prompts is drawn to be held out
    data = dataclasses.replace(config.data, data_dir=str(tmp_path / "data"), splits=splits)
    config = dataclasses.replace(config, data=data, model=cfg, init=str(tmp_path / "hf"))
    with mesh_of(ONE):
        assert int(zj.fit(config, tmp_path / "run").step) == 3


@pytest.mark.slow
def test_ten_kills_ask_nothing_twice_and_leave_the_same_file(tmp_path):
    prompts = write_prompts(tmp_path, 40)
    with judge_server(scripted()) as (url, _):
        whole = collect(round_of(url, prompts), tmp_path / "whole", Spending()).read_bytes()
    rng = random.Random(0)
    with judge_server(scripted(lambda *_: time.sleep(0.02))) as (url, asked):
        words = words_of(url, prompts, tmp_path / "killed")
        command = [sys.executable, "-m", "zephyr_jax", *words]
        root = Path(__file__).parents[2]
        for _ in range(10):
            before = len(asked)
            with subprocess.Popen(command, cwd=root, env=os.environ, stderr=-3) as process:
                while len(asked) == before and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0.0, 0.2))
                process.kill()
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    bodies = [json.dumps(body, sort_keys=True) for body in asked]
    assert len(set(bodies)) == 40 * (4 + 5)
    assert len(bodies) - len(set(bodies)) <= 10 * 4, "only what was in flight is asked again"
    assert (tmp_path / "killed" / "ultrafeedback.jsonl").read_bytes() == whole
