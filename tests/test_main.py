"""The commands as a user runs them: train, resume after a kill, evaluate, export, predict, and refusals in words."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, Run, environment, run_module
from PIL import Image

import psp_jax
from psp_jax import evaluate, train
from psp_jax.checkpoint import Checkpoints
from psp_jax.config import defaults
from psp_jax.walltime import WallTime
from psp_jax.workdir import lock


def final_variables(workdir: Path) -> dict:
    """Parameters and statistics of the last checkpoint, whatever their structure."""
    return psp_jax.load(workdir).variables


def assert_identical(ours: dict, theirs: dict) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


def test_workdir_holds_what_the_run_was_and_gave(finished_run: Run) -> None:
    record = json.loads((finished_run.workdir / "config.json").read_text())
    assert record["resolved"]["steps"] == 12
    assert record["resolved"]["epochs"] == pytest.approx(12 * 4 / 21)
    assert record["resolved"]["head_lr"] == pytest.approx(0.1)
    assert record["versions"]["jax"] == jax.__version__
    lines = [json.loads(line) for line in (finished_run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    for line in lines:
        assert line["loss"] == pytest.approx(line["main_loss"] + 0.4 * line["aux_loss"], rel=1e-4)
        assert line["learning_rate"] == pytest.approx(0.01 * (1 - (line["step"] - 1) / 12) ** 0.9, rel=1e-4)
        assert {"images_per_second", "data_wait"} <= set(line)
    results = json.loads((finished_run.workdir / "eval" / "metrics.json").read_text())
    assert set(results["per_class_iou"]) == {"red", "green", "blue"}
    assert results["images"] == 10
    annotations = sorted((Path(record["config"]["data"]["dir"]) / "annotations" / "val").glob("*.png"))
    assert results["pixels"] == sum(int((np.asarray(Image.open(path)) != 255).sum()) for path in annotations)
    assert results["protocol"]["name"] == "whole"
    assert len(list((finished_run.workdir / "predictions").glob("*.png"))) == 4


def test_evaluation_of_the_finished_run_repeats_its_validation(finished_run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    shutil.copytree(finished_run.workdir, workdir)
    before = json.loads((workdir / "eval" / "metrics.json").read_text())
    (workdir / "eval" / "metrics.json").unlink()
    # Eight devices, in batches that do not divide the ten images: padding must not count.
    done = finished_run.start(
        workdir, "--mode=evaluate", "--config.eval.protocol=whole", "--config.eval.batch_size=8", devices=8
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = json.loads((workdir / "eval" / "metrics.json").read_text())
    assert after["pixels"] == before["pixels"]
    assert after["mean_iou"] == pytest.approx(before["mean_iou"], abs=2e-3)


def test_killed_run_ends_as_if_never_killed(finished_run: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "w"
    command = [sys.executable, "-m", "psp_jax.main", *finished_run.flags, "--workdir", str(workdir)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "4").exists():  # renamed to this when complete
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_after = Checkpoints(workdir / "checkpoints").latest_step()
    assert killed_after is not None
    assert killed_after < 12
    # Another number of workers on the way: the data are a function of seed and step alone.
    done = finished_run.start(workdir, "--config.data.num_workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {killed_after}" in done.stdout
    assert_identical(final_variables(workdir), final_variables(finished_run.workdir))
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_finished_run_started_again_has_nothing_to_do(finished_run: Run) -> None:
    before = (finished_run.workdir / "metrics.jsonl").read_text()
    done = finished_run.start(finished_run.workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished already at step 12" in done.stdout
    assert (finished_run.workdir / "metrics.jsonl").read_text() == before


def test_another_configuration_is_refused_and_nothing_is_touched(finished_run: Run) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished_run.workdir.rglob("*")}
    done = finished_run.start(finished_run.workdir, "--config.optimizer.base_lr=0.5")
    assert done.returncode == 1
    assert "optimizer.base_lr: 0.01 -> 0.5" in done.stderr
    assert "--resume=override" in done.stderr and "or delete that folder to begin anew" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished_run.workdir.rglob("*")} == before


def test_a_run_without_a_checkpoint_may_be_started_anew(finished_run: Run, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(finished_run.workdir / "config.json", tmp_path)
    done = finished_run.start(tmp_path, "--config.seed=3", "--config.train.steps=1", "--config.log.images=0")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 3
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_diverging_run_stops_and_its_last_step_can_be_taken_again(finished_run: Run, tmp_path: Path) -> None:
    """The run goes on from step 12, on purpose with a rate that no parameter survives, and saves after every step."""
    workdir = tmp_path / "w"
    shutil.copytree(finished_run.workdir, workdir)
    flags = ("--config.optimizer.base_lr=1e30", "--config.train.steps=40", "--config.checkpoint.every_steps=1")
    done = finished_run.start(workdir, *flags, "--config.train.max_skipped=3", "--resume=override")
    assert done.returncode == 1
    assert "going on after step 12" in done.stdout
    assert "step 13 is skipped and changes nothing (state_norm=inf), with the images scene0" in done.stdout
    assert re.search(
        r"Steps 13 to 15 were skipped, the last for state_norm=inf with the images (scene0\d\d(, )?){4};", done.stderr
    )
    assert "Traceback" not in done.stderr
    skipped = [json.loads(line) for line in (workdir / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], len(line["images"])) for line in skipped] == [(13, 4), (14, 4), (15, 4)]
    assert Checkpoints(workdir / "checkpoints").latest_step() == 14
    assert_identical(final_variables(workdir), final_variables(finished_run.workdir))

    bundle = workdir / "not_finite" / "15"
    with np.load(bundle / "batch.npz") as stored:
        batch = dict(stored)
    assert batch["image"].shape == (4, 41, 41, 3)
    batch["label"][0, :2, :5] = 200
    np.savez(bundle / "batch.npz", **batch)
    told = run_module("psp_jax.replay", "--bundle", bundle)
    assert told.returncode == 0, told.stderr
    assert f"step 15 with the images {', '.join(skipped[2]['images'])}" in told.stdout
    assert "layers, from the image on: finite" in told.stdout and "gradients: finite" in told.stdout
    assert "norms of the gradient and of the new state: state_norm\n" in told.stdout
    assert "first fault: 10 pixels that are neither a class nor void (labels)" in told.stdout


@pytest.mark.parametrize("below", ["", "w"])
def test_a_file_in_the_way_of_the_workdir_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"could not be written .*: a file is in its way"),
        lock(tmp_path / "file" / below),
    ):
        pass


def test_another_network_is_refused_even_with_override(finished_run: Run) -> None:
    before = (finished_run.workdir / "model.json").read_text()
    done = finished_run.start(finished_run.workdir, "--config.model.head_channels=24", "--resume=override")
    assert done.returncode == 1
    assert "holds another network (model.head_channels: 16 -> 24)" in done.stderr
    assert (finished_run.workdir / "model.json").read_text() == before


def test_two_runs_in_one_workdir_are_refused(finished_run: Run, tmp_path: Path) -> None:
    with lock(finished_run.workdir):
        done = finished_run.start(finished_run.workdir, f"--config.data.prepared_dir={tmp_path / 'not yet'}")
    assert done.returncode == 1
    assert "Another process is working in" in done.stderr
    assert f"evaluating; process {os.getpid()} on {socket.gethostname()} since 20" in done.stderr
    assert not (tmp_path / "not yet").exists(), "before any data are prepared"


def test_who_trains_or_evaluates_holds_the_workdir(tmp_path: Path) -> None:
    """Also where another has come while data were prepared."""
    held, config = functools.partial(pytest.raises, ValueError, match="Another process is working in"), defaults()
    with lock(tmp_path):
        with held(), train._watched(config, tmp_path, WallTime()):
            pass
        with held(), contextlib.ExitStack() as stack:
            evaluate._looked_after(stack, config, tmp_path)


def test_best_checkpoint_by_command(finished_run: Run, tmp_path: Path) -> None:
    """Of steps 8 and 12 only 12 was validated, so it is the best; an unvalidated run has none."""
    assert psp_jax.load(finished_run.workdir, "best").step == 12
    shutil.copytree(finished_run.workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "12")
    flags = ("--workdir", tmp_path / "w", "--output", tmp_path / "out", "--checkpoint", "best")
    done = run_module("psp_jax.export", *flags)
    assert done.returncode == 1
    assert "holds no best checkpoint" in done.stderr
    assert not (tmp_path / "out").exists()


def test_rows_split_over_devices(finished_run: Run, tmp_path: Path) -> None:
    flags = ("--config.mesh.spatial=2", "--config.train.steps=2")
    done = finished_run.start(tmp_path / "w", *flags, devices=4)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "w" / "metrics.jsonl").read_text())["step"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.train.stpes=3"],
            "Unknown configuration field train.stpes; known fields: train.aux_weight, train.batch_size",
        ),
        (["--config.nothing.at.all=3"], "Unknown configuration field nothing.at.all"),
        (["--config.train.steps=many"], "train.steps=many"),
        (["--config.model.head=pyramid"], "model.head='pyramid' is unknown; choose one of: psp, fcn"),
        (["--config.data.dir=/nowhere"], "/nowhere"),
        (["--config.train.crop_size=(470,)"], "near 470 that is 465 or 473"),
        (["--config.train.crop_size=(25,)"], "too few for model.bins=(1, 2, 3, 6); choose at least 41"),
        (["--config.train.batch_size=6", "--config.mesh.data=4", "devices=4"], "train.batch_size=6 does not divide"),
        (["--config.mesh.data=3"], "mesh.data=3 x mesh.spatial=1 does not use the 1 devices"),
        (["--config.data.train_split=training"], "training"),
        (["--mode=evaluate"], "holds no model.json"),
        (["stray"], "Unexpected argument stray"),
        (["--config=configs/nope.py"], "There is no configuration file configs/nope.py"),
        (["--config=configs/ade20k.py:resnet99"], "has no variant 'resnet99'; choose one of: resnet50, resnet101"),
        (["--config.model.output_stride=0"], "model.output_stride=0 is unknown; choose one of: 8, 16, 32"),
        (["--config.optimizer.momentum=3.0"], "optimizer.momentum=3.0"),
        (["--config.train.ema_decay=1.0"], "train.ema_decay=1.0 must be below 1"),
        (["--config.loss.class_weighting=enet"], "'enet' is unknown; choose one of: none, inverse_log_frequency"),
        (["--config.log.images=-1"], "log.images=-1 must be at least 0"),
        (["--num_processes=2"], "belong together"),
        (["--config.augment.flip_probability=2.0"], "give a probability between 0 and 1"),
        (
            ["--config.train.steps=0", "--config.train.epochs=0.01"],
            "makes no step: an epoch of 21 images holds 5 whole batches",
        ),
    ],
)
def test_refusals_are_one_sentence(flags: list[str], message: str, finished_run: Run, tmp_path: Path) -> None:
    devices = [int(flag.removeprefix("devices=")) for flag in flags if flag.startswith("devices=")]
    given = [flag for flag in flags if not flag.startswith("devices=")]
    done = finished_run.start(tmp_path / "w", *given, devices=devices[0] if devices else 1)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "w").exists()


def test_workdir_of_something_else_is_refused(finished_run: Run, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    done = finished_run.start(tmp_path)
    assert done.returncode == 1
    assert "is not empty and holds no run" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]
