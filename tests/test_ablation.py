"""Ablations: what the tables say of finished runs, and the command that makes the runs."""

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run_module, write_stripes

from psp_jax import classes
from psp_jax.ablate import ablate, list_runs, read_plan
from psp_jax.ablation import Plan, write_ablation
from psp_jax.config import defaults
from psp_jax.dotplot import dot_plot
from psp_jax.visualize import RIGHT_INK
from psp_jax.workdir import ModelCard

TABLE = classes.ClassTable("three", ("red", "green", "blue"), classes.default_palette(3), (0, 1, 2), (255,))
PLAN = Plan(
    "mine.py",
    {"Networks": {"fcn": "FCN", "psp": "PSPNet"}, "Missing": {"later": "not run yet"}},
    {"context": ("green", "blue")},
    {"Networks": {"psp": 41.5}},
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
    (workdir / "config.json").write_text(json.dumps({"config": {}, "resolved": resolved}))
    (workdir / "eval").mkdir()
    scores = {"step": step, "mean_iou": float(np.mean(iou)), "pixel_accuracy": 0.5}
    scores["per_class_iou"] = dict(zip(TABLE.names, iou, strict=True))
    (workdir / "eval" / "metrics.json").write_text(json.dumps(scores))
    workdir.with_suffix(".seconds").write_text("60.0\n30.0\n")


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
    # The pyramid's levels have no weights at a width of 64 / 4, but the fused map is twice as deep.
    assert psp["parameters"] > fcn["parameters"]
    assert [table["title"] for table in summary["tables"]] == ["Networks"]


def test_the_tables_tell_the_same(workdir: Path) -> None:
    write_ablation(workdir, PLAN)
    text = (workdir / "ablation.md").read_text()
    assert "3 runs of 8 steps with 4 images on three (`mine.py`), 4 minutes of runs" in text
    assert "| FCN | 2 | 45.0 ± 7.1 | +0.0 | n/a | 50.0 ± 0.0 | 25.0 ± 7.1 | 85.0 ± 7.1 |" in text
    assert "| PSPNet | 1 | 80.0 | +35.0 | 41.5 | 50.0 | 75.0 | 90.0 |" in text
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
        write_ablation(workdir, Plan(PLAN.file, PLAN.tables, {"context": ("grey",)}, {}))


CONFIG = """
from psp_jax.config import defaults

CHANGES = {"fcn": {"model.head": "fcn"}, "wild": {"model.head": "fcn", "optimizer.base_lr": 1e30}}
TABLES = {"Networks": {"fcn": "FCN", "wild": "too fast"}}


def get_config(variant="fcn"):
    config = defaults()
    config.data.update(name="image_folder", dir="FOLDER", prepared_dir="FOLDER-records", eval_split="val")
    config.update_from_flattened_dict(CHANGES[variant])
    return config
"""


def test_bad_input_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no configuration file .*mine\.py; the repository's is"):
        read_plan(tmp_path / "mine.py")
    plain = tmp_path / "plain.py"
    plain.write_text("def get_config(): pass")
    with pytest.raises(ValueError, match=r"has no get_config and TABLES; configs/ablation\.py shows"):
        read_plan(plain)
    file = tmp_path / "mine.py"
    file.write_text(CONFIG)
    with pytest.raises(ValueError, match=r"no variant 'pspnet' in its tables; choose from: fcn, wild"):
        ablate(file, tmp_path / "w", variants=["pspnet"])
    with pytest.raises(ValueError, match=r"config\.train\.stpes"):
        list_runs(file, ["fcn"], [0], tmp_path / "w", ["--config.train.stpes=3"])
    done = run_module("psp_jax.ablate", "--config", file, "--workdir", tmp_path / "w", "--steps=3")
    assert done.returncode == 1 and "error: Unexpected argument --steps=3; what is for every run looks" in done.stderr
    assert not (tmp_path / "w").exists()


def test_runs_are_made_once_and_failures_are_told(tmp_path: Path) -> None:
    """Two variants side by side, one of which diverges; then again, when nothing but that one is left to do."""
    file, w = tmp_path / "mine.py", tmp_path / "w"
    file.write_text(CONFIG.replace("FOLDER", str(write_stripes(tmp_path / "stripes", {"train": 8, "val": 4}))))
    flags = ("--config", file, "--workdir", w, "--seeds=1", "--jobs=2", *TINY, "--config.train.steps=2")
    done = run_module("psp_jax.ablate", *flags, "--config.log.images=0", "--config.eval.gallery=0")
    assert done.returncode == 1
    assert f"error: 1 of 2 runs failed: {w}/wild/seed0.log ends with 'error: Step" in done.stderr, done.stderr
    summary = json.loads((w / "ablation.json").read_text())
    assert {name: found["seeds"] for name, found in summary["variants"].items()} == {"fcn": [0]}
    score = json.loads((w / "fcn" / "seed0" / "eval" / "metrics.json").read_text())["mean_iou"]
    assert summary["variants"]["fcn"]["scores"]["mean_iou"]["each"] == [score]
    config = json.loads((w / "fcn" / "seed0" / "config.json").read_text())["config"]
    assert (config["model"]["head"], config["seed"], config["train"]["steps"]) == ("fcn", 0, 2)
    noted = (w / "fcn" / "seed0.seconds").read_text()
    done = run_module("psp_jax.ablate", *flags, "--variants=fcn")
    assert done.returncode == 0, done.stderr
    assert (w / "fcn" / "seed0.seconds").read_text() == noted
    done = run_module("psp_jax.ablate", *flags, "--config.train.steps=3")
    assert done.returncode == 1
    assert "/fcn/seed0 holds a run with another configuration (train.steps: 2 -> 3); choose a new" in done.stderr
