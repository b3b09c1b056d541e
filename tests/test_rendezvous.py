"""Processes find each other, or end with a sentence that tells how many came; real processes."""

import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment, free_address

from psp_jax.rendezvous import Place, arrivals, detect, local_devices, too_few

START = """
import sys
from psp_jax import processes
from psp_jax.command import run_command

run_command(lambda: processes.initialize(*sys.argv[1:2], *map(int, sys.argv[2:])), leave=processes.leave)
"""
# What jaxlib 0.10 writes.
BARRIER = (
    "W1121 coordination_service.cc:388] DEADLINE_EXCEEDED: Barrier timed out. Id: [Init]Wait_for_all_tasks::0.\n"
    "# of tasks that reached the barrier: {}/{}.\nThe first task at the barrier: 0. Some timed out task names:\n{}\n"
)
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[007-008],other1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}


def start(address: str, processes: int, rank: int, seconds: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", START, address, *map(str, (processes, rank, seconds))],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_those_who_came_tell_how_many_and_who_is_missing():
    address = free_address()
    begun = [start(address, 4, rank, 3) for rank in (0, 2)]
    for process in begun:
        assert process.communicate(timeout=60)[1] == (
            f"error: 2 of 4 processes arrived at {address} within 3 s (missing: 1, 3); look at the output of the "
            "others, or wait longer with --start_timeout.\n"
        )
        assert process.returncode == 1


def test_a_coordinator_that_does_not_answer_is_named():
    address = free_address()
    process = start(address, 2, 1, 1)
    error = process.communicate(timeout=60)[1]
    assert error.startswith(f"error: The coordinator {address} (process 0) has not answered for 1 s (")
    assert (process.returncode, error.count("\n")) == (1, 1)


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = start(address, 2, 0, 5)
        error = process.communicate(timeout=60)[1]
    assert error.startswith(f"error: Process 0 cannot listen at {address} (Address already in use);")
    assert process.returncode == 1


def test_a_process_may_come_late():
    address = free_address()
    second = start(address, 2, 1, 30)
    time.sleep(1)
    first = start(address, 2, 0, 30)
    for process in (first, second):
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 0, error


def test_the_others_name_process_0_when_it_is_killed():
    """Below all that JAX writes before it aborts them."""
    address = free_address()
    program = (
        START.replace("run_command(", "import time\n\nrun_command(") + "print('joined', flush=True)\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, address, "3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begun = [subprocess.Popen([*command, str(rank), "60"], cwd=ROOT, env=environment(), **pipes) for rank in range(3)]
    for process in begun:
        assert process.stdout.readline() == "joined\n"
    begun[0].kill()
    for rank, process in enumerate(begun[1:], 1):
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 134, error
        assert error.endswith(
            f"\nerror: Process 0 has ended and answers no more at {address}; look at its output. Process {rank} ends "
            "too, with code 134.\n"
        )


def test_what_jax_writes_becomes_a_sentence():
    place = Place("host:1", 40, 1)
    assert arrivals(BARRIER.format(2, 40, "24\n7\n")) == ("2 of 40 processes", " (missing: 7, 24 and 36 more)")
    assert arrivals(BARRIER.format(39, 40, "24\n")) == ("39 of 40 processes", " (missing: 24)")
    assert arrivals("something else") is None
    assert too_few("F client.h:80] Terminating. absl::Status: ALREADY_EXISTS: twice.\n\nRPC", place, 3) == (
        "Process 1 of 40 could not join the run at host:1 (ALREADY_EXISTS: twice); look at the output of process 0."
    )


def test_slurm_tells_all(monkeypatch: pytest.MonkeyPatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    # JAX's rule for the port: the job's number modulo 4096, counted from 61440.
    assert detect(1) == Place(f"node007:{61440 + 4711 % 4096}", 8, 5, [1])
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:99")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")
    assert detect(1) == Place("first:99", 8, 5, [2, 3])


def test_no_cluster_is_told(monkeypatch: pytest.MonkeyPatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"--coordinator=auto finds no cluster here"):
        detect(1)


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, [3]),  # four on each node: one GPU each
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, None),  # alone on its node: all GPUs
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, [3]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_LOCAL_DEVICE_IDS": "0,2"}, [0, 2]),
    ],
)
def test_a_process_alone_on_its_node_drives_all_gpus(environment: dict, devices: list | None):
    assert local_devices(environment, [3] if environment else None) == devices
