"""Ablations: what the tables say of finished runs, and the command that makes the runs."""

import csv
import dataclasses
import json
import re
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run_module, write_stripes

from psp_jax import classes
from psp_jax.ablate import Processes, Run, ablate, list_runs, main, read_plan
from psp_jax.ablation import Plan, write_ablation
from psp_jax.config import defaults
from psp_jax.dotplot import dot_plot
from psp_jax.visualize import RIGHT_INK
from psp_jax.workdir import ModelCard, lock

TABLE = classes.ClassTable("three", ("red", "green", "blue"), classes.default_palette(3), (0, 1, 2), (255,))
PLAN = Plan(
    "mine.py",
    {"Networks": {"fcn": "FCN", "psp": "PSPNet"}, "Missing": {"later": "not run yet"}},
    {"context": ("green", "blue")},
    {"Networks": {"psp": 41.5}},
    "another data set",
)
IOU = {  # of the three classes, for each seed
    "fcn": {0: (0.9, 0.2, 0.4), 2: (0.8, 0.1, 0.3)},
    "psp": {0: (0.9, 0.8, 0.7)},
}


def write_run(workdir: Path, head: str, iou: tuple[float, ...], step: int = 8) -> None:
    """Write what a finished run of eight steps leaves."""
    model = defaults().model.to_dict() | {"depth": 10, "width": 8, "head": head}
    ModelCard(model, TABLE, (0.0,) * 3, (1.0,) * 3, (41, 41), (41, 41), 41).write(workdir)
    resolved = {"steps": 8, "batch_size": 4, "devices": 1, "device_kind": "cpu"}
    record = {"config": {"seed": int(workdir.name[4:])}, "resolved": resolved, "versions": {"jax": "0.10"}}
    (workdir / "config.json").write_text(json.dumps(record))
    (workdir / "eval").mkdir()
    scores = {
        "step": step,
        "split": "val",
        "images": 4,
        "protocol": {"name": "whole"},
        "mean_iou": float(np.mean(iou)),
        "pixel_accuracy": 0.5,
    }
    scores["per_class_iou"] = dict(zip(TABLE.names, iou, strict=True))
    (workdir / "eval" / "metrics.json").write_text(json.dumps(scores))
    starts = ({"seconds": 60.0, "cores": 2, "cpu": "Z80"}, {"seconds": 30.0, "cores": 2, "cpu": "Z80"})
    workdir.with_suffix(".starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))


def write_runs(workdir: Path) -> Path:
    """Write the runs of `IOU`, and one that was interrupted."""
    for variant, seeds in IOU.items():
        for seed, iou in seeds.items():
            write_run(workdir / variant / f"seed{seed}", variant, iou)
    write_run(workdir / "psp" / "seed1", "psp", (0.0, 0.0, 0.0), step=4)
    return workdir


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return write_runs(tmp_path)


def test_means_and_spreads_are_those_of_the_finished_runs(workdir: Path) -> None:
    summary = write_ablation(workdir, PLAN)
    assert summary == json.loads((workdir / "ablation.json").read_text())
    fcn, psp = summary["variants"]["fcn"], summary["variants"]["psp"]
    assert (fcn["seeds"], psp["seeds"], fcn["minutes"]) == ([0, 2], [0], [1.5, 1.5])
    assert fcn["scores"]["mean_iou"]["each"] == pytest.approx([0.5, 0.4])
    assert fcn["scores"]["mean_iou"]["mean"] == pytest.approx(0.45)
    assert fcn["scores"]["mean_iou"]["deviation"] == pytest.approx(statistics.stdev([0.5, 0.4]))
    assert fcn["scores"]["context"]["each"] == pytest.approx([0.3, 0.2])
    assert fcn["scores"]["other classes"]["mean"] == pytest.approx(0.85)
    assert psp["scores"]["mean_iou"]["deviation"] is None
    # Four levels of 64 -> 16 channels with batch norm, and 64 more channels into the 3x3 convolution to 512.
    assert psp["parameters"] - fcn["parameters"] == 4 * (64 * 16 + 2 * 16) + 64 * 9 * 512
    assert [table["title"] for table in summary["tables"]] == ["Networks"]


def test_the_tables_tell_the_same(workdir: Path) -> None:
    write_ablation(workdir, PLAN)
    text = (workdir / "ablation.md").read_text()
    assert (
        "3 runs of 8 steps with 4 images on three (`mine.py`), 4 minutes of runs on 2 cores of Z80, 1 x cpu; jax 0.10."
        in text
    )
    assert "\n\nPublished: another data set.\n" in text
    assert "| FCN | 2 | 45.0 ± 7.1 | +0.0 | n/a | 50.0 ± 0.0 | 25.0 ± 7.1 | 85.0 ± 7.1 |" in text
    assert "| PSPNet | 1 | 80.0 | +35.0 | 41.50 | 50.0 | 75.0 | 90.0 |" in text
    assert "| green | context | 15.0 ± 7.1 | 80.0 |" in text and "| red | other classes | 85.0 ± 7.1 | 90.0 |" in text
    rows = list(csv.DictReader((workdir / "ablation.csv").open()))
    assert [(row["variant"], row["seed"]) for row in rows] == [("fcn", "0"), ("fcn", "2"), ("psp", "0")]
    assert float(rows[1]["iou green"]) == 0.1 and float(rows[1]["mean_iou"]) == pytest.approx(0.4)
    assert (workdir / "ablation.html").stat().st_size > 10_000


def test_the_plot_has_its_marks_at_the_values() -> None:
    picture = dot_plot("t", ["a"], [("first", [[20.0, 40.0]]), ("second", [[80.0]]), ("none", [[]])])
    marks = (picture == RIGHT_INK).all(-1)
    rows = np.flatnonzero(marks.any(1))
    (gap,) = np.flatnonzero(np.diff(rows) > 1)  # two marks, one below the other
    first, second = (np.flatnonzero(marks[part].any(0)).mean() for part in (rows[: gap + 1], rows[gap + 1 :]))
    # Axis 20 .. 80 of 330 pixels drawn twice as fine: 30 and 80 lie 50 / 60 of it apart.
    assert second - first == pytest.approx(2 * 330 * 50 / 60, abs=2)


def test_nothing_is_written_where_nothing_is_finished(tmp_path: Path) -> None:
    assert write_ablation(tmp_path, PLAN) is None
    assert not list(tmp_path.iterdir())


def test_a_group_of_unknown_classes_is_refused(workdir: Path) -> None:
    with pytest.raises(ValueError, match="The group context names the class 'grey', which the data set has not"):
        write_ablation(workdir, dataclasses.replace(PLAN, groups={"context": ("grey",)}))


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("eval/metrics.json", '"whole"', '"semseg"', "was not evaluated as .*/fcn/seed0 .*semseg.* evaluate it again"),
        ("eval/metrics.json", '"images": 4', '"images": 3', "was not evaluated as .*images: 3 in place of 4"),
        ("config.json", '"config": {', '"config": {"train": {"steps": 9}, ', "was not trained as .*steps: 0 -> 9"),
        ("model.json", '"blue"', '"grey"', "was not evaluated as .*other classes"),
    ],
)
def test_runs_that_differ_do_not_stand_in_one_table(workdir: Path, file: str, old: str, new: str, problem: str) -> None:
    path = workdir / "fcn" / "seed2" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"/fcn/seed2 {problem}"):
        write_ablation(workdir, PLAN)


