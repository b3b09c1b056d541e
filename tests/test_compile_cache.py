"""What is compiled once is found again, with the same results, and a cache that fails costs only time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, Run, environment

import psp_jax
from psp_jax.compile_cache import _trim, default_directory

PROGRAM = """
import json, sys
import jax
from psp_jax.compile_cache import CompileLog, enable

enable(sys.argv[1])
log = CompileLog()
value = float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.arange(9.0).reshape(3, 3)))
print(json.dumps([value, log.hits, log.misses, log.seconds, log.words()]))
"""


def compiled(directory: object) -> tuple[list, str]:
    """Run a small program in a process of its own: its result, hits, misses, seconds and words, and its stderr."""
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout), done.stderr


def test_the_second_process_compiles_nothing(tmp_path: Path):
    first, second = compiled(tmp_path)[0], compiled(tmp_path)[0]
    assert first[0] == second[0] == 486.0  # of the 3x3 matrix 0..8, squared and added up
    assert first[1] == second[2] == 0
    assert first[2] == second[1] > 0
    assert second[4] == f"compiled in {second[3]:.1f} s up to the first step (cache: {second[1]} hits, 0 misses)"
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("cpu-")  # of this kind of CPU


def test_damaged_entries_are_compiled_again(tmp_path: Path):
    assert compiled(tmp_path)[0][2] > 0
    for file in tmp_path.rglob("*-cache"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result, error = compiled(tmp_path)
    assert result[:2] == [486.0, 0]
    assert "Error reading persistent compilation cache entry" in error


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path):
    (tmp_path / "file").touch()
    result, error = compiled(tmp_path / "file" / "cache")
    assert result[:3] == [486.0, 0, 0]
    assert result[4].endswith("(no cache)")
    assert error.count("\n") == 1
    assert error.startswith(f"warning: compiled programs are not kept: {tmp_path}/file/cache/cpu-")


def test_off_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert compiled("off")[0][:3] == [486.0, 0, 0]
    assert not list(tmp_path.iterdir())


def test_what_was_read_longest_ago_goes_first(tmp_path: Path):
    for age, name in enumerate(("new-cache", "old-cache", "older-cache", "oldest-other")):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1e9 - age, 1e9))
    _trim(tmp_path, 300)
    assert len(list(tmp_path.iterdir())) == 4
    _trim(tmp_path, 150)
    assert {file.name for file in tmp_path.iterdir()} == {"new-cache", "oldest-other"}


def test_several_processes_share_a_folder_beside_the_workdir(monkeypatch: pytest.MonkeyPatch):
    assert default_directory(Path("/runs/a"), 2) == os.environ["JAX_COMPILATION_CACHE_DIR"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert default_directory(Path("/runs/a"), 2) == "/runs/.psp_jax_compilation"
    assert default_directory(Path("/runs/a"), 1) == str(Path.home() / ".cache" / "psp_jax" / "compilation")


def test_a_run_started_again_compiles_nothing_and_learns_the_same(finished_run: Run, tmp_path: Path):
    first = finished_run.workdir
    second = tmp_path / "second"
    done = finished_run.start(second)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (first, second)
    )
    assert (ours[0]["compile_hits"], theirs[0]["compile_misses"]) == (0, 0)
    assert theirs[0]["compile_hits"] == ours[0]["compile_misses"] > 0
    assert theirs[0]["compile_seconds"] < ours[0]["compile_seconds"] / 2  # a tenth on an idle machine
    assert f"(cache: {theirs[0]['compile_hits']:.0f} hits, 0 misses)" in done.stdout
    learned = ("loss", "main_loss", "aux_loss", "grad_norm", "state_norm")
    assert [[line[name] for name in learned] for line in ours] == [[line[name] for name in learned] for line in theirs]
    variables = [jax.tree.leaves(psp_jax.load(workdir).variables) for workdir in (first, second)]
    assert all(np.array_equal(a, b) for a, b in zip(*variables, strict=True))
    record = json.loads((second / "config.json").read_text())
    assert record["environment"]["JAX_PLATFORMS"] == "cpu"
