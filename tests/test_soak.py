"""Faults at any moment of a run: it ends with what an undisturbed run gives, or in one sentence, nothing saved lost.

Kills, SIGTERM, dead data workers, a corrupt record, a clock that jumps; full and read-only disks, damaged checkpoints
and second runs are in test_storage_faults.py. PSP_JAX_SOAK_SEED chooses other moments; what fails prints it.
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Run
from faults import SEED, announced, jumping_clock, moments, one_sentence, random_fault, run_with, saved
from reliability_log import fault, record
from test_preemption import assert_same_run

from psp_jax.preemption import CODE

pytestmark = pytest.mark.soak

KILLS, TERMS = 50, 12
SAVED_EVERY = 4  # steps, as in TINY


def soak(run: Run, base: Path, count: int, kind: signal.Signals, code: int) -> None:
    """Put `count` faults into runs, each of which goes on until it is finished, and compare those with `run`.

    What is saved is what was read back after the fault before, or what the run itself said to have saved since.
    """
    rng, faults, runs = moments(kind.name), 0, 0
    while faults < count:
        workdir, before, finished = base / f"w{runs}", 0, False
        while not finished:
            moment = random_fault(rng, kind)
            place = {key: moment[key] for key in ("activity", "entry", "seconds")}
            with fault(signal=kind.name, seed=SEED, **place) as facts:
                done, taken = run_with(run, workdir, moment)
                assert done.returncode in (0, code), done.stdout + done.stderr
                before, now = max(before, announced(done)), saved(workdir)
                again = max(0, (taken or 0) - now)
                facts |= {"came": done.returncode == code, "announced": announced(done), "again": again}
                facts["lost"] = max(0, before - now)
                assert now >= before, f"step {before} was saved, and after {moment} only {now} is: {done.stdout}"
                # One checkpoint may be on its way when the next steps are taken.
                assert again <= 2 * SAVED_EVERY, moment
            faults += done.returncode == code
            before, finished = now, done.returncode == 0
        same = False
        try:
            assert_same_run(workdir, run.workdir)
            same = True
        finally:
            record("run", signal=kind.name, same=same)
        runs += 1


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_data_worker_killed(step: int, finished_run: Run, tmp_path: Path) -> None:
    """The worker may have sent all batches by then, and the run not need it any more."""
    moment = {"activity": "data_wait", "entry": step, "seconds": 0, "signal": int(signal.SIGKILL), "target": "worker"}
    with fault(signal="worker", activity="data_wait") as facts:
        done, taken = run_with(finished_run, tmp_path / "w", moment)
        now = saved(tmp_path / "w")
        came = done.returncode != 0
        due = max((taken or 0) // SAVED_EVERY * SAVED_EVERY, announced(done))
        facts |= {"came": came, "lost": max(0, due - now), "again": (taken or 0) - now if came else 0}
        assert now == due
        if done.returncode or step == 1:  # at the first it has eleven to send, more than a socket holds
            assert "Data worker process" in one_sentence(done) and "was killed by SIGKILL" in done.stderr
            again = finished_run.start(tmp_path / "w")
            assert again.returncode == 0, again.stderr
        assert_same_run(tmp_path / "w", finished_run.workdir)


def test_a_corrupt_record_in_the_middle_of_a_shard(finished_run: Run, tmp_path: Path) -> None:
    (flag,) = [flag for flag in finished_run.flags if flag.startswith("--config.data.prepared_dir=")]
    shutil.copytree(flag.partition("=")[2], tmp_path / "prepared")
    (shard,) = [file for file in (tmp_path / "prepared").rglob("*train.array_record*")]
    sound = shard.read_bytes()
    middle = len(sound) // 2
    shard.write_bytes(sound[:middle] + bytes(byte ^ 255 for byte in sound[middle : middle + 64]) + sound[middle + 64 :])
    there = f"--config.data.prepared_dir={tmp_path / 'prepared'}"
    with fault(signal="corrupt record", activity="data_wait") as facts:
        done = finished_run.start(tmp_path / "w", there)
        facts |= {"came": done.returncode != 0, "lost": max(0, announced(done) - saved(tmp_path / "w"))}
        assert not facts["lost"]
        sentence = one_sentence(done)
        assert "train example" in sentence and "cannot be read" in sentence and str(tmp_path) in sentence
        shard.write_bytes(sound)
        again = finished_run.start(tmp_path / "w", there)
        assert again.returncode == 0, again.stderr
        assert_same_run(tmp_path / "w", finished_run.workdir)


MINUTES, DAY = (0, 240, -180, 60, -290), 86_400


@pytest.mark.parametrize("jumps", [MINUTES, (DAY,), (-DAY,)], ids=["minutes", "a day on", "a day back"])
def test_a_clock_that_jumps(jumps: tuple[float, ...], finished_run: Run, tmp_path: Path) -> None:
    """Orbax takes its limit of ten minutes from the wall clock: a jump of a day in a save may end the run."""
    command = [sys.executable, "-m", "psp_jax.main", *finished_run.flags, "--workdir", str(tmp_path / "w")]
    environment = jumping_clock(tmp_path / "clock", jumps, after=200)
    looks = "import time; looks = [time.time() for _ in range(400)]; print(max(looks) - min(looks) > 59)"
    seen = subprocess.run([sys.executable, "-c", looks], env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout == "True\n"
    (tmp_path / "clock/jumped").unlink()
    with fault(signal="clock", activity="all") as facts:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        came = (tmp_path / "clock/jumped").exists()
        lost = max(0, announced(done) - saved(tmp_path / "w"))
        facts |= {"came": came, "lost": lost, "ended": done.returncode}
        assert came and not lost
        if jumps is not MINUTES and done.returncode == 1:
            assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            done = finished_run.start(tmp_path / "w")
        assert done.returncode == 0, done.stdout + done.stderr
        assert_same_run(tmp_path / "w", finished_run.workdir)


def test_sigterm_at_any_moment(finished_run: Run, tmp_path: Path) -> None:
    """Until the run has taken hold of the signal it ends the process as any other."""
    rng = moments("SIGTERM")
    for index in range(TERMS):
        workdir, moment = tmp_path / f"w{index}", random_fault(rng, signal.SIGTERM)
        place = {key: moment[key] for key in ("activity", "entry", "seconds")}
        with fault(signal="SIGTERM", seed=SEED, **place) as facts:
            done, taken = run_with(finished_run, workdir, moment)
            assert done.returncode in (0, CODE, -signal.SIGTERM), done.stdout + done.stderr
            now = saved(workdir)
            facts |= {"came": done.returncode != 0, "again": max(0, (taken or 0) - now)}
            facts["lost"] = max(0, announced(done) - now)
            assert not facts["lost"], done.stdout
            if done.returncode == CODE:
                assert now == (taken or 0), f"{moment}: {done.stdout}"
            if done.returncode:
                again = finished_run.start(workdir)
                assert again.returncode == 0, again.stderr
            assert_same_run(workdir, finished_run.workdir)


def test_kills_at_any_moment(finished_run: Run, tmp_path: Path) -> None:
    soak(finished_run, tmp_path, KILLS, signal.SIGKILL, -signal.SIGKILL)
