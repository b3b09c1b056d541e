"""Faults of the storage under a run: full, read-only, damaged, or in use by another run; nothing saved is lost."""

import functools
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Run, environment
from faults import bound_by_permissions, one_sentence, saved
from reliability_log import fault
from test_checkpoint import arrays_of, flip
from test_preemption import assert_same_run

pytestmark = pytest.mark.fault


def command_of(run: Run, workdir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "psp_jax.main", *run.flags, "--workdir", str(workdir), *more]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_full_disk_ends_the_run_with_a_sentence_and_space_lets_it_go_on(finished_run: Run, tmp_path: Path) -> None:
    """No file may be larger than what a checkpoint's arrays take: the run goes on from step 8, and saves each step."""
    workdir = tmp_path / "w"
    shutil.copytree(finished_run.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (200_000, 200_000))
    command = command_of(finished_run, workdir, "--config.checkpoint.every_steps=1")
    with fault(signal="full disk", activity="checkpoint") as facts:
        run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=600)
        done = run(command, cwd=ROOT, env=environment(), preexec_fn=limited)
        facts["lost"] = max(0, 8 - saved(workdir))
        assert "The checkpoint of step 9 could not be saved in" in done.stdout
        sentence = one_sentence(done)
        step_10 = f"The checkpoint of step 10 could not be saved in {workdir}/checkpoints (File too large: raise"
        assert step_10 in sentence
        assert sentence.endswith("that of step 8 is whole, and the same command goes on from there.")
        assert [name for name in names_in(workdir / "checkpoints") if name.isdecimal()] == ["8"]
        done = finished_run.start(workdir)
        assert done.returncode == 0, done.stderr
        assert "going on after step 8" in done.stdout
        assert_same_run(workdir, finished_run.workdir)


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Take the right to write to a folder and all in it, until the test ends."""
    folders: list[Path] = []

    def change(folder: Path, allow: bool) -> None:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200 if allow else path.stat().st_mode & ~0o222)

    def close(folder: Path) -> None:
        folders.append(folder)
        change(folder, False)
        tried = [sys.executable, "-c", f"open({str(folder / 'tried')!r}, 'w')"]
        if not subprocess.run(bound_by_permissions(tried), capture_output=True).returncode:
            pytest.skip("permissions bind nobody here: the system lets this user drop no capability")

    yield close
    for folder in folders:
        change(folder, True)


@pytest.mark.parametrize("state", ["new", "interrupted", "finished", "evaluated"])
def test_a_read_only_workdir_is_told_in_a_sentence(
    state: str, finished_run: Run, tmp_path: Path, read_only: Callable[[Path], None]
) -> None:
    """Nothing of it changes, and where writing is allowed again the run goes on."""
    parent, workdir = tmp_path / "runs", tmp_path / "runs" / "w"
    parent.mkdir()
    if state != "new":
        shutil.copytree(finished_run.workdir, workdir)
    if state == "interrupted":
        shutil.rmtree(workdir / "checkpoints" / "12")
    before = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    read_only(parent)
    more = ["--mode=evaluate", "--config.eval.protocol=whole"] if state == "evaluated" else []
    command = bound_by_permissions(command_of(finished_run, workdir, *more))
    with fault(signal="read-only workdir", activity="start") as facts:
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        sentence = one_sentence(done)
        assert str(parent) in sentence and "make it writable for this user" in sentence and "[Errno" not in sentence
        assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == before
        for path in (parent, *parent.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
        facts["lost"] = max(0, {"new": 0, "interrupted": 8}.get(state, 12) - saved(workdir))
        if state in ("new", "interrupted"):
            again = finished_run.start(workdir)
            assert again.returncode == 0, again.stderr
            assert_same_run(workdir, finished_run.workdir)


DAMAGES = {
    "a bit": lambda file: flip(file),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "removed": lambda file: file.unlink(),
}


@pytest.mark.soak
@pytest.mark.parametrize("what", DAMAGES)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(what: str, finished_run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(finished_run.workdir, workdir)
    DAMAGES[what](arrays_of(workdir / "checkpoints" / "12"))
    with fault(signal="damaged checkpoint", activity="start") as facts:
        done = finished_run.start(workdir)
        assert done.returncode == 0, done.stderr
        assert "The checkpoint of step 12 is damaged (" in done.stderr
        begun = int(re.search(r"going on after step (\d+)", done.stdout)[1])
        facts |= {"again": 12 - begun, "lost": max(0, 8 - begun)}
        assert begun == 8
        assert names_in(workdir / "checkpoints") == ["12", "8", "damaged-12"]
        assert_same_run(workdir, finished_run.workdir)


@pytest.mark.soak
def test_a_second_run_in_a_workdir_is_refused_and_the_first_ends_as_alone(finished_run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    first = subprocess.Popen(command_of(finished_run, workdir), cwd=ROOT, env=environment(), **streams)
    with fault(signal="second run", activity="step"):
        while not (workdir / ".lock").exists():
            assert first.poll() is None, "it ended before it began"
        done = finished_run.start(workdir)
        assert f"Another process is working in {workdir}" in one_sentence(done)
        output, _ = first.communicate(timeout=300)
        assert first.returncode == 0, output
        assert_same_run(workdir, finished_run.workdir)
