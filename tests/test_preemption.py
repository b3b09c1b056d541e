"""Runs that SIGTERM or a kill ends, by the real command: what they give is what an undisturbed run gives."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT, Run, environment
from jax.sharding import Mesh
from ml_collections import ConfigDict

import psp_jax
from psp_jax.checkpoint import Checkpoints
from psp_jax.data.source import open_source
from psp_jax.precise_bn import make_statistics
from psp_jax.preemption import CODE
from psp_jax.progress import track

TIMES = ("images_per_second", "data_wait", "compile_seconds", "compile_hits", "compile_misses")

INTERRUPT = """
import os, runpy, signal, sys
from psp_jax.recorder import Recorder
from psp_jax.tally import Tally

name, _, left = sys.argv.pop(1).partition(":")
owner, method = {"Recorder.push": (Recorder, "push"), "Tally.add": (Tally, "add")}[name]
original, left = getattr(owner, method), int(left)

def interrupted(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments)

setattr(owner, method, interrupted)
runpy.run_module("psp_jax.main", run_name="__main__")
"""


def lines(workdir: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a log, without what time they took."""
    file = workdir / name
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def interrupted(run: Run, workdir: Path, where: str, *flags: str, devices: int = 1) -> str:
    """Output of a run that gets SIGTERM in a method: Recorder.push:3 is its third call."""
    command = [sys.executable, "-c", INTERRUPT, where, *run.flags, "--workdir", str(workdir), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=300)
    assert done.returncode == CODE, done.stdout + done.stderr
    return done.stdout


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Logs and the last checkpoint are the same, bit for bit."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(ours, name) == lines(theirs, name)
    ours, theirs = (psp_jax.load(workdir).variables for workdir in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


@pytest.mark.slow
def test_sigterm_in_a_step_and_in_a_validation_leaves_no_trace(finished_run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    output = interrupted(finished_run, workdir, "Recorder.push:3")
    assert "SIGTERM: ending after step 3; " in output  # in the middle of a logging interval
    assert Checkpoints(workdir / "checkpoints").latest_step() == 3
    assert [line["step"] for line in lines(workdir, "metrics.jsonl")] == [2]

    output = interrupted(finished_run, workdir, "Tally.add:2")
    assert "going on after step 3 in" in output and "SIGTERM: ending after step 12; " in output
    assert not lines(workdir, "validation.jsonl")
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (12, None)

    output = finished_run.start(workdir).stdout
    assert "going on with the validation after step 12" in output
    assert Checkpoints(workdir / "checkpoints").best_step() == 12
    assert_same_run(workdir, finished_run.workdir)
    record = json.loads((workdir / "goodput.json").read_text())
    assert record["starts"] == 3 and record["ended"] and record["seconds"]["validation"] > 0


def test_an_evaluation_keeps_what_it_counted_at_sigterm(finished_run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(finished_run.workdir, workdir)
    flags = ("--mode=evaluate", "--config.eval.protocol=whole", "--config.eval.batch_size=1")
    interrupted(finished_run, workdir, "Tally.add:4", *flags)
    with np.load(workdir / "eval" / "partial.npz") as partial:
        assert partial["done"].sum() == 4
    done = finished_run.start(workdir, *flags)
    assert done.returncode == 0, done.stderr
    assert "going on after 4 of 10 images" in done.stdout
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


def test_a_thread_that_is_not_pythons_may_get_the_signal() -> None:
    program = "import os, signal, time, jax; from psp_jax.preemption import Preemption\n"
    program += "jax.numpy.ones(9).sum().block_until_ready()  # JAX has its threads by now\n"
    program += "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of those to come, too\n"
    program += "with Preemption() as asked:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    # CPython sees a signal that another thread took when it next acquires the GIL, as every step of a run does.
    program += "    while not asked.reached(): time.sleep(0.01)\n"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), timeout=300, check=True)


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(finished_run: Run, tmp_path: Path) -> None:
    """They restore step 8, go on, validate: the losses and counts of the one process.

    Statistics that they take over batches are those that one device takes.
    """
    workdir = tmp_path / "w"
    shutil.copytree(finished_run.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    command = [sys.executable, "launch/local.py", "--processes=2", "--", *finished_run.flags]
    command += [f"--workdir={workdir}", f"--config.data.prepared_dir={tmp_path}", "--config.eval.precise_bn_batches=2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu" in done.stdout and "going on after step 8 in" in done.stdout
    one, two = (lines(w, "metrics.jsonl") for w in (finished_run.workdir, workdir))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert two[4]["loss"] == pytest.approx(one[4]["loss"], rel=1e-3)
    assert two[5]["loss"] == pytest.approx(one[5]["loss"], rel=1e-2)
    one, two = (json.loads((w / "eval" / "metrics.json").read_text()) for w in (finished_run.workdir, workdir))
    assert (two["images"], two["pixels"]) == (one["images"], one["pixels"])
    goodput = json.loads((workdir / "goodput.json").read_text())
    assert goodput["starts"] == 2 and sum(goodput["shares"].values()) == pytest.approx(1)
    model = psp_jax.load(workdir)
    assert model.step == 12
    record = json.loads((workdir / "config.json").read_text())
    config, data = ConfigDict(record["config"]), record["config"]["data"]
    config.data.num_workers = 0
    source = open_source("image_folder", data["dir"], "train", prepared_dir=data["prepared_dir"])
    found = make_statistics(config, model.card, Mesh([jax.devices()[:1]], ("data", "spatial")), source, track)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, model.variables["batch_stats"], jax.device_get(found(model.variables["params"])))
