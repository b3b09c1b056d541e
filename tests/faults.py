"""Runs of psp_jax.main with a fault in them, put in where it matters or at any time."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from conftest import ROOT, Run, environment

from psp_jax.checkpoint import Checkpoints

VARIABLE = "PSP_JAX_SOAK_SEED"
SEED = os.environ.get(VARIABLE, "0")  # of the moments at which faults come
ANNOUNCED = re.compile(r"checkpoint of step (\d+) written and read back in ")
# Entries of an activity of the loop are counted; at the given one a thread sends the signal after so many seconds, to
# this process or to its data workers. The last step that was taken goes to a file, which a kill leaves behind.
PROGRAM = """
import json, os, pathlib, runpy, signal, sys, threading, time

fault = json.loads(sys.argv.pop(1))
from psp_jax.recorder import Recorder
from psp_jax.walltime import WallTime

def send():
    time.sleep(fault["seconds"])
    own = [os.getpid()]
    if fault["target"] == "worker":
        children = pathlib.Path(f"/proc/{own[0]}/task/{own[0]}/children").read_text().split()
        own = [int(child) for child in children]
    for process in own:
        os.kill(process, fault["signal"])

def reached(activity):
    if activity == fault["activity"]:
        fault["entry"] -= 1
        if fault["entry"] == 0:
            threading.Thread(target=send).start() if fault["seconds"] else send()

turn, push = WallTime._turn, Recorder.push

def turned(self, activity):
    entered = activity != self.activity
    turn(self, activity)
    if entered:
        reached(activity)

def pushed(self, step, *rest):
    push(self, step, *rest)
    pathlib.Path(fault["taken"]).write_text(str(step))

WallTime._turn, Recorder.push = turned, pushed
if fault["activity"] == "import":
    reached("import")
runpy.run_module("psp_jax.main", run_name="__main__")
"""
# Entries of an activity in a run of 12 steps that saves at 4, 8 and 12 and validates at the end.
ENTRIES = {"import": 1, "compile": 1, "step": 11, "data_wait": 12, "checkpoint": 3, "validation": 1}
LATEST = {"import": 8.0, "compile": 3.0, "validation": 2.0}  # s into an activity; elsewhere a third of a second


def random_fault(rng: random.Random, kind: signal.Signals, target: str = "main") -> dict[str, Any]:
    """Return a moment of a run, half of the time at the very entry of an activity."""
    activity = rng.choice(list(ENTRIES))
    seconds = rng.choice((0.0, rng.uniform(0, LATEST.get(activity, 0.3))))
    entry = rng.randint(1, ENTRIES[activity])
    return {"activity": activity, "entry": entry, "seconds": seconds, "signal": int(kind), "target": target}


def run_with(
    run: Run, workdir: Path, fault: dict[str, Any], *more: object
) -> tuple[subprocess.CompletedProcess, int | None]:
    """Start or go on with a run with a fault in it; return how it ended, and the last step it took."""
    taken = workdir.with_name(f"{workdir.name}.taken")
    taken.unlink(missing_ok=True)
    words = json.dumps(fault | {"taken": str(taken)})
    command = [sys.executable, "-c", PROGRAM, words, *run.flags, "--workdir", str(workdir), *map(str, more)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    return done, int(taken.read_text() or 0) if taken.exists() else None


def moments(what: str) -> random.Random:
    """Return what draws the moments of one kind of fault: a function of SEED and `what`."""
    return random.Random(f"{SEED} {what}")


def announced(done: subprocess.CompletedProcess) -> int:
    """Return the last step that a run said to have saved, 0 for none."""
    return max(map(int, ANNOUNCED.findall(done.stdout + done.stderr)), default=0)


def one_sentence(done: subprocess.CompletedProcess) -> str:
    """Return the sentence that a run ended with."""
    assert done.returncode == 1, done.stdout + done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return sentence


def bound_by_permissions(command: list[str]) -> list[str]:
    """Return the command as one that permissions of files bind, the superuser too; refused to others, who need it not.

    It drops CAP_DAC_OVERRIDE (1) from what its process can ever have, PR_CAPBSET_DROP (24).
    """
    drop = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", drop, *command]


def jumping_clock(folder: Path, seconds: Sequence[float], after: int) -> dict[str, str]:
    """Return the environment of processes whose wall clock is off by another of `seconds` at every look but the first.

    Args:
      folder: of the module that does it, and of a file `jumped` from the first look that is off on; made.
      seconds: taken in turn.
      after: how many looks at the clock find it right.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import itertools, time\nreal = time.time\n"
        f"looks, jumps = itertools.count(), itertools.cycle({tuple(seconds)})\n"
        "def off():\n"
        "    look = next(looks)\n"
        f"    if look == {after}:\n        open({str(folder / 'jumped')!r}, 'w').close()\n"
        f"    return next(jumps) if look >= {after} else 0\n"
        "time.time = lambda: real() + off()\ntime.time_ns = lambda: int(time.time() * 1e9)\n"
    )
    return environment() | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


def saved(workdir: Path) -> int:
    """Return the newest step saved, 0 for none, after reading the whole checkpoint."""
    if not (workdir / "checkpoints").exists():
        return 0
    logging.set_verbosity(logging.ERROR)  # Orbax warns where nothing tells it what to expect
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest_step() or 0
    if step:
        read = checkpoints._manager.restore(step)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read["variables"]))
    return step
