"""`scripts/slurm.sh` under a Slurm of its own, whose two nodes are two loopback addresses of this machine."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

from ..conftest import ROOT


# without munge, cgroups and GPUs
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.[1-2] Port=[{ports[1]},{ports[2]}] CPUs=1
PartitionName=all Nodes=ALL Default=YES
"""
LAUNCHER = f"""#!/bin/sh
[ "$SLURM_NODEID" = "${{BROKEN_NODE:-none}}" ] && exit 3
exec {sys.executable} -m torch.distributed.run "$@"
"""

DAEMONS = all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DAEMONS or os.geteuid() != 0, reason="needs slurmctld, slurmd, slurm-client, and root"),
]


def wait_for(condition, explain):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.2)
    pytest.fail(explain())


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A function that runs one of Slurm's commands, in the folder that jobs are submitted from."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "127.0.0.1", "127.0.0.2", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    (folder / ".venv" / "bin" / "torchrun").write_text(LAUNCHER)
    (folder / ".venv" / "bin" / "torchrun").chmod(0o755)
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    names = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "folder": folder, "ports": ports}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**names))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
    environment["HF_HOME"] = str(folder / "home")

    def run(*command, **more):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=folder, env={**environment, **more}, **pipes).stdout

    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"127.0.0.{node}"] for node in (1, 2))]
    with (folder / "slurm.log").open("w") as log:
        daemons = [subprocess.Popen(command, env=environment, stdout=log, stderr=log) for command in commands]
    try:
        wait_for(lambda: run("sinfo", "-h", "-o", "%D %T") == "2 idle\n", (folder / "slurm.log").read_text)
        yield run
    finally:
        run("scancel", "--me")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


@pytest.fixture
def submit(slurm, recipe_values, tmp_path):
    """A function that submits training: it returns the job's number, and functions for its state and its output."""

    def submit(environment, **values):
        values = {**recipe_values, "use_cpu": True, "output_dir": str(tmp_path / "run"), **values}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        options = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/output"]
        command = ["sbatch", *options, str(ROOT / "scripts" / "slurm.sh"), str(tmp_path / "recipe.yaml")]
        job = slurm(*command, **environment).strip()
        read = (tmp_path / "output").read_text

        def wait_until(*states):
            state = re.compile(f"JobState=({'|'.join(states)})")
            wait_for(lambda: state.search(slurm("scontrol", "show", "job", job)), read)

        return job, wait_until, read

    return submit


def test_requeued_job_on_two_nodes_equals_unbroken_run_on_one(slurm, submit, tmp_path):
    values = {"max_steps": 1000, "save_steps": 20, "logging_steps": 20, "entropy_steps": 500, "embedding_dropout": 0.1}
    job, wait_until, read = submit({"PROCESSES_PER_NODE": "1"}, **values)
    wait_for((tmp_path / "run" / "checkpoint-20").exists, read)
    assert slurm("scontrol", "requeue", job) == ""
    wait_until("PENDING Reason=BeginTime")
    assert not (tmp_path / "run" / "results.json").exists()
    # Slurm would let it wait for two minutes
    assert slurm("scontrol", "update", f"jobid={job}", "starttime=now") == ""
    wait_until("COMPLETED", "FAILED")
    # the output of both starts, of which the second did not begin again
    assert read().count("/run: 2 processes") == 2
    assert read().count("/run is finished") == 1
    assert 0 < read().split("/run: 2 processes")[2].count("'loss'") < 50
    one = ["--standalone", "--nproc_per_node=2", "-m", "training.train", str(tmp_path / "recipe.yaml")]
    slurm(".venv/bin/torchrun", *one, f"output_dir={tmp_path / 'one'}")
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "one"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)


def test_job_fails_with_the_first_node_that_does(submit):
    # the other would wait for it for ten minutes
    _, wait_until, read = submit({"PROCESSES_PER_NODE": "1", "BROKEN_NODE": "1"})
    wait_until("FAILED")
    assert "127.0.0.2: task 1: Exited with exit code 3" in read()


def test_job_without_gpus_and_without_a_number_of_processes_says_so(submit):
    _, wait_until, read = submit({})
    wait_until("FAILED")
    assert "PROCESSES_PER_NODE: Slurm gave the job no GPUs" in read()
