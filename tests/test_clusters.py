"""Where processes learn of each other: what each cluster's variables mean, and one that is real."""

import json
import os

import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster
from processes import Host, free_port, start_hosts, wait_for

CLUSTER_VARIABLES = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_")
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[007-010,12],other3",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}
GKE = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "host-0,host-1,host-2,host-3"}
SLICES = GKE | {
    "MEGASCALE_COORDINATOR_ADDRESS": "sft-slice-0-0.sft:8081",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
VM = {"worker-network-endpoints": "a:b:10.0.0.5,a:b:10.0.0.6", "agent-worker-number": "1"}


def found_in(monkeypatch, variables, metadata=None, tpu=False):
    """(address of process 0, processes, this one, its devices), as `--distributed` has them."""
    for name in list(os.environ):
        if name.startswith(CLUSTER_VARIABLES):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = {"tpu-env": ""} | (metadata or {})
    answer = lambda key: (told[key], 200) if key in told else ("", 404)  # noqa: E731
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", answer)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)
    monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", tpu)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    return detect(None, None, None, None, None, 5)


PORT = 4242 % 4096 + 61440


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[007-010,12],other3", "node007"),
        ("node1,other3", "node1"),
        ("gpu-a100-[3,5]", "gpu-a100-3"),
        ("alone", "alone"),
    ],
)
def test_slurm(monkeypatch, nodes, first):
    found = found_in(monkeypatch, SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found == (f"{first}:{PORT}", 16, 9, [1])  # a process has the device of its number


def test_slurm_outside_of_srun_is_no_cluster(monkeypatch):
    outside = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    found = found_in(monkeypatch, outside | {"SLURM_NODELIST": "node[1-2]"})
    assert found == (None, None, None, None)


def test_open_mpi(monkeypatch):
    port = 1531576320 // 4096 % 4096 + 61440
    assert found_in(monkeypatch, OMPI) == (f"10.96.0.1:{port}", 8, 3, [3])


def test_the_port_can_be_named(monkeypatch):
    found = found_in(monkeypatch, SLURM | {"JAX_COORDINATOR_PORT": "7000"})
    assert found[0] == "node007:7000"


def test_gke_with_one_slice_and_two(monkeypatch):
    assert found_in(monkeypatch, GKE, tpu=True) == ("host-0:8482", 4, 2, None)
    assert found_in(monkeypatch, SLICES, tpu=True) == ("sft-slice-0-0.sft:8482", 8, 6, None)


def test_a_tpu_vm_asks_its_metadata(monkeypatch):
    assert found_in(monkeypatch, {}, VM, tpu=True) == ("10.0.0.5:8482", 2, 1, None)
    two = "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:80'\nMEGASCALE_NUM_SLICES: '2'\n"
    two += "MEGASCALE_SLICE_ID: '1'"
    found = found_in(monkeypatch, {}, VM | {"tpu-env": two}, tpu=True)
    assert found == ("10.0.0.1:8482", 4, 3, None)


def test_tpu_variables_without_a_tpu_are_no_cluster(monkeypatch):
    assert found_in(monkeypatch, GKE) == (None, None, None, None)


MEET = """
import argparse
import jax
from zephyr_jax import distributed

parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
distributed.start(parser.parse_args(["--distributed"]))
distributed.agree({"processes": jax.process_count()})
print("met", [jax.process_index(), jax.process_count(), jax.device_count()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["slurm", "ompi"])
def test_two_processes_meet_as_their_cluster_says(tmp_path, cluster):
    (tmp_path / "meet.py").write_text(MEET)
    # a port in which no other test can be; each cluster makes one of its job's number
    common = {"JAX_COORDINATOR_PORT": str(free_port())}
    hosts = []
    for i in ("0", "1"):
        slurm = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": i}
        ompi = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:9", "OMPI_COMM_WORLD_SIZE": "2"}
        ompi |= {"OMPI_COMM_WORLD_RANK": i, "OMPI_COMM_WORLD_LOCAL_RANK": i}
        own = SLURM | slurm | {"SLURM_LOCALID": i} if cluster == "slurm" else ompi
        hosts.append(Host([str(tmp_path / "meet.py")], common | own))
    logs = tmp_path / "logs"
    assert wait_for(start_hosts(hosts, 2, logs), logs, 120) == [0, 0]
    for i in (0, 1):
        lines = (logs / f"{i}.log").read_text().splitlines()
        said = next(line for line in lines if line.startswith("met "))
        assert json.loads(said.removeprefix("met ")) == [i, 2, 4]
