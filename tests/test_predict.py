"""A finished run used: exported, loaded, labelling images of every kind, scored."""

import json
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from conftest import Run, run_module
from PIL import Image

import psp_jax
from psp_jax import classes, predict
from psp_jax.predict import find_images
from psp_jax.score import score
from psp_jax.workdir import write_png


def write_odd_images(folder: Path) -> dict[str, np.ndarray]:
    """Write one picture in every kind of file, sizes that are extreme, and two files that are no images.

    Returns the pixels that a viewer shows, by name.
    """
    colours = np.array([[[220, 40, 40], [50, 60, 220], [40, 200, 60], [250, 250, 250], [5, 5, 5]]], np.uint8)
    plain = cv2.resize(colours, (70, 50), interpolation=cv2.INTER_LINEAR)
    picture = Image.fromarray(plain)
    grey = np.asarray(picture.convert("L"))
    shown = {name: plain for name in ("plain", "deep/alpha", "deep/sixteen", "deep/turned", "deep/cmyk")}
    shown |= {
        "grey": np.stack([grey] * 3, axis=-1),
        "pixel": plain[:1, :1],
        "strip": np.tile(plain[20:27], (1, 58, 1))[:, :4000],
    }
    (folder / "deep").mkdir(parents=True)
    for name in ("plain", "pixel", "strip"):
        Image.fromarray(shown[name]).save(folder / f"{name}.png")
    Image.fromarray(grey).save(folder / "grey.png")
    picture.convert("RGBA").save(folder / "deep" / "alpha.png")
    cv2.imwrite(str(folder / "deep" / "sixteen.png"), plain[..., ::-1].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    options = {"quality": 98, "subsampling": 0}
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "deep" / "turned.jpg", exif=exif, **options)
    picture.convert("CMYK").save(folder / "deep" / "cmyk.jpg", **options)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    (folder / "empty.png").touch()
    return shown


