"""The time of a run is divided without a gap, over several starts, and images per second count steps alone."""

import json

import pytest

from psp_jax.goodput import Goodput
from psp_jax.walltime import WallTime


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def take_step(walltime, clock, step, wait, work):
    walltime.begin(step)
    with walltime.during("data_wait"):
        clock.now += wait
    clock.now += work


def test_throughput_counts_per_interval_and_leaves_pauses_out(clock):
    walltime = WallTime(clock)
    clock.now += 50.0  # until the first step
    take_step(walltime, clock, 1, wait=2.0, work=6.0)
    walltime.add(16)
    walltime.add(16)
    for pause in ("validation", "checkpoint", "compile"):
        with walltime.during(pause):
            clock.now += 100.0
    assert walltime.take() == {"images_per_second": 4.0, "data_wait": 0.25}
    clock.now += 4.0
    walltime.add(8)
    assert walltime.take() == {"images_per_second": 2.0, "data_wait": 0.0}


def test_throughput_of_no_time_is_finite():
    assert WallTime(lambda: 0.0).take() == {"images_per_second": 0.0, "data_wait": 0.0}


def test_a_step_lasts_from_its_begin_to_the_next_without_pauses(clock):
    walltime = WallTime(clock)
    take_step(walltime, clock, 1, wait=1.0, work=2.0)
    with walltime.during("validation"):
        clock.now += 100.0
    take_step(walltime, clock, 2, wait=0.5, work=1.0)
    walltime.begin(3)
    assert list(walltime.step_seconds) == [3.0, 1.5] and walltime.moves == 3


def test_the_time_of_all_starts_is_divided_without_a_gap(tmp_path, clock):
    """Steps 1-3, killed four seconds after the last record; down for 60 s; goes on after step 1."""
    walltime = WallTime(clock)
    goodput = Goodput(tmp_path, walltime, clock)
    clock.now += 10.0
    for step in (1, 2, 3):
        take_step(walltime, clock, step, wait=1.0, work=2.0)
        goodput.keep()  # once: ten seconds after it was made
    clock.now += 4.0
    first = json.loads((tmp_path / "goodput.json").read_text())
    assert (first["step"], first["starts"], first["ended"], first["time"]) == (1, 1, False, 1013.0)
    clock.now += 60.0
    walltime = WallTime(clock)
    clock.now += 5.0
    goodput = Goodput(tmp_path, walltime, clock)
    clock.now += 1.0
    with goodput:
        for step in (1, 2):
            take_step(walltime, clock, step, wait=0.0, work=3.0)
        with walltime.during("checkpoint"):
            clock.now += 2.0
    record = json.loads((tmp_path / "goodput.json").read_text())
    # 10 s until the first step, then 6 + 4 + 60 s since the last record, and 6 s until the next first step.
    expected = {"start": 86.0, "data_wait": 1.0, "step": 2.0 + 3.0, "again": 3.0, "checkpoint": 2.0}
    assert record["seconds"] == {"compile": 0.0, "validation": 0.0} | expected
    assert sum(record["seconds"].values()) == clock.now - 1000.0
    assert sum(record["shares"].values()) == pytest.approx(1.0)
    assert record["ended"] and (record["step"], record["starts"]) == (2, 2)
    clock.now += 500.0  # between the end of a run and its continuation by more steps
    goodput = Goodput(tmp_path, WallTime(clock), clock)
    assert goodput.words().startswith("time of 97 s, 3 starts: steps 5.2 %, data wait 1.0 %, compilation 0.0 %, ")


def test_a_finished_run_started_again_leaves_the_record_alone(tmp_path, clock, capsys):
    with Goodput(tmp_path, WallTime(clock), clock):
        clock.now += 20.0
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": 3, "starts": 1, "step": 2, "ended": true, "time": 1.0}'])
def test_a_damaged_record_begins_anew(tmp_path, clock, capsys, text):
    (tmp_path / "goodput.json").write_text(text)
    goodput = Goodput(tmp_path, WallTime(clock), clock)
    assert "goodput.json is damaged; the record of the time begins anew" in capsys.readouterr().err
    goodput.write()
    assert json.loads((tmp_path / "goodput.json").read_text())["starts"] == 1


def test_a_record_that_cannot_be_written_ends_no_run(tmp_path, clock, capsys):
    goodput = Goodput(tmp_path, WallTime(clock), clock)
    (tmp_path / "goodput.json").mkdir()
    goodput.write()
    assert "goodput.json was not written" in capsys.readouterr().err
