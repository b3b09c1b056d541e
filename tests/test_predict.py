"""A finished run used: exported, loaded, labelling images, scored."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import Run, run_module
from PIL import Image

import psp_jax
from psp_jax import classes
from psp_jax.predict import find_images
from psp_jax.score import score


def test_export_predict_and_api_agree(finished_run: Run, tmp_path: Path) -> None:
    done = run_module("psp_jax.export", "--workdir", finished_run.workdir, "--output", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    model, exported = psp_jax.load(finished_run.workdir), psp_jax.load(tmp_path / "exported")
    jax.tree.map(np.testing.assert_array_equal, model.variables, exported.variables)
    assert exported.class_names == ("red", "green", "blue")
    assert exported.palette.shape == (3, 3)
    assert exported.step == 12

    folder = tmp_path / "images" / "deep"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for name, h, w in [("a", 50, 70), ("b", 31, 9)]}
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    flags = ("--workdir", tmp_path / "exported", "--output", tmp_path / "out")
    done = run_module("psp_jax.predict", *flags, folder.parent)
    assert done.returncode == 1
    assert "broken.jpg" in done.stderr
    assert done.stderr.count("\n") == 1
    for name, image in images.items():
        labels = np.asarray(Image.open(tmp_path / "out" / "deep" / f"{name}.png"))
        np.testing.assert_array_equal(labels, model.predict(image))
        assert (tmp_path / "out" / "deep" / f"{name}_overlay.png").exists()


def test_logits_are_what_predict_decides_by(finished_run: Run) -> None:
    model = psp_jax.load(finished_run.workdir)
    image = np.random.default_rng(1).integers(0, 256, (41, 41, 3)).astype(np.uint8)  # the canvas itself: no resize
    logits = np.asarray(model.logits(model.normalize(image)[None]))
    assert logits.shape == (1, 41, 41, 3)
    top = np.sort(logits[0], axis=-1)
    clear = top[..., -1] - top[..., -2] > 1e-4
    np.testing.assert_array_equal(model.predict(image)[clear], logits[0].argmax(-1)[clear])
    with pytest.raises(ValueError, match=r"takes images \[N, H, W, 3\]"):
        model.logits(image)
    with pytest.raises(ValueError, match="takes a u8 image"):
        model.predict(image.astype(np.float32))


def test_scoring_predictions_repeats_the_validation(finished_run: Run, tmp_path: Path) -> None:
    record = json.loads((finished_run.workdir / "config.json").read_text())
    folder = Path(record["config"]["data"]["dir"])
    flags = ("--workdir", finished_run.workdir, "--output", tmp_path)
    done = run_module("psp_jax.predict", *flags, folder / "images" / "val")
    assert done.returncode == 0, done.stderr
    assert "labelled 10 of 10 images" in done.stdout
    scores = score(tmp_path, folder / "annotations" / "val", classes.get(folder / "classes.json"))
    validated = json.loads((finished_run.workdir / "eval" / "metrics.json").read_text())
    assert (scores["images"], scores["pixels"]) == (validated["images"], validated["pixels"])
    # One image at a time or in batches: rounding may tip a pixel that stands between two classes.
    assert scores["mean_iou"] == pytest.approx(validated["mean_iou"], abs=1e-3)


def test_images_are_found_once_and_outputs_do_not_collide(tmp_path: Path) -> None:
    for name in ("a.jpg", "deep/b.PNG", ".hidden.png", "notes.txt", "out/a.png", "odd.png/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path], tmp_path / "out")
    assert {str(stem) for stem in found} == {"a", "deep/b", "odd.png/c"}
    (tmp_path / "a_overlay.jpg").touch()
    with pytest.raises(ValueError, match=r"would both write a_overlay\.png"):
        find_images([tmp_path], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        find_images([tmp_path / "nothing"], tmp_path / "out")
