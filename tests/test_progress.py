"""Every line of metrics.jsonl is whole and told once, and the console stays plain where there is no terminal."""

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from psp_jax import progress
from psp_jax.progress import Progress


def read(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    lines = (folder / name).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def open_progress(folder: Path, start_step: int = 0, *, primary: bool = True, tensorboard: bool = False) -> Progress:
    return Progress(folder, 100, start_step, primary=primary, tensorboard=tensorboard)


def test_log_writes_one_object_per_call(tmp_path):
    with open_progress(tmp_path / "new") as log:
        log.log(1, {"loss": 2.5})
        log.log(2, {"loss": np.float32(0.25), "images_per_second": 10})
        assert len(read(tmp_path / "new")) == 2  # at once, not only at the end: a killed run keeps its lines
    assert read(tmp_path / "new") == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 0.25, "images_per_second": 10.0},
    ]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with open_progress(tmp_path) as log:
        log.log(1, {"loss": math.nan, "main_loss": math.inf, "aux_loss": -math.inf, "learning_rate": 0.01})
    assert read(tmp_path) == [{"step": 1, "loss": None, "main_loss": None, "aux_loss": None, "learning_rate": 0.01}]


def test_resume_drops_later_steps_and_the_half_line_of_a_kill(tmp_path):
    with open_progress(tmp_path) as log:
        for step in (10, 20, 30, 40):
            log.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')
    (tmp_path / "skipped.jsonl").write_text('{"step": 19}\n{"step": 21}\n')
    with open_progress(tmp_path, start_step=20) as log:
        log.log(30, {"loss": -1.0})
    assert read(tmp_path) == [{"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 30, "loss": -1.0}]
    assert read(tmp_path, "skipped.jsonl") == [{"step": 19}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "skipped.jsonl", "validation.jsonl"]


def test_validations_have_a_log_of_their_own_that_resumes_alike(tmp_path):
    with open_progress(tmp_path) as log:
        log.validated(10, {"mean_iou": 0.25, "mean_accuracy": None})
        log.validated(20, {"mean_iou": 0.5})
    with open_progress(tmp_path, start_step=10) as log:
        log.validated(20, {"mean_iou": 0.75})
    expected = [{"step": 10, "mean_iou": 0.25, "mean_accuracy": None}, {"step": 20, "mean_iou": 0.75}]
    assert read(tmp_path, "validation.jsonl") == expected
    assert read(tmp_path) == []


def test_resume_mends_a_last_line_without_its_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}')
    with open_progress(tmp_path, start_step=10) as log:
        log.log(20, {})
    assert read(tmp_path) == [{"step": 10}, {"step": 20}]


@pytest.mark.parametrize("line", ["12", "null", '{"loss": 1}', '{"step": "x"}', "\x00\x00", "[1]"])
def test_resume_drops_lines_that_are_no_record(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 10}\n')
    open_progress(tmp_path, start_step=10).close()
    assert read(tmp_path) == [{"step": 10}]


def test_resume_leaves_a_good_file_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n')
    before = path.stat().st_ino
    open_progress(tmp_path, start_step=10).close()
    assert path.stat().st_ino == before


def test_other_processes_write_and_say_nothing(tmp_path, capsys):
    with open_progress(tmp_path / "none", primary=False, tensorboard=True) as log:
        log.advance(1)
        log.log(1, {"loss": 1.0})
        log.validated(1, {"mean_iou": 0.5})
        log.image(1, "x", np.zeros((4, 4, 3), np.uint8))
        log.say("hello")
        with log.track(2, "validate") as advance:
            advance(2)
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr().out == ""


def test_plain_lines_tell_what_matters(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # many CI machines set it; a log file is still no terminal
    now = iter([100.0, 110.0])
    with open_progress(tmp_path) as log:
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
        log.advance(1)
        log.advance(11)  # a step a second, 89 to go
        monkeypatch.undo()
        log.log(11, {"aux_loss": 2.0, "loss": 0.123456, "images_per_second": 31.25, "data_wait": 0.034})
        log.say("[bold] is text, not markup")
        with log.track(3, "validate") as advance:
            advance(1)
            advance(2)
        log.validated(11, {"mean_iou": 0.61239, "mean_accuracy": None})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step  11/100  loss 0.1235  aux_loss 2  31.2 images/s  data wait 3 %  0:01:29 left"
    assert lines[1] == "[bold] is text, not markup"
    assert lines[2].startswith("validate: 3/3 in ")
    assert lines[3] == "validation after step 11  mean_iou 0.6124  mean_accuracy n/a"
    assert len(lines) == 4 and len(read(tmp_path)) == 1
    assert "\x1b" not in "".join(lines)


def test_long_work_gives_a_sign_of_life_without_a_terminal(capsys, monkeypatch):
    now = iter([0.0, 10.0, 35.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.track(30, "validate") as advance:
        for _ in range(3):
            advance(10)
    assert capsys.readouterr().out.splitlines() == [
        "validate: 20/30 after 35 s, 0:00:18 left",
        "validate: 30/30 in 50.0 s",
    ]


def test_what_was_done_before_does_not_count_as_speed(capsys, monkeypatch):
    now = iter([0.0, 60.0, 70.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.track(1000, "evaluate", first=900) as advance:
        advance(10)
    assert capsys.readouterr().out.splitlines()[0] == "evaluate: 910/1000 after 60 s, 0:09:00 left"


def test_terminal_shows_bars_and_lines(tmp_path):
    program = f"""
from psp_jax.progress import Progress
with Progress({str(tmp_path)!r}, 4, 0, primary=True, tensorboard=False) as log:
    for step in range(1, 5):
        log.advance(step)
        log.log(step, {{"loss": 1.5, "images_per_second": 7.0}})
    log.say("[bold] is text, not markup")
    with log.track(2, "validate") as advance:
        advance(1)
        log.say("half")  # a line redraws the bars
        advance(1)
"""
    outer, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    shown = b""
    while True:
        try:
            chunk = os.read(outer, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(outer)
    assert process.wait() == 0, shown.decode()
    text = shown.decode()
    assert "\x1b[" in text and "4/4" in text
    assert "step 4/4  loss 1.5  7.0 images/s" in text
    assert "0:00:00 left" in text and "validate: 2/2 in " in text and "[bold] is text, not markup" in text


def test_tensorboard_holds_scalars_and_images_and_purges_what_is_taken_again(tmp_path):
    from tensorboardX.proto import event_pb2

    with open_progress(tmp_path, start_step=40, tensorboard=True) as log:
        log.log(50, {"loss": 1.5, "aux_loss": math.nan})
        log.validated(50, {"mean_iou": 0.625, "mean_accuracy": None})
        log.image(50, "validation/0", np.full((8, 6, 3), 200, np.uint8))
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # TFRecord: u64 length, u32 checksum, the event, u32 checksum
        length = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    values = {value.tag: (event.step, value) for event in events for value in event.summary.value}
    assert set(values) == {"loss", "validation/mean_iou", "validation/0"}
    assert values["validation/mean_iou"][1].simple_value == 0.625
    assert values["loss"][0] == 50 and values["loss"][1].simple_value == 1.5
    assert (values["validation/0"][1].image.height, values["validation/0"][1].image.width) == (8, 6)
    assert [event.step for event in events if event.HasField("session_log")] == [41]


@pytest.mark.parametrize("primary", [True, False])
def test_every_piece_of_work_asks_whether_to_go_on(tmp_path, primary):
    asked = []
    log = Progress(tmp_path, 9, 0, primary=primary, tensorboard=False, between=lambda: asked.append(1))
    with log, log.track(4, "validate") as advance:
        advance(1)
        advance(3)
    assert len(asked) == 2
