"""Several processes as one run, also when one is killed, the coordinator too, or asked to end; by the real command."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Run, environment, run_module
from PIL import Image
from test_preemption import assert_same_run, lines

from psp_jax.workdir import LOCK

# A smaller network than the other tests'; with a greater rate rounding would show in the losses.
FLAGS = (
    *("--config.model.head=fcn", "--config.model.aux_head=False", "--config.optimizer.base_lr=1e-4"),
    *("--config.train.steps=12", "--config.train.log_every_steps=1", "--config.checkpoint.every_steps=2"),
    *("--config.log.images=0", "--config.eval.gallery=0", "--config.data.num_workers=0"),
)

# Runs psp_jax.main. For each RANK:STEP:SIGNAL in SIGNALS this process sends it to itself there, once; before SIGKILL it
# waits for the checkpoint of the step before, and after SIGTERM for JAX, which looks for it once a second. Tells the
# label maps that it writes.
PROGRAM = """
import os, runpy, signal, sys, time
from pathlib import Path
from psp_jax import validation
from psp_jax.recorder import Recorder

given = dict(a.removeprefix("--").partition("=")[::2] for a in sys.argv[1:])
workdir, push, write = Path(given["workdir"]), Recorder.push, validation.write_png

def signalled(self, step, *rest):
    for planned in os.environ["SIGNALS"].split():
        mark = workdir.with_name(planned)
        if planned.startswith(f"{given['process_id']}:{step}:") and not mark.exists():
            mark.touch()
            number = signal.Signals[planned.rpartition(":")[2]]
            while number == signal.SIGKILL and not (workdir / "checkpoints" / str(step - 1)).exists():
                time.sleep(0.05)
            os.kill(os.getpid(), number)
            time.sleep(3)
    push(self, step, *rest)

def told(path, picture):
    print("writes", path.name, flush=True)
    write(path, picture)

Recorder.push, validation.write_png = signalled, told
runpy.run_module("psp_jax.main", run_name="__main__")
"""


def launch(run: Run, workdir: Path, processes: int, *options: str, signals: str = "") -> str:
    """Output of `run` with FLAGS and `options`, by launch/local.py; it must end well."""
    workdir.parent.mkdir(exist_ok=True)
    (workdir.parent / "stand_in.py").write_text(PROGRAM)
    command = [sys.executable, "launch/local.py", f"--processes={processes}", "--restarts=2"]
    command += ["--program=stand_in", "--", *run.flags, *FLAGS, f"--workdir={workdir}", *options]
    variables = environment() | {"SIGNALS": signals, "PYTHONPATH": f"{ROOT}{os.pathsep}{workdir.parent}"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def two_processes(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdir of a run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("two") / "w"
    launch(finished_run, workdir, 2)
    return workdir


def assert_survives(run: Run, workdir: Path, processes: int, undisturbed: Path) -> None:
    """The last process is killed at step 3, process 0 at step 5, the last asked to end at step 8: nothing shows it."""
    last = processes - 1  # it may be at step 6 when process 0 is killed at step 5
    output = launch(run, workdir, processes, signals=f"{last}:3:SIGKILL 0:5:SIGKILL {last}:8:SIGTERM")
    assert re.findall(r"\[launch\] (restart.*|start again.*)", output) == [
        "restart 1 of 2",
        "restart 2 of 2",
        "start again after SIGTERM",
    ]
    begun = re.findall(r"starting|going on .*after step (\d)", output)
    assert begun[:3] == ["", "2", "4"] and int(begun[3]) >= 8
    assert f"SIGTERM: ending after step {begun[3]};" in output
    assert_same_run(workdir, undisturbed)
    assert json.loads((workdir / "goodput.json").read_text())["starts"] == 4
    assert [file.name for file in workdir.glob(f"{LOCK}*")] == [LOCK]


@pytest.mark.slow
def test_killed_processes(finished_run: Run, two_processes: Path, tmp_path: Path) -> None:
    assert_survives(finished_run, tmp_path / "w", 2, two_processes)
    alone = run_module("psp_jax.main", *finished_run.flags, *FLAGS, "--workdir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    one, two = ([line["loss"] for line in lines(w, "metrics.jsonl")] for w in (tmp_path / "alone", two_processes))
    assert len(two) == 12
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.soak
def test_killed_processes_of_four(finished_run: Run, tmp_path: Path) -> None:
    launch(finished_run, tmp_path / "undisturbed" / "w", 4)
    assert_survives(finished_run, tmp_path / "killed" / "w", 4, tmp_path / "undisturbed" / "w")


@pytest.mark.slow
def test_processes_that_share_an_image_write_each_label_map_once(
    finished_run: Run, two_processes: Path, tmp_path: Path
) -> None:
    """Batches of five do not divide over two devices: with mesh.spatial=2 both processes hold all of a batch."""
    flags = ("--mode=evaluate", "--config.eval.protocol=whole", "--config.eval.batch_size=5")
    flags += ("--config.eval.save_predictions=True",)
    shutil.copytree(two_processes, tmp_path / "one")
    alone = run_module("psp_jax.main", *finished_run.flags, *FLAGS, *flags, "--workdir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    shutil.copytree(two_processes, tmp_path / "two")
    output = launch(finished_run, tmp_path / "two", 2, *flags, "--config.mesh.spatial=2")
    one, two = ({p.name: p for p in (tmp_path / w / "eval" / "predictions").iterdir()} for w in ("one", "two"))
    assert sorted(re.findall(r"\] writes (\S+)", output)) == sorted(one) == sorted(two)
    assert len(one) == 10
    for name, file in one.items():
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(two[name])))