def test_export_predict_and_api_agree(finished_run: Run, tmp_path: Path) -> None:
    done = run_module("psp_jax.export", "--workdir", finished_run.workdir, "--output", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    model, exported = psp_jax.load(finished_run.workdir), psp_jax.load(tmp_path / "exported")
    jax.tree.map(np.testing.assert_array_equal, model.variables, exported.variables)
    assert exported.class_names == ("red", "green", "blue")
    assert exported.palette.shape == (3, 3)
    assert exported.step == 12

    shown = write_odd_images(tmp_path / "images")
    out = tmp_path / "out"
    flags = ("--workdir", tmp_path / "exported", "--output", out, "--confidence", "--shares", "--batch=3")
    done = run_module("psp_jax.predict", *flags, tmp_path / "images")
    assert done.returncode == 1
    assert done.stdout.endswith(f"labelled 8 of 10 images into {out}, 1 of 10 images by tiles\n")
    said = done.stderr.splitlines()
    assert said[2] == "error: 2 of 10 images were skipped, for the reasons above." and len(said) == 3
    assert "broken.jpg" in said[0] and "empty.png" in said[1]
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    endings = (".png", "_color.png", "_overlay.png", "_confidence.png", ".json")
    assert written == {name + ending for name in shown for ending in endings}

    whole, tiles = model.labeler("whole"), model.labeler("tiles")
    for name, image in shown.items():
        [(labels, confidence)] = (tiles if name == "strip" else whole)([image])
        index, certainty = (np.asarray(Image.open(out / (name + ending))) for ending in (".png", "_confidence.png"))
        lossy = name.endswith(("turned", "cmyk"))  # saved as JPEG: near an edge the classes may change
        assert (index != labels).mean() <= (0.02 if lossy else 0)
        np.testing.assert_allclose(certainty.astype(int), confidence.astype(int), atol=10 if lossy else 1)
        assert np.ptp(confidence) > 30 or name in ("grey", "pixel")  # another picture would have another map
    with pytest.raises(ValueError, match="choose one of: whole, semseg, tiles"):
        model.labeler("parts")


def test_files_of_an_image_say_what_its_labels_are(tmp_path: Path) -> None:
    record = {"names": ["road", "tree", "sky", "sea"], "raw_ids": [7, 11, 13, 17], "ignore": [0, 255]}
    table = classes.ClassTable.from_dict(record, "four")
    labels = np.random.default_rng(0).choice(3, (60, 90), p=(0.3, 0.1, 0.6)).astype(np.uint8)
    image, certainty = np.zeros((60, 90, 3), np.uint8), 10 * labels
    predict._write(tmp_path / "deep" / "a", image, labels, certainty, table, True, True)
    predict._write(tmp_path / "b", image, labels, certainty, table, False, False)
    assert {path.name for path in tmp_path.glob("b*")} == {"b.png", "b_color.png", "b_overlay.png"}
    with Image.open(tmp_path / "deep" / "a.png") as index, Image.open(tmp_path / "deep" / "a_color.png") as color:
        assert (index.mode, color.mode) == ("L", "P")
        np.testing.assert_array_equal(np.asarray(index), np.array([7, 11, 13])[labels])
        np.testing.assert_array_equal(np.asarray(color), labels)
        np.testing.assert_array_equal(np.asarray(color.convert("RGB")), table.palette[labels])
        assert color.getpalette()[3 * 255 :] == [0, 0, 0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "deep" / "a_confidence.png")), certainty)
    shares = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert (shares["height"], shares["width"]) == (60, 90)
    assert shares["classes"] == [
        {"name": table.names[k], "value": table.raw_ids[k], "share": float(np.mean(labels == k))} for k in (2, 0, 1)
    ]


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
    with pytest.raises(ValueError, match="takes u8 images"):
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

    def stems(*inputs: str) -> set[str]:
        return {str(stem) for stem in find_images([tmp_path / given for given in inputs], tmp_path / "out")}

    assert stems("") == {"a", "deep/b", "odd.png/c"}
    assert stems("a.jpg", "*.jpg") == {"a"}
    assert stems("**/*.jpg") == {"a", "odd.png/c"}
    assert stems("**", "") == stems("")
    assert stems("d*") == {"deep/b"}
    assert stems("deep/[ab].*", "notes.txt") == {"b", "notes"}
    for ending in ("color", "overlay", "confidence"):
        (tmp_path / f"a_{ending}.jpg").touch()
        with pytest.raises(ValueError, match=rf"would both write a_{ending}\.png"):
            stems("")
        (tmp_path / f"a_{ending}.jpg").unlink()
    for missing in ("nothing", "n*.jpg"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            stems(missing)
    with pytest.raises(FileNotFoundError, match="No image"):
        stems("n*")


def test_reading_ahead_is_bounded_and_tells_every_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = {Path(str(k)): tmp_path / f"{k}.png" for k in range(20)}
    for path in images.values():
        path.touch()
    decoded: list[str] = []

    def decode(data: bytes, where: str, upright: bool) -> np.ndarray:
        decoded.append(where)
        if where.endswith("/1.png"):
            raise ValueError("1 is damaged")
        if where.endswith("/19.png"):
            raise RuntimeError("a mistake of ours")
        return np.zeros((10, 10, 3), np.uint8)

    monkeypatch.setattr(predict, "decode_image", decode)
    for large, most in ((1000, 5), (99, 2)):  # at most three wait, one is in use and one in hand; or none waits
        monkeypatch.setattr(predict, "LARGE", large)
        decoded.clear()
        ahead = predict._read_ahead(images, 3)
        assert next(ahead)[0] == Path("0")
        time.sleep(0.2)
        assert len(decoded) <= most
        assert str(next(ahead)[1]) == "1 is damaged"
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            list(ahead)


def test_images_of_one_protocol_go_together_and_large_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "LARGE", 500)
    sides = (10, 40, 10, 10, 10, 23, 10)
    examples = [(Path(str(k)), np.zeros((side, side, 3), np.uint8)) for k, side in enumerate(sides)]
    groups = predict._groups(iter(examples), lambda image: "tiles" if len(image) == 40 else "whole", 3)
    found = [(name, [stem.name for stem, _ in group]) for name, group in groups]
    assert found == [("tiles", ["1"]), ("whole", ["0", "2", "3"]), ("whole", ["4", "5"]), ("whole", ["6"])]


def test_overlays_of_large_images_are_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "OVERLAY_SIDE", 800)
    table = classes.ClassTable.from_dict({"names": ["road", "tree"]}, "two")
    picture = predict._overlay(np.zeros((2000, 4000, 3), np.uint8), np.zeros((2000, 4000), np.uint8), table)
    assert 800 < picture.shape[1] < 1500
    assert predict._overlay(np.zeros((3, 9000, 3), np.uint8), np.zeros((3, 9000), np.uint8), table).shape[1] > 800


def test_a_picture_is_there_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(image: Image.Image, path: Path, **options: str) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    write_png(tmp_path / "a.png", Image.new("L", (4, 4)))
    monkeypatch.setattr(Image.Image, "save", fail)
    for stem in ("a", "b"):
        with pytest.raises(OSError, match="disk full"):
            write_png(tmp_path / f"{stem}.png", Image.new("L", (2, 2)))
    assert Image.open(tmp_path / "a.png").size == (4, 4)
    assert not (tmp_path / "b.png").exists()
