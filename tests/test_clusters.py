"""Two processes that find each other by the variables of their cluster."""

import json

import pytest
from processes import Host, free_port, start_hosts, wait_for

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[007-010,12],other3",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
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
