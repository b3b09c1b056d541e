"""The line that a command ends with where something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_module

from psp_jax import classes
from psp_jax.command import cause, told
from psp_jax.config import check_fields, defaults, unknown_field
from psp_jax.config_file import read_config
from psp_jax.workdir import check_owner


def test_a_line_holds_nothing_that_steers_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No class table") as refused:
        classes.get(f"{tmp_path}/a\x1b[31m\r\u2028\u202e\ud800b")
    words = told(refused.value)
    assert words is not None and words.isprintable() and f"{tmp_path}/a [31m    b" in words
    with pytest.raises(ValueError) as foreign:
        int("x")
    assert told(foreign.value) is None
    assert cause(ValueError("two\n lines " + "x" * 1000)) == "ValueError: two lines " + "x" * 290


def test_an_error_in_a_configuration_names_its_file(tmp_path: Path) -> None:
    for body, problem in (("return {}['x']", "KeyError: 'x'"), ("return (", "SyntaxError: '(' was never closed")):
        (tmp_path / "mine.py").write_text(f"def get_config():\n    {body}\n")
        done = run_module("psp_jax.main", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'w'}")
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {tmp_path / 'mine.py'}: {problem}") and done.stderr.count("\n") == 1
    wrong = run_module(
        "psp_jax.main", "--config=configs/folder.py", "--workdir=w", f"--config.train.steps={'x' * 9999}"
    )
    assert wrong.stderr.startswith("error: flag --config.train.steps=xxx") and len(wrong.stderr) < 600


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("train", "train.aux_weight, train.batch_size, "),
        ("train.stpes", "train.aux_weight, train.batch_size, "),
        ("", "augment.*, checkpoint.*, "),
        ("nothing.at.all", "augment.*, checkpoint.*, "),
        ("trai", "augment.*, checkpoint.*, "),
    ],
)
def test_an_unknown_field_is_told_with_those_near_it(field: str, near: str) -> None:
    assert unknown_field(field).startswith(f"Unknown configuration field {field}; known fields: {near}")
    assert len(unknown_field(field)) < 500


@pytest.mark.parametrize(
    ("field", "value"),
    [("train.crop_size", "('a',)"), ("model.bins", "(1, 2.5)"), ("loss.class_weights", "(1.0, None)")],
)
def test_a_list_of_other_things_than_numbers_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}=.* must hold (whole )?numbers alone"):
        read_config("configs/folder.py", [f"--config.{field}={value}"])
    assert read_config("configs/folder.py", ["--config.loss.class_weights=(1, 2.5)"]).loss.class_weights == (1, 2.5)


def test_a_workdir_of_another_run_is_told_in_a_short_sentence(tmp_path: Path) -> None:

    config, table = defaults(), classes.get("camvid")
    check_fields(config)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    plain = json.loads(config.to_json())
    record = {"config": plain | {"optimizer": {"x" * 5000: 1}}, "resolved": {"train_images": 3}}
    (tmp_path / "config.json").write_text(json.dumps(record | {"classes_digest": table.digest()}))
    changed = plain | {"augment": {name: 7 for name in plain["augment"]}}
    with pytest.raises(ValueError, match=r"augment\.base_size: \[\] -> 7; .*; and \d+ more\); choose") as refused:
        check_owner(tmp_path, changed, table, 3, False)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_write_that_failed_beside_the_one_that_is_told_has_no_traceback(debug: str) -> None:
    code = """
import asyncio, gc
from psp_jax.command import run_command


async def fail():
    raise OSError(f"{asyncio.current_task().get_name()} is full")


async def save():
    tasks = [asyncio.create_task(fail(), name=name) for name in ("one", "two")]
    await asyncio.sleep(0)
    await tasks[0]


def main():
    try:
        asyncio.run(save())
    finally:
        gc.collect()


run_command(main)
"""
    settings = os.environ | {"PSP_JAX_DEBUG": debug}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 1
    assert ("never retrieved" in done.stderr) == ("Traceback" in done.stderr) == bool(debug)
    assert (done.stderr == "error: one is full\n") != bool(debug)
