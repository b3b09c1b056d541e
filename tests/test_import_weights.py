"""The command that makes a model of another framework's file, and training that starts from one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, run_module
from foreign import MMSEG, Tensors, random_tensors, settings_of
from PIL import Image

import psp_jax
from psp_jax.import_weights import import_weights
from psp_jax.weights.tables import from_variables

SMALL = {"depth": 10, "width": 8, "head_channels": 16, "aux_channels": 8}


def save(path: Path, tensors: Tensors) -> Path:
    np.savez(path, **tensors)
    return path


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A small network of semseg with 11 classes, as a file."""
    tensors = random_tensors("semseg", settings_of(**SMALL), 11)
    return save(tmp_path_factory.mktemp("weights") / "pspnet.npz", tensors), tensors


def test_an_imported_network_labels_images(camvid: tuple[Path, Tensors], tmp_path: Path) -> None:
    file, tensors = camvid
    output = tmp_path / "imported" / "semseg"
    done = run_module("psp_jax.import_weights", "--source", "semseg", "--input", file, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PSP head on ResNet-10, classes of camvid; stem 64-64-128, output_stride 8" in done.stdout
    assert sorted(path.name for path in output.iterdir()) == ["export.json", "model.json", "parameters"]
    model = psp_jax.load(output)
    assert model.card.classes.name == "camvid"
    assert model.card.size == (473, 473)
    for name, value in from_variables("semseg", model.variables, model.card.model).items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    done = run_module("psp_jax.predict", "--workdir", output, tmp_path / "photo.png", "--output", tmp_path / "labels")
    assert done.returncode == 0, done.stdout + done.stderr
    labels = np.asarray(Image.open(tmp_path / "labels" / "photo.png"))
    np.testing.assert_array_equal(labels, model.card.classes.to_raw(model.predict(picture)))


def test_an_imported_network_is_evaluated(finished_run: Run, tmp_path: Path) -> None:
    """As it is, with the data set and the classes of the run."""
    data = json.loads((finished_run.workdir / "config.json").read_text())["config"]["data"]["dir"]
    file = save(tmp_path / "mmseg.npz", random_tensors("mmseg", settings_of(**SMALL | MMSEG), 3))
    import_weights("mmseg", file, tmp_path / "w", f"{data}/classes.json")
    flags = ("--mode=evaluate", "--config.eval.protocol=mmseg", "--config.eval.base_size=(64,48)")
    done = finished_run.start(tmp_path / "w", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "w" / "eval" / "metrics.json").read_text())["images"] == 10


def test_what_no_tensor_tells_can_be_said(tmp_path: Path) -> None:
    file = save(tmp_path / "pspnet_769x769.npz", random_tensors("mmseg", settings_of(**SMALL | MMSEG), 19))
    import_weights("mmseg", file, tmp_path / "even")
    assert psp_jax.load(tmp_path / "even").card.size == (512, 1024)
    flags = ("--source=mmseg", f"--input={file}", f"--output={tmp_path / 'd32'}")
    done = run_module("psp_jax.import_weights", *flags, "--align_corners=True", "--output_stride=32")
    assert done.returncode == 0, done.stdout + done.stderr
    card = psp_jax.load(tmp_path / "d32").card
    assert (card.model["align_corners"], card.model["output_stride"], card.size) == (True, 32, (713, 713))


def refused(output: Path, file: Path, source: str, classes: str | None = None) -> str:
    """Return the sentence, having seen that nothing was left behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises((ValueError, FileExistsError)) as caught:
        import_weights(source, file, output, classes)
    assert sorted(output.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_leave_nothing_behind(camvid: tuple[Path, Tensors], tmp_path: Path, monkeypatch: Any) -> None:
    file, tensors = camvid
    output = tmp_path / "imported"
    assert "no network of mmseg: it lacks conv1.weight; choose" in refused(output, file, "mmseg")
    assert "11 classes apart, the class table voc2012 has 21" in refused(output, file, "semseg", "voc2012")
    lacking = save(tmp_path / "lacking.npz", {name: tensors[name] for name in tensors if name != "cls.1.bias"})
    assert "it lacks cls.1.bias; choose" in refused(output, lacking, "semseg")
    seven = save(tmp_path / "seven.npz", random_tensors("semseg", settings_of(**SMALL), 7))
    assert "7 classes apart, which is no known data set (ade20k 150, voc2012 21" in refused(output, seven, "semseg")
    backbone = save(
        tmp_path / "r18.npz", random_tensors("torchvision", settings_of(depth=18, stem="7x7"), 1, "backbone")
    )
    assert "--config.init.source=torchvision --config.init.path=" in refused(output, backbone, "torchvision")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    assert "is not empty" in refused(taken, file, "semseg")

    def full_disk(*_: object) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr("psp_jax.import_weights.write_json", full_disk)
    assert refused(output, file, "semseg") == "the disk is full"


def test_errors_of_the_command_are_one_line(tmp_path: Path) -> None:
    done = run_module(
        "psp_jax.import_weights", "--source=caffe", "--input=none.caffemodel", f"--output={tmp_path / 'o'}"
    )
    assert done.returncode == 1
    assert done.stderr == "error: There is no file none.caffemodel; give an existing one, or an https address.\n"
