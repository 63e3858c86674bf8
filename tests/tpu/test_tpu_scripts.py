"""scripts/tpu/slice.sh: arguments, and the commands that each dry run prints; skypilot.yaml."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from processes import output_of
from tpu_tools import (
    HOST,
    NAMED,
    NEEDS_BASH,
    ODD,
    ROOT,
    SLICE,
    TPU,
    TRAIN,
    WHERE,
    dry,
    remote,
    tools,
    tpus,
)

pytestmark = NEEDS_BASH
__all__ = ["tools"]


LOOK = tpus("queued-resources", "describe", "sft", "--format=value(state.state)")
SCOPES = "--scopes=https://www.googleapis.com/auth/cloud-platform"
DELETE = tpus("queued-resources", "delete", "sft", "--force", "--quiet")


def created(*words, accelerator="v5litepod-16", runtime="v2-alpha-tpuv5-lite"):
    kind = [f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"]
    return tpus("queued-resources", "create", "sft", *kind, *words)


def on_hosts(*words):
    return tpus("tpu-vm", "ssh", "sft", remote(*words), "--worker=all")


def packed(tools):
    package = f"{tools.folder}/zephyr_jax-sft.tar.gz"
    archive = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={package}", "HEAD"]
    copied = tpus("tpu-vm", "scp", package, str(HOST), "sft:", "--worker=all")
    return [archive, copied, on_hosts("install", "zephyr_jax-sft.tar.gz", "0.10.2", "3.11")]


@pytest.mark.parametrize("path", sorted(TPU.rglob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    same_folder = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(same_folder) if same_folder.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    output_of([shellcheck, "--external-sources", path.relative_to(ROOT)], cwd=ROOT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SLICE], "no command; one of: create"),
        ([SLICE, "create", *WHERE, "--name=sft"], "--type is missing"),
        ([SLICE, "create", *NAMED, "--name=Sft"], "--name=Sft is not lower-case"),
        ([SLICE, "create", *NAMED, "--type=v9-8"], "no software version is known for --type=v9-8"),
        ([SLICE, "create", *NAMED, "--slice=2"], "unknown argument --slice=2"),
        ([SLICE, "create", "--env_file=/nowhere"], "no file /nowhere"),
        ([SLICE, "setup", *NAMED, "--wheel=/nowhere.whl"], "--wheel=/nowhere.whl is not"),
        ([SLICE, "start", *NAMED, "--", *TRAIN, "--distributed"], "added automatically"),
        ([SLICE, "start", *NAMED, "--", *TRAIN, "a\nb"], "has a line break"),
        ([SLICE, "supervise", *NAMED, "--", TRAIN[0], "--workdir=runs/x"], "needs gs://"),
        ([HOST, "status", "all"], "no command 'status all'"),
    ],
)
def test_bad_arguments_are_one_clear_line(words, message, tools):
    done = tools.run(*words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert not tools.calls()


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5p-32", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_create_picks_the_software_version_of_a_type(accelerator, runtime, tools):
    words = [SLICE, "create", *NAMED, f"--type={accelerator}"]
    expected = created("--node-id=sft", SCOPES, accelerator=accelerator, runtime=runtime)
    assert dry(tools, *words) == [expected, LOOK]


def test_create_of_several_spot_slices_from_a_file(tools):
    path = tools.folder / "slice.env"
    path.write_text("# mine\nproject=my-project\nzone=us-west4-a\n\nname=other # a name\nspot\n")
    words = [SLICE, "create", f"--env_file={path}", "--name=sft", "--type=v5litepod-16"]
    words += ["--slices=2", "--runtime=mine", "--create_flag=--network=lan"]
    nodes = ["--node-count=2", "--node-prefix=sft", SCOPES, "--spot", "--network=lan"]
    assert dry(tools, *words) == [created(*nodes, runtime="mine"), LOOK]
    example = dry(tools, SLICE, "create", f"--env_file={TPU / 'slice.env.example'}")[0]
    assert {"--project=my-project", "--spot"} <= set(example)


def test_setup_from_a_wheel_on_two_slices(tools):
    wheel = tools.folder / "zephyr_jax-1-py3-none-any.whl"
    wheel.touch()
    words = [SLICE, "setup", *NAMED, "--slices=2", f"--wheel={wheel}", "--jax=0.11.0"]
    words.append("--copy=gs://b/models/m:models/m")
    command = remote("install", wheel.name, "0.11.0", "3.11")
    both, copied = ("sft-0", "sft-1"), ("scp", str(wheel), str(HOST))
    expected = [tpus("tpu-vm", *copied, f"{name}:", "--worker=all") for name in both]
    commands = command, remote("copy", "gs://b/models/m", "models/m")
    expected += [tpus("tpu-vm", "ssh", x, do, "--worker=all") for do in commands for x in both]
    assert dry(tools, *words) == expected


def test_start_passes_every_training_argument_on(tools):
    (command,) = dry(tools, SLICE, "start", *NAMED, "--", *TRAIN, ODD)
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "sft"]
    assert command[7:] == ["--worker=all", *WHERE]
    remote_words = shlex.split(command[6].removeprefix("--command="))
    assert remote_words == ["bash", "zephyr_host.sh", "start", *TRAIN, ODD, "--distributed"]


def test_the_dry_run_of_supervise_prints_every_command_that_it_may_run(tools):
    node = tpus("tpu-vm", "describe", "sft", "--format=value(state)")
    up = [created("--node-id=sft", SCOPES), LOOK, *packed(tools)]
    up.append(on_hosts("start", *TRAIN, "--distributed"))
    expected = [DELETE, *up, LOOK, node, on_hosts("status"), on_hosts("log", "40"), DELETE]
    assert dry(tools, SLICE, "supervise", *NAMED, "--delete_when_done", "--", *TRAIN) == expected
    assert dry(tools, SLICE, "status", *NAMED) == [LOOK, on_hosts("status")]
    first = tpus("tpu-vm", "ssh", "sft-0", "--worker=0", remote("follow", "40"))
    assert dry(tools, SLICE, "logs", *NAMED, "--follow", "--slices=2") == [first]


def test_the_skypilot_task_has_only_fields_that_skypilot_knows():
    task = yaml.safe_load((TPU / "skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "envs", "setup", "run"}
    fields = {"infra", "accelerators", "accelerator_args", "use_spot", "job_recovery"}
    assert set(task["resources"]) <= fields
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 76]
    for part in ("setup", "run"):
        output_of(["bash", "-n", "-c", task[part]])
    joined = shlex.split(task["run"].replace("\\\n", " "))
    assert joined[:2] == [".venv/bin/python", "scripts/train.py"]
    assert "--distributed" in joined


def test_every_script_installs_one_version_of_jax():
    """The same JAX, inside the range of setup.cfg."""
    skypilot = (TPU / "skypilot.yaml").read_text()
    versions = {part.split('"')[0] for part in skypilot.split("jax[tpu]==")[1:]}
    for path in (SLICE, ROOT / "Dockerfile"):
        versions |= {path.read_text().split(" JAX=")[1].split()[0]}
    assert versions == {"0.10.2"}
    assert "jax[tpu]>=0.10.2,<0.12" in (ROOT / "setup.cfg").read_text()
