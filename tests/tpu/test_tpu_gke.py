"""scripts/tpu/gke and skypilot.yaml: the manifests' fields, and the commands."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tpu_tools import JOB, JOBSET, ODD, ROOT, SLICE, TPU, TRAIN, WHERE, Tools, dry

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path / "tools")


def rendered(tools, *words):
    done = tools.run(JOBSET, "render", *JOB, *words, "--", *TRAIN, ODD)
    assert done.returncode == 0, done.stderr
    assert "@NAME@" not in done.stdout
    return yaml.safe_load(done.stdout)


# The fields of JobSet v1alpha2, batch/v1 Job and v1 Pod that the manifest may use.
FIELDS = {
    "": "apiVersion kind metadata spec",
    "metadata": "name annotations",
    "spec": "failurePolicy replicatedJobs",
    "spec.failurePolicy": "maxRestarts rules",
    "spec.failurePolicy.rules": "name action onJobFailureReasons",
    "spec.replicatedJobs": "name replicas template",
    "spec.replicatedJobs.template": "spec",
    "spec.replicatedJobs.template.spec": "parallelism completions completionMode backoffLimit "
    "podFailurePolicy template",
}
POD_FIELDS = (
    "restartPolicy hostNetwork dnsPolicy terminationGracePeriodSeconds nodeSelector tolerations "
    "initContainers containers volumes"
)
CONTAINER_FIELDS = "name image command args ports resources volumeMounts"


def at(tree, path):
    """The mappings under a dotted path, whatever lists lie between."""
    trees = [tree]
    for name in path.split(".") if path else []:
        found = [t[name] for t in trees]
        trees = [x for f in found for x in (f if isinstance(f, list) else [f])]
    return trees


@pytest.mark.parametrize(
    ("words", "accelerator", "topology", "hosts", "slices"),
    [
        ([], "tpu-v5-lite-podslice", "4x4", 4, 1),
        (["--slices=2", "--spot"], "tpu-v5-lite-podslice", "4x4", 4, 2),
        (["--type=v6e-64", "--copy=gs://b/m:/inputs"], "tpu-v6e-slice", "8x8", 16, 1),
        (["--type=v5p-32"], "tpu-v5p-slice", "2x2x4", 4, 1),
    ],
)
def test_the_manifest_is_a_jobset(words, accelerator, topology, hosts, slices, tools):
    manifest = rendered(tools, *words, "--max_restarts=9")
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    for path, fields in FIELDS.items():
        for tree in at(manifest, path):
            assert set(tree) <= set(fields.split()), path
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 9
    assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == slices
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == hosts
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
    pod = spec["template"]["spec"]
    assert set(pod) <= set(POD_FIELDS.split())
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy asks for it
    chosen = pod["nodeSelector"]
    assert chosen["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert chosen["cloud.google.com/gke-tpu-topology"] == topology
    chips = 1
    for side in topology.split("x"):
        chips *= int(side)
    (train,) = pod["containers"]
    assert train["resources"]["requests"] == train["resources"]["limits"]
    assert train["resources"]["limits"] == {"google.com/tpu": chips // hosts}
    assert [*train["command"], *train["args"]] == [
        *("python", "-m", "zephyr_jax", "train"),
        *(*TRAIN, ODD, "--distributed"),
    ]
    for container in [train, *pod.get("initContainers", [])]:
        assert set(container) <= set(CONTAINER_FIELDS.split())
    assert ("cloud.google.com/gke-spot" in chosen) == ("--spot" in words) == ("tolerations" in pod)
    copies = any(word.startswith("--copy") for word in words)
    assert copies == ("initContainers" in pod) == ("volumes" in pod) == ("volumeMounts" in train)


def test_pods_fail_for_good_only_by_a_failure_of_the_training(tools):
    manifest = rendered(tools)
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    disrupted, failed = spec["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert failed["action"] == "FailJob"
    codes = failed["onExitCodes"]
    assert (codes["containerName"], codes["operator"]) == ("train", "NotIn")
    assert 75 in codes["values"]
    assert not {0, 1, 2} & set(codes["values"])


def test_kubectl_and_xpk_commands(tools):
    path = f"{tools.folder}/zephyr-jobset-sft.yaml"
    apply = [JOBSET, "apply", *JOB, "--", *TRAIN]
    assert dry(tools, *apply) == [["kubectl", "apply", f"--filename={path}"]]
    assert not Path(path).exists()
    chosen = "--selector=jobset.sigs.k8s.io/jobset-name=sft"
    named = [JOBSET, "status", "--name=sft", "--context=c"]
    assert dry(tools, *named) == [
        ["kubectl", "--context=c", "get", "jobset", "sft"],
        ["kubectl", "--context=c", "get", "pods", chosen, "--output=wide"],
    ]
    shown = ["--prefix", "--tail=40", "--max-log-requests=512", "--follow"]
    logs = ["kubectl", "logs", chosen, "--container=train", *shown]
    assert dry(tools, JOBSET, "logs", "--name=sft", "--follow") == [logs]
    delete = ["kubectl", "delete", "jobset", "sft"]
    assert dry(tools, JOBSET, "delete", "--name=sft") == [delete]
    flags = ["--workload=sft", "--tpu-type=v5litepod-16", "--num-slices=2"]
    flags += ["--docker-image=us-docker.pkg.dev/p/r/zephyr:1", "--max-restarts=50"]
    flags += ["--restart-on-exit-codes=75", "--termination-grace-period-seconds=120"]
    words = [JOBSET, "xpk", *JOB, *WHERE, "--cluster=c", "--slices=2", "--", *TRAIN]
    (command,) = dry(tools, *words)
    wanted = ["xpk", "workload", "create", *WHERE, "--cluster=c", *flags]
    assert command[:-1] == wanted
    said = shlex.split(command[-1].removeprefix("--command="))
    assert said == ["python", "-m", "zephyr_jax", "train", *TRAIN, "--distributed"]
    done = tools.run(*apply)
    assert done.returncode == 0, done.stderr
    assert tools.calls() == [["kubectl", "apply", f"--filename={path}"]]
    assert yaml.safe_load(Path(path).read_text())["kind"] == "JobSet"


def test_the_skypilot_task_has_only_known_fields():
    task = yaml.safe_load((TPU / "skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "envs", "setup", "run"}
    resources = task["resources"]
    assert resources["accelerators"] == "tpu-v5litepod-16"
    assert resources["use_spot"] is True
    assert set(resources) <= {*("infra", "accelerators", "accelerator_args"), "use_spot"} | {
        "job_recovery"
    }
    assert set(resources["accelerator_args"]) == {"runtime_version"}
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert resources["job_recovery"]["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    assert all(isinstance(value, str) for value in task["envs"].values())
    environment = {"PATH": "/usr/bin:/bin"}
    for part in ("setup", "run"):
        checked = subprocess.run(
            ["bash", "-n", "-c", task[part]], env=environment, capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
    joined = shlex.split(task["run"].replace("\\\n", " "))
    assert joined[:2] == [".venv/bin/python", "scripts/train.py"]
    assert "--distributed" in joined


def test_every_place_installs_one_version_of_jax():
    """The same JAX, inside the range that setup.cfg asks for."""
    found = set()
    skypilot = (TPU / "skypilot.yaml").read_text()
    found |= {part.split('"')[0] for part in skypilot.split("jax[tpu]==")[1:]}
    for path in (SLICE, ROOT / "Dockerfile"):
        found |= {path.read_text().split(" JAX=")[1].split()[0]}
    assert found == {"0.10.2"}
    assert "jax[tpu]>=0.10.2,<0.12" in (ROOT / "setup.cfg").read_text()
