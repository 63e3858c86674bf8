"""Plans made with libtpu's compiler itself; it comes with the extra plan."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plan_case import small_run
from test_distributed import config_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="no libtpu here: pip install '.[plan]'"
    ),
]


def plan(tmp_path, *words, status=0):
    """The plans that the command writes, and its output."""
    out = tmp_path / "plans.json"
    command = [sys.executable, "-m", "zephyr_jax", "plan", *words, f"--output={out}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = {"capture_output": True, "text": True, "timeout": 1500, "check": False}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == status, done.stderr[-2000:]
    return (json.loads(out.read_text()) if out.is_file() else None), done.stdout + done.stderr


@pytest.fixture
def small(tmp_path):
    return config_file(tmp_path / "small.py", small_run())


def test_a_small_model_on_several_slices(small, tmp_path):
    words = [f"--config={small}", "--examples=90"]
    plans, output = plan(tmp_path, *words, "--topology=v5e:2x2,v4:2x2x1")
    assert [one["fits"] for one in plans] == [True, True]
    assert plans[0]["flops"] == plans[1]["flops"]
    assert plans[0]["steps"] == 5
    assert "| small | v5e:2x2 | data 2 fsdp 2 |" in output
    again, _ = plan(tmp_path, *words, "--topology=v5e:2x2")
    assert again == plans[:1]  # compiled once
    for path in (tmp_path / "cache" / "zephyr_jax" / "plans").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    again, output = plan(tmp_path, *words, "--topology=v5e:2x2")
    assert "is damaged (" in output
    assert again[0]["seconds"] == plans[0]["seconds"]


def test_a_run_that_does_not_fit_gets_advice(tmp_path):
    run = small_run(remat="none", micro_batches=1)
    large = dataclasses.replace(run.model, hidden_size=4096, num_hidden_layers=12, vocab_size=32000)
    run = dataclasses.replace(run, model=large, data=dataclasses.replace(run.data, seq_len=4096))
    path = config_file(tmp_path / "large.py", run)
    plans, output = plan(tmp_path, f"--config={path}", "--topology=v5e:2x2", status=1)
    assert not plans[0]["fits"]
    assert plans[0]["gib"]["needed"] > plans[0]["gib"]["usable"] == 15.75
    assert "GiB too many; --config.train.remat=full and --config.train.micro_batches=2" in output


def test_a_slice_that_libtpu_does_not_know_ends_in_one_line(small, tmp_path):
    words = [f"--config={small}", "--config.mesh.data=-1", "--topology=v5e:3x5"]
    _, output = plan(tmp_path, *words, status=2)
    assert "topology v5e:3x5 cannot be described" in output.splitlines()[-1]


def test_the_7b_step_fits_sixteen_v5e_chips(tmp_path):
    words = ["--config=zephyr_7b_sft", "--topology=v5e:4x4", "--config.train.micro_batches=8"]
    (one,), _ = plan(tmp_path, *words)
    assert one["fits"]
    assert one["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    parameters = 7_241_732_096 * 4 / 16 / 2**30
    assert one["gib_by_kind"]["parameters"] == pytest.approx(parameters, rel=0.01)
    assert 0.3 < one["mfu"] < 0.6
    # the one transfer of this kind that docs/pods.md names and justifies
    costly = [
        (group["kind"], group["axis"])
        for group in one["transfers"]
        if group["kind"] in ("all-to-all", "collective-permute", "all-reduce")
        and group["largest"] > 64e6
    ]
    assert costly == [("all-reduce", "fsdp")]
    (warning,) = one["warnings"]
    assert "all-reduce over fsdp (500 MiB, 1 times a step, " in warning


@pytest.mark.parametrize("mesh", [(1, 8, 1, 1), (2, 2, 2, 1), (8, 1, 1, 1), (1, 4, 1, 2)], ids=str)
def test_a_small_model_on_every_kind_of_mesh(small, tmp_path, mesh):
    """It compiles, fits, and has no transfer that docs/pods.md does not name."""
    names = ("data", "fsdp", "tensor", "context")
    sizes = [f"--config.mesh.{name}={n}" for name, n in zip(names, mesh, strict=True)]
    (one,), _ = plan(tmp_path, f"--config={small}", "--topology=v5e:2x4", *sizes)
    assert one["fits"]
    assert one["warnings"] == []


def test_one_chip_computes_what_four_share(small, tmp_path):
    alone = ["--config.mesh.data=1", "--config.mesh.fsdp=1"]
    (one,), output = plan(tmp_path, f"--config={small}", "--topology=v5e:1x1", *alone)
    (four,), _ = plan(tmp_path, f"--config={small}", "--topology=v5e:2x2")
    assert "| small | v5e:1x1 | one device |" in output
    assert one["flops"] == pytest.approx(four["flops"], rel=0.01)
    assert one["transfers"] == []
    assert one["warnings"] == []


def test_moments_in_host_memory_take_no_chip_memory(small, tmp_path):
    offload = "--config.optim.offload_optimizer=true"
    (one,), _ = plan(tmp_path, f"--config={small}", "--topology=v5e:2x2", offload)
    assert one["gib_by_kind"]["moments"] < 1e-6 < one["gib_by_kind"]["parameters"]
    assert one["warnings"] == []


def test_sampling_on_a_slice(small, tmp_path):
    words = [f"--config={small}", "--topology=v5e:2x2", "--examples=1000"]
    words += ["--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2"]
    (eight,), _ = plan(tmp_path, *words, "--sample", "8", "--lengths", "64", "128")
    model, layers, width = small_run().model, 3, 256
    matrices = layers * width * (2 * 6 * 128 + 2 * 2 * 128 + 3 * 640) + model.vocab_size * width
    cache = layers * 4 * 1 * (64 + 128) * 128 * 2 * 2  # four rows and one head a device
    # bfloat16, half of the matrices a device, norms whole
    assert eight["bytes_a_token"] == matrices + cache + 7 * width * 2
    seconds = eight["seconds"]
    assert seconds["bound"] == eight["bytes_a_token"] / 819e9
    assert seconds["bound"] < seconds["token"] < 1e-3
    assert eight["hours"] * 3600 == pytest.approx(
        125 * (seconds["prefill"] + 128 * seconds["token"])
    )
