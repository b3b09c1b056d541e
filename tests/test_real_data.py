"""Real photographs through the real commands: CamVid, and three images of ADE20K in the official archive's layout."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, run_module
from PIL import Image

SHARED = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="the photographs are not beside this clone")


def losses(workdir: Path) -> np.ndarray:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


@pytest.mark.slow
def test_sixty_steps_on_camvid_lower_the_loss(tmp_path: Path) -> None:
    done = run_module(
        "psp_jax.main",
        "--config=configs/camvid.py:small",
        f"--config.data.dir={SHARED / 'camvid'}",
        f"--config.data.prepared_dir={tmp_path}",
        "--workdir",
        tmp_path / "w",
        "--config.train.steps=60",
        "--config.train.crop_size=(121,161)",
        "--config.train.log_every_steps=1",
        "--config.log.tensorboard=False",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    loss = losses(tmp_path / "w")
    assert len(loss) == 60
    running = (np.cumsum(loss) / np.arange(1, 61))[9::10]  # mean of all steps so far, every tenth
    assert (np.diff(running) < 0).all(), running
    assert loss[-10:].mean() < 0.85 * loss[:10].mean()
    results = json.loads((tmp_path / "w" / "eval" / "metrics.json").read_text())
    assert results["images"] == 101
    assert results["pixel_accuracy"] > 0.35


def test_ade20k_archive_to_evaluated_run(tmp_path: Path) -> None:
    archive = SHARED / "ADEChallengeData2016_mini.zip"
    done = run_module("psp_jax.prepare", "--dataset", "ade20k", "--data_dir", tmp_path, "--archive", archive)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not the full ADE20K" in done.stdout
    flags = (
        "--config=configs/ade20k.py",
        f"--config.data.dir={tmp_path}",
        "--config.model.dtype=float32",
        "--config.init.source=random",
        "--config.data.num_workers=1",
        *TINY,
    )
    done = run_module("psp_jax.main", *flags, "--workdir", tmp_path / "w")
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "w" / "eval" / "metrics.json").unlink()
    done = run_module("psp_jax.main", *flags, "--workdir", tmp_path / "w", "--mode=evaluate")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "w" / "eval" / "metrics.json").read_text())
    assert results["images"] == 3
    assert len(results["per_class_iou"]) == 150
    # Every annotated pixel of the three images at its original size, and none of the void ones.
    with zipfile.ZipFile(archive) as members:
        names = [n for n in members.namelist() if "annotations/validation/" in n and n.endswith(".png")]
        pixels = sum(int((np.asarray(Image.open(members.open(name))) > 0).sum()) for name in names)
    assert results["pixels"] == pixels
