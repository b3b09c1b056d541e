"""What benchmarks/reliability.py makes of the lines that the tests of reliability write."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from reliability_log import VARIABLE, fault, record

from benchmarks import reliability


def test_faults_and_inputs_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reliability.VARIABLE == VARIABLE
    monkeypatch.setenv(VARIABLE, str(tmp_path / "log"))
    for came, lost, again in ((True, 0, 0), (True, 1, 3), (False, 0, 0)):
        with fault(signal="SIGKILL", seed="7", activity="step") as facts:
            facts |= {"came": came, "lost": lost, "again": again}
    with pytest.raises(ZeroDivisionError), fault(signal="clock", activity="all", again=0, came=False):
        raise ZeroDivisionError
    for same in (True, False):
        record("run", signal="SIGKILL", same=same)
    for number, outcome in enumerate(["read", "refused", "broken", "refused"]):
        record("input", input=number, target="image", outcome=outcome, exact=number < 2)
    found = reliability.count([json.loads(line) for line in (tmp_path / "log").read_text().splitlines()])
    assert found == {
        "faults": {"SIGKILL": 2, "clock": 1},
        "faults_survived": 2,
        "faults_by_activity": {"step": 2, "all": 1},
        "seeds": ["7"],
        "saved_steps_lost": 1,
        "faults_by_steps_taken_again": {"0": 2, "3": 1},
        "runs_finished_after_kills": 2,
        "runs_finished_after_kills_bit_for_bit_as_undisturbed": 1,
        "inputs": 4,
        "inputs_by_kind": {"image": {"read": 1, "refused": 2, "broken": 1}},
        "inputs_with_checksum": 2,
        "broken_inputs": 1,
    }


def test_a_fault_that_is_not_survived_prints_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), fault(signal="SIGKILL", seed="7", activity="step", entry=3):
        raise ZeroDivisionError
    expected = {"signal": "SIGKILL", "seed": "7", "activity": "step", "entry": 3}
    assert json.loads(capsys.readouterr().out.removeprefix("not survived: ")) == expected


def test_moments_are_those_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(kind: signal.Signals) -> list[dict]:
        rng = faults.moments(kind.name)
        return [faults.random_fault(rng, kind) for _ in range(5)]

    assert faults.VARIABLE == "PSP_JAX_SOAK_SEED"
    first = draw(signal.SIGKILL)
    assert first == draw(signal.SIGKILL) != draw(signal.SIGTERM)
    monkeypatch.setattr(faults, "SEED", "another")
    assert draw(signal.SIGKILL) != first


def test_what_a_run_says_to_have_saved_is_read_from_its_words() -> None:
    line = "checkpoint of step {} written and read back in 0.1 s: somewhere/{}\n"
    done = subprocess.CompletedProcess([], -9, line.format(4, 4) + line.format(12, 12), line.format(8, 8))
    assert faults.announced(done) == 12
    assert faults.announced(subprocess.CompletedProcess([], -9, "step 4/12", "")) == 0


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    record("run", same=True)
    assert not list(tmp_path.iterdir())


def test_tests_that_fail_or_tell_nothing_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "TESTS", ("tests/test_reliability.py",))  # none of it is a soak test
    monkeypatch.setattr(sys, "argv", ["reliability.py", "--output", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="exit status 5"):
        reliability.main()
    assert not list(tmp_path.iterdir())
    (tmp_path / "log").write_text('{"kind": "run", "same": true}\n')
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--log", str(tmp_path / "log")])
    with pytest.raises(SystemExit, match="exit status 5"):
        reliability.main()
    assert json.loads((tmp_path / "out.json").read_text())["pytest"] == "exit status 5"


def test_the_runs_of_tests_end_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child, waited = tmp_path / "child", subprocess.Popen.wait
    (tmp_path / "python").write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {child}.new\nmv {child}.new {child}\nwait\n")
    (tmp_path / "python").chmod(0o755)

    def wait(process: subprocess.Popen, timeout: float | None = None) -> int:
        if timeout is None:
            return waited(process)
        while not child.exists():
            time.sleep(0.05)
        raise subprocess.TimeoutExpired("tests", timeout)

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    assert reliability.run_tests(tmp_path / "log", 1) is None
    stat, end = Path(f"/proc/{int(child.read_text())}/stat"), time.monotonic() + 300
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < end, "the child of the tests goes on"
        time.sleep(0.05)
