"""What benchmarks/reliability.py makes of the lines that the tests of reliability write."""

import json
from pathlib import Path

import pytest
from reliability_log import VARIABLE, fault, record

from benchmarks import reliability


def test_faults_and_inputs_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reliability.VARIABLE == VARIABLE
    monkeypatch.setenv(VARIABLE, str(tmp_path / "log"))
    for came, lost in ((True, 0), (True, 3), (False, 0)):
        with fault(signal="SIGKILL", activity="step") as facts:
            facts |= {"came": came, "lost": lost}
    with pytest.raises(ZeroDivisionError), fault(signal="clock", activity="all", lost=0):
        raise ZeroDivisionError
    record("run", signal="SIGKILL", same=True)
    for number, outcome in enumerate(["read", "refused", "broken", "refused"]):
        record("input", input=number, target="image", outcome=outcome)
    found = reliability.count([json.loads(line) for line in (tmp_path / "log").read_text().splitlines()])
    assert found == {
        "faults": {"SIGKILL": 2, "clock": 1},
        "faults_survived": 2,
        "faults_by_activity": {"step": 2, "all": 1},
        "steps_lost_beyond_the_last_save": {"0": 2, "3": 1},
        "runs_finished_after_kills_bit_for_bit_as_undisturbed": 1,
        "inputs": 4,
        "inputs_by_kind": {"image": {"read": 1, "refused": 2, "broken": 1}},
        "uncaught_exceptions": 1,
    }


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    record("run", same=True)
    assert not list(tmp_path.iterdir())
