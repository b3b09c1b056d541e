"""A run that stands still ends, and names the process that it waits for."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Run, environment, free_address

from psp_jax.watchdog import CODE, accusation

# A process RANK of COUNT that takes steps of 20 ms for ever, or, as rank 1, no more after step 20 if HANG is "data".
PROGRAM = """
import sys, time
from pathlib import Path
from psp_jax import processes
from psp_jax.walltime import WallTime
from psp_jax.watchdog import Watchdog

address, folder, count, rank, hang = sys.argv[1:]
if address != "none":
    processes.initialize(address, int(count), int(rank))
walltime = WallTime()
with Watchdog(walltime, Path(folder), int(rank), times=5, least_seconds=2):
    for step in range(1, 10**6 if hang != "no" else 20):
        walltime.begin(step)
        with walltime.during("data_wait"):
            if step == 20:
                print("step 20", flush=True)
                while hang == "data" and int(rank) + 1 == int(count):
                    time.sleep(60)
        time.sleep(0.02)
        while hang == "data" and int(count) > 1 and step == 21:
            time.sleep(60)  # as in a collective with the one that hangs
print("ended well", flush=True)
"""


def start(folder: Path, count: int, hang: str) -> list[subprocess.Popen]:
    address = free_address() if count > 1 else "none"
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(folder), str(count), str(rank), hang],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def end(process: subprocess.Popen, timeout: float = 60) -> str:
    output, error = process.communicate(timeout=timeout)
    assert process.returncode == CODE, output + error
    return error


def test_a_process_without_a_step_ends_and_shows_its_stacks(tmp_path):
    (process,) = start(tmp_path, 1, "data")
    assert process.stdout.readline() == "step 20\n"
    begun = time.monotonic()
    error = end(process)
    assert 1.5 < time.monotonic() - begun < 10
    assert f", pid {process.pid}) is in step 20, data_wait; ending with code 69\n" in error
    told = (tmp_path / "watchdog" / "process_0.txt").read_text()
    for text in (error, told):
        assert text.startswith("watchdog: no progress for ") and 'File "<string>", line 19 in <module>' in text


def test_steps_and_a_good_end_are_left_alone(tmp_path):
    (process,) = start(tmp_path, 1, "no")
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (0, "ended well\n", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_by_the_other(tmp_path, stopped):
    """Process 0 serves the exchange of signs of life itself."""
    processes = start(tmp_path, 2, "never")
    try:
        for process in processes:
            assert process.stdout.readline() == "step 20\n"
        time.sleep(1.5)  # two signs of life
        processes[stopped].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        error = end(processes[1 - stopped])
        assert time.monotonic() - begun < 20  # long before JAX's own 100 seconds
        assert f"watchdog: process {stopped} (" in error
        assert f", pid {processes[stopped].pid}) has given no sign of life for " in error
        assert (tmp_path / "watchdog" / f"process_{1 - stopped}.txt").read_text().startswith("watchdog: process")
    finally:
        processes[stopped].kill()


def test_a_process_that_hangs_alive_is_named_by_all(tmp_path):
    processes = start(tmp_path, 2, "data")
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert processes[0].returncode == CODE
    assert processes[1].returncode in (CODE, -signal.SIGABRT)  # JAX's way, where process 0 is quicker
    for rank, error in enumerate(errors):
        assert f"process 1 ({error.partition('process 1 (')[2].partition(',')[0]}, pid {processes[1].pid})" in error
        assert "is behind the others, in step 20, data_wait" in error
        assert (tmp_path / "watchdog" / f"process_{rank}.txt").exists()


def test_an_evaluation_that_stands_still_ends(finished_run: Run, tmp_path: Path):
    program = "import runpy, time\nfrom psp_jax.tally import Tally\n"
    program += "Tally.add = lambda *_: print('stands still', flush=True) or time.sleep(1000)\n"
    program += "runpy.run_module('psp_jax.main', run_name='__main__')"
    shutil.copytree(finished_run.workdir, tmp_path / "w")
    command = [sys.executable, "-c", program, *finished_run.flags, f"--workdir={tmp_path / 'w'}", "--mode=evaluate"]
    command += ["--config.eval.protocol=whole", "--config.watchdog.least_seconds=2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == CODE, done.stdout + done.stderr
    assert done.stdout.endswith("stands still\n")
    assert (
        "watchdog: no progress for " in done.stderr and " is in step 0, validation; ending with code 69" in done.stderr
    )


def place(rank: int, step: int, activity: str) -> dict:
    return {"process": rank, "host": f"host{rank}", "pid": 10 + rank, "step": step, "activity": activity}


@pytest.mark.parametrize(
    ("places", "silent", "words"),
    [
        ([(7, "step")], {}, "process 0 (host0, pid 10) is in step 7, step"),
        ([(7, "step"), (7, "step")], {}, "all 2 processes are in step 7, step"),
        ([(7, "step"), (7, "data_wait")], {}, "process 1 (host1, pid 11) is behind the others, in step 7, data_wait"),
        (
            [(7, "checkpoint"), (7, "validation"), (8, "data_wait")],
            {},
            "process 1 (host1, pid 11) is behind the others, in step 7, validation",
        ),
        (
            [(7, "step"), (8, "checkpoint")],
            {1: 61.2},
            "process 1 (host1, pid 11) has given no sign of life for 61 s, last seen in step 8, checkpoint",
        ),
        ([], {0: 61.2}, "process 0 has given no sign of life for 61 s, last seen in a place not known"),
    ],
)
def test_who_is_waited_for(places, silent, words):
    found = {rank: place(rank, *values) for rank, values in enumerate(places)}
    assert accusation(found, silent) == words