def test_copies_of_runs_do_not_count(workdir: Path) -> None:
    for name in ("seed0-old", "seed0_1"):
        shutil.copytree(workdir / "psp" / "seed0", workdir / "psp" / name)
    assert write_ablation(workdir, PLAN)["variants"]["psp"]["seeds"] == [0]


CONFIG = """
from psp_jax.config import defaults

WILD = {"model.head": "fcn", "optimizer.base_lr": 1e30, "train.max_skipped": 2}
CHANGES = {"fcn": {"model.head": "fcn"}, "wild": WILD}
TABLES = {"Networks": {"fcn": "FCN", "wild": "too fast"}}


def get_config(variant="fcn"):
    config = defaults()
    config.data.update(name="image_folder", dir="FOLDER", prepared_dir="FOLDER-records", eval_split="val")
    config.train.steps = 2
    config.update_from_flattened_dict(CHANGES[variant])
    return config
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return path


def test_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no configuration file .*no\.py; the repository's is"):
        read_plan(tmp_path / "no.py")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("def get_config", "def other", "must have get_config and TABLES"),
        ("TABLES = {", "OTHER = {", "must have get_config and TABLES"),
        ('{"fcn": "FCN", "wild": "too fast"}', '["fcn"]', "must have get_config and TABLES"),
        ("CHANGES = {", "CHANGES = ", "cannot be run: SyntaxError"),
        (
            "CHANGES",
            "PUBLISHED = {'Networks': {'pps': 1.0}}\nCHANGES",
            "PUBLISHED names 'pps' of 'Networks'",
        ),
        (
            "CHANGES",
            "PUBLISHED = {'Network': {'fcn': 1.0}}\nCHANGES",
            "PUBLISHED names 'fcn' of 'Network'",
        ),
    ],
)
def test_a_file_that_holds_something_else_is_told(file: Path, old: str, new: str, problem: str) -> None:
    file.write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"mine\.py:? {problem}"):
        read_plan(file)


def test_configurations_are_checked_before_anything_runs(file: Path, tmp_path: Path) -> None:
    for override, problem in (
        ("--config.train.stpes=3", r"^Unknown configuration field train\.stpes; known fields: train\.aux"),
        ("--config.model.head=foo", r"model\.head='foo' is unknown; choose one of"),
        ("--config.train.crop_size=(50,)", r"train\.crop_size=.* does not fit"),
    ):
        with pytest.raises(ValueError, match=problem):
            list_runs(file, ["fcn"], [0], tmp_path / "w", [override])
    with pytest.raises(ValueError, match=r"mine\.py:none: KeyError: 'none'"):
        list_runs(file, ["none"], [0], tmp_path / "w", [])
    with pytest.raises(ValueError, match=r"no variant 'pspnet' in its tables; choose from: fcn, wild"):
        ablate(file, tmp_path / "w", variants=["pspnet"])
    with lock(tmp_path / "held"), pytest.raises(ValueError, match=r"Another process is working in .*held"):
        ablate(file, tmp_path / "held")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--steps=3", "Unexpected argument --steps=3; what is for every run looks like"),
        ("--config.seed=7", "--config.seed is set by --seeds; leave it out."),
        ("--seed=1", "Unexpected argument --seed=1"),
        ("--jobs=0", "--seeds=3 and --jobs=0 must be at least 1."),
    ],
)
def test_flags_are_checked(monkeypatch: pytest.MonkeyPatch, file: Path, flag: str, problem: str) -> None:
    monkeypatch.setattr("sys.argv", ["ablate", f"--config={file}", "--workdir=w", flag])
    with pytest.raises(ValueError, match=re.escape(problem)):
        main()


def test_a_run_with_a_checkpoint_must_be_of_the_same_configuration(file: Path, tmp_path: Path) -> None:
    def run(*overrides: str) -> Run:
        return list_runs(file, ["fcn"], [0], tmp_path, overrides)[0]

    directory = run().directory
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"config": json.loads(run().config.to_json())}))
    assert not run("--config.train.steps=3").finished()  # it ended before its first checkpoint: nothing to protect
    (directory / "checkpoints" / "1").mkdir(parents=True)
    assert not run("--config.log.images=0").finished()
    for override, problem in (
        ("train.steps=3", "train.steps: 2 -> 3"),
        ("data.eval_split=x", "data.eval_split: 'val'"),
    ):
        with pytest.raises(ValueError, match=f"/fcn/seed0 holds a run with another configuration .{problem}"):
            run(f"--config.{override}").finished()


@pytest.mark.parametrize(("jobs", "seconds"), [(1, 0.5), (5, 0.0), (5, 0.5)])
def test_an_interruption_ends_every_run(
    monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path, jobs: int, seconds: float
) -> None:
    """More jobs than cores too, and at the moment when they begin."""
    monkeypatch.setattr(
        Processes, "run", lambda self, command, log, cores, run=Processes.run: run(self, ["sleep", "60"], log, cores)
    )
    begin = time.monotonic()
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(seconds, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
            ablate(file, tmp_path / "w", variants=["fcn"], seeds=6, jobs=jobs)
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, former)
    assert time.monotonic() - begin < 30
    starts = [json.loads(path.read_text()) for path in tmp_path.glob("w/fcn/*.starts.jsonl")]
    assert all(start["exit_code"] == -signal.SIGTERM for start in starts) and len(starts) <= jobs


@pytest.mark.slow
def test_runs_are_made_once_and_failures_are_told(file: Path, tmp_path: Path) -> None:
    """Two variants side by side, one of which diverges; then again, when nothing but that one is left to do."""
    w = tmp_path / "w"
    file.write_text(CONFIG.replace("FOLDER", str(write_stripes(tmp_path / "stripes", {"train": 8, "val": 4}))))
    flags = ("--config", file, "--workdir", w, "--seeds=1", "--jobs=2", *TINY, "--config.train.steps=2")
    done = run_module("psp_jax.ablate", *flags, "--config.log.images=0", "--config.eval.gallery=0")
    assert done.returncode == 1
    assert f"error: 1 of 2 runs failed: {w}/wild/seed0.log ends with 'error: Step" in done.stderr, done.stderr
    assert "(exit code 1); mend it and start again" in done.stderr
    summary = json.loads((w / "ablation.json").read_text())
    assert {name: found["seeds"] for name, found in summary["variants"].items()} == {"fcn": [0]}
    score = json.loads((w / "fcn" / "seed0" / "eval" / "metrics.json").read_text())["mean_iou"]
    assert summary["variants"]["fcn"]["scores"]["mean_iou"]["each"] == [score]
    config = json.loads((w / "fcn" / "seed0" / "config.json").read_text())["config"]
    assert (config["model"]["head"], config["seed"], config["train"]["steps"]) == ("fcn", 0, 2)
    noted = (w / "fcn" / "seed0.starts.jsonl").read_text()
    done = run_module("psp_jax.ablate", *flags, "--variants=fcn")
    assert done.returncode == 0, done.stderr
    assert (w / "fcn" / "seed0.starts.jsonl").read_text() == noted
