"""Runs that SIGTERM or a kill ends, by the real command: what they give is what an undisturbed run gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT, Run, environment

import psp_jax
from psp_jax.checkpoint import Checkpoints
from psp_jax.preemption import CODE

TIMES = ("images_per_second", "data_wait", "compile_seconds", "compile_hits", "compile_misses")


def lines(workdir: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a log, without what time they took."""
    file = workdir / name
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    until = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Logs and the last checkpoint are the same, bit for bit."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(ours, name) == lines(theirs, name)
    ours, theirs = (psp_jax.load(workdir).variables for workdir in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


def test_sigterm_in_a_step_and_in_a_validation_leaves_no_trace(finished_run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "w"

    def start() -> subprocess.Popen:
        command = [sys.executable, "-m", "psp_jax.main", *finished_run.flags, "--workdir", str(workdir)]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)

    process = start()
    for line in process.stdout:
        if line.startswith("starting in"):
            break
    time.sleep(1.5)  # it compiles the first step
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == CODE, output
    told = output.splitlines()
    assert told[0].startswith("compiled in ")
    assert told[1].startswith("SIGTERM: ending after step 1; ")  # in the middle of a logging interval
    assert (Checkpoints(workdir / "checkpoints").latest_step(), lines(workdir, "metrics.jsonl")) == (1, [])

    process = start()
    wait_for(lambda: len(lines(workdir, "metrics.jsonl")) == 6, process)  # the last step's; the validation comes next
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == CODE, output
    assert "going on after step 1 in" in output and "SIGTERM: ending after step 12; " in output
    assert not lines(workdir, "validation.jsonl")
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (12, None)

    output = start().communicate(timeout=120)[0]
    assert "going on with the validation after step 12" in output
    assert Checkpoints(workdir / "checkpoints").best_step() == 12
    assert_same_run(workdir, finished_run.workdir)
    record = json.loads((workdir / "goodput.json").read_text())
    assert record["starts"] == 3 and record["ended"] and record["seconds"]["validation"] > 0


def test_an_evaluation_keeps_what_it_counted_at_sigterm(finished_run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(finished_run.workdir, workdir)
    flags = ("--mode=evaluate", "--config.eval.protocol=whole", "--config.eval.batch_size=1")
    command = [sys.executable, "-m", "psp_jax.main", *finished_run.flags, "--workdir", str(workdir), *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    maps = f"/proc/{process.pid}/task/{process.pid}/children"
    wait_for(lambda: Path(maps).read_text(), process)  # its data worker: the evaluation has begun
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == CODE, output
    with np.load(workdir / "eval" / "partial.npz") as partial:
        counted = int(partial["done"].sum())
    assert 0 < counted < 10
    done = finished_run.start(workdir, *flags)
    assert done.returncode == 0, done.stderr
    assert f"going on after {counted} of 10 images" in done.stdout
    ours, theirs = (json.loads((w / "eval" / "metrics.json").read_text()) for w in (workdir, finished_run.workdir))
    assert (ours["pixels"], ours["mean_iou"]) == (theirs["pixels"], pytest.approx(theirs["mean_iou"], abs=2e-3))


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    program = "from psp_jax import preemption as p, processes; import time\n"
    program += "p._IMPATIENT_SECONDS = 0.5\nwith p.Preemption() as asked:\n    print('ready', flush=True)\n"
    program += "    while not asked.reached(): time.sleep(0.01)\n    print('told', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # SLURM's own, and the batch script's: one request
    assert process.stdout.readline() == "told\n"
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def launched(run: Run, workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "launch/local.py", "--processes=2", "--restarts=1", "--grace=5", "--"]
    command += [*run.flags, "--workdir", str(workdir), f"--config.data.prepared_dir={workdir.parent}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)


def read_until(process: subprocess.Popen, *starts: str) -> list[str]:
    """The lines of output up to the first that begins with one of `starts`."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(starts):
            return seen
    raise AssertionError(f"ended without {starts}: {''.join(seen)}")


def test_processes_that_are_preempted_and_killed_end_as_if_they_were_not(finished_run: Run, tmp_path: Path) -> None:
    """Wherever the two catch the run: it ends as it would have."""
    process = launched(finished_run, tmp_path / "undisturbed")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    workdir = tmp_path / "w"
    process = launched(finished_run, workdir)
    read_until(process, "[0] step  2")
    os.kill(children(process)[-1], signal.SIGTERM)
    begun = time.monotonic()
    seen = read_until(process, "[launch] start again after SIGTERM")
    assert time.monotonic() - begun < 30
    assert any("SIGTERM: ending after step" in line for line in seen), seen
    read_until(process, "[0] step", "[0] evaluate:")
    os.kill(children(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "[launch] restart 1 of 1" in output
    assert_same_run(workdir, tmp_path / "undisturbed")
    record = json.loads((workdir / "goodput.json").read_text())
    assert record["starts"] == 3 and sum(record["shares"].values()) == pytest.approx(1)
