"""The command that makes a model of another framework's file, and training that starts from one."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import Run, run_module
from foreign import MMSEG, Tensors, caffe_network, random_tensors, settings_of
from PIL import Image
from test_export import write_random_model
from weight_files import Made, state_dict, write_caffemodel, write_legacy, write_zip

import psp_jax
from psp_jax.checks import check_size
from psp_jax.export import export
from psp_jax.import_weights import image_sizes, import_weights
from psp_jax.weights import tables
from psp_jax.weights.formats import write_tensors
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
    assert (card.model["align_corners"], card.model["output_stride"], card.size) == (True, 32, (769, 769))


@pytest.mark.parametrize(
    ("source", "table", "choices", "size", "base_size"),
    [
        ("semseg", "ade20k", {}, (473, 473), 512),
        ("semseg", "cityscapes", {}, (713, 713), 2048),
        ("semseg", "cityscapes", {"output_stride": 16}, (721, 721), 2048),
        ("semseg", "cityscapes", {"output_stride": 32}, (705, 705), 2048),
        ("caffe", "cityscapes", {}, (713, 713), 2048),
        ("mmseg", "ade20k", {}, (512, 512), 512),
        ("mmseg", "cityscapes", {}, (512, 1024), 2048),
        ("mmseg", "cityscapes", {"align_corners": True}, (769, 769), 2048),
        ("mmseg", "cityscapes", {"align_corners": True, "output_stride": 16}, (769, 769), 2048),
        ("mmseg", "voc2012", {"align_corners": True}, (513, 513), 512),
        ("encoding", "ade20k", {}, (481, 481), 520),
    ],
)
def test_sizes_are_those_of_the_source(
    source: str, table: str, choices: dict[str, Any], size: tuple[int, int], base_size: int
) -> None:
    """As near as the network's grid allows: every size here is one that a run may have too."""
    settings = settings_of(align_corners=source != "mmseg") | choices
    assert image_sizes(source, table, settings) == (size, base_size)
    check_size(size, "size", settings)


def test_a_network_without_a_possible_size_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    file = save(tmp_path / "psp.npz", random_tensors("semseg", settings_of(**SMALL), 11))
    monkeypatch.setattr("psp_jax.import_weights.image_sizes", lambda *_: ((472, 473), 512))
    assert "does not fit model.output_stride=8" in refused(tmp_path / "imported", file, "semseg")


def test_the_output_may_be_the_current_folder(
    camvid: tuple[Path, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported.partial").mkdir()
    (tmp_path / "imported.partial" / "holiday.jpg").write_bytes(b"precious")
    monkeypatch.chdir(tmp_path / "imported")
    import_weights("semseg", camvid[0], Path())
    assert psp_jax.load(tmp_path / "imported").card.classes.name == "camvid"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported", "imported.partial"]
    assert (tmp_path / "imported.partial" / "holiday.jpg").read_bytes() == b"precious"
    (tmp_path / "plain").mkdir()  # others may read what the system lets them read by default
    assert (tmp_path / "imported").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_in_a_file_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Caffe's auxiliary scores, which are left out, may have any name."""
    tensors = random_tensors("caffe", settings_of(width=8, head_channels=16, aux_head=False), 11)
    name = "\x1b]0;title\x07\x1b[2J\nerror: none\n\u202e/0"
    write_tensors(tmp_path / "a.npz", tensors | {name: np.zeros((11, 8, 1, 1), np.float32)})
    told = import_weights("caffe", tmp_path / "a.npz", tmp_path / "imported")
    assert len(told.splitlines()) == 2
    assert all(line.isascii() and line.isprintable() for line in told.splitlines())
    assert r"\x1b]0;title\x07" in told


def test_a_caffe_file_makes_the_network_of_semseg(tmp_path: Path) -> None:
    """The PSPNet-50 in Caffe's names, blobs and channel orders, narrow since the names are the same."""
    semseg = random_tensors("semseg", settings_of(width=8, head_channels=16, aux_head=False), 11)
    layers: dict[str, list[np.ndarray]] = {}
    for name, blob in caffe_network(semseg).items():  # each layer's in the order of their numbers
        layers.setdefault(name.rpartition("/")[0], []).append(blob)
    import_weights("caffe", write_caffemodel(tmp_path / "pspnet50.caffemodel", layers), tmp_path / "caffe")
    import_weights("semseg", save(tmp_path / "pspnet50.npz", semseg), tmp_path / "semseg")
    caffe, expected = psp_jax.load(tmp_path / "caffe"), psp_jax.load(tmp_path / "semseg")
    assert jax.tree.structure(caffe.variables) == jax.tree.structure(expected.variables)
    jax.tree.map(np.testing.assert_array_equal, caffe.variables, expected.variables)
    assert caffe.card.mean == (123.68, 116.779, 103.939)
    assert caffe.card.std == (1, 1, 1)
    assert caffe.card.model == expected.card.model | {"stride_in": "1x1"}


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
    assert f"{file} is a file, and the model needs a folder" in refused(file, file, "semseg")

    def full_disk(*_: object) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr("psp_jax.import_weights.write_json", full_disk)
    assert refused(output, file, "semseg") == "the disk is full"


def _cut(path: Path) -> Path:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _safetensors(path: Path, tensors: Tensors) -> Path:
    pytest.importorskip("safetensors")
    write_tensors(path, tensors)
    return path


def _caffe(path: Path) -> Path:
    return write_caffemodel(path, {"conv1_1_3x3_s2": [np.ones((8, 3, 3, 3), np.float32)], "conv6": [np.ones(9)]})


def _flipped(path: Path) -> Path:
    """Change one bit in the middle of a file, which is in a number."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    return path


def _content(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def _bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer0.0.weight.npy", bytes(10_000_000))
    return path


def _touch(folder: Path) -> Made:
    return Made("os.system", f"touch {folder / 'ran'}")


def _changed(path: Path, tensors: Tensors, **change: np.ndarray) -> Path:
    """Write a network with another cls.1.weight, or with it under another name."""
    kept = {name: tensor for name, tensor in tensors.items() if name != "cls.1.weight"}
    return save(path, kept | {f"cls.1.{name}": tensor for name, tensor in change.items()})


DAMAGE: dict[str, tuple[Callable[[Path, Tensors], Path], str]] = {
    "zip cut": (lambda folder, t: _cut(write_zip(folder / "a.pth", state_dict(t))), "it is damaged"),
    "zip changed": (lambda folder, t: _flipped(write_zip(folder / "a.pth", state_dict(t))), "Bad CRC-32"),
    "zip runs": (lambda folder, t: write_zip(folder / "a.pth", _touch(folder)), "os.system"),
    "legacy cut": (lambda folder, t: _cut(write_legacy(folder / "a.pth", state_dict(t))), "Cannot read"),
    "legacy runs": (lambda folder, t: write_legacy(folder / "a.pth", _touch(folder)), "os.system"),
    "safetensors cut": (lambda folder, t: _cut(_safetensors(folder / "a.safetensors", t)), "it is damaged"),
    "npz cut": (lambda folder, t: _cut(save(folder / "a.npz", t)), "it is damaged"),
    "caffemodel cut": (lambda folder, t: _cut(_caffe(folder / "a.caffemodel")), "Cannot read"),
    "zip bomb": (lambda folder, t: _bomb(folder / "a.npz"), "would unpack to"),
    "empty": (lambda folder, t: _content(folder / "a.pth", b""), "Cannot read"),
    "a page": (lambda folder, t: _content(folder / "a.pth", b"<!DOCTYPE html>\n<p>Sign in</p>\n"), "Cannot read"),
    "renamed": (lambda folder, t: _changed(folder / "a.npz", t, weigth=t["cls.1.weight"]), "it lacks cls.1.weight;"),
    "dtype": (lambda folder, t: _changed(folder / "a.npz", t, weight=np.ones(16, np.int64)), "holds int64"),
    "shape": (lambda folder, t: _changed(folder / "a.npz", t, weight=np.ones(17, np.float32)), "(17) instead of (16)"),
    "nan": (lambda folder, t: _changed(folder / "a.npz", t, weight=np.full(16, np.nan)), "not finite"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_in_a_line(kind: str, camvid: tuple[Path, Tensors], tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    file = damage(tmp_path, camvid[1])
    source = "caffe" if file.suffix == ".caffemodel" else "semseg"
    assert message in refused(tmp_path / "imported", file, source)
    assert not (tmp_path / "ran").exists()


def test_errors_of_the_command_are_one_line(tmp_path: Path) -> None:
    done = run_module(
        "psp_jax.import_weights", "--source=caffe", "--input=none.caffemodel", f"--output={tmp_path / 'o'}"
    )
    assert done.returncode == 1
    assert done.stderr == "error: There is no file none.caffemodel; give an existing one, or an https address.\n"


NARROW_18 = {"depth": 18, "width": 8, "stem": "7x7", "head": "fcn", "head_channels": 24, "basic_dilation": "first"}
WRONG = {
    "names": ("_TORCH_TENSORS", ("conv", "kernel"), ".kernel", "it lacks backbone.layer1.0.conv1.weight"),
    "channels": ("LAYOUTS", "conv", (lambda k: k.transpose(2, 3, 0, 1),) * 2, "head_channels=64 instead of 24"),
    "numbers": ("LAYOUTS", "vector", (lambda v: v[::-1], lambda v: v), "does not read back bit for bit"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_tables_that_are_wrong_both_ways_do_not_pass(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Reading back through the same table alone would not show it."""
    write_random_model(tmp_path / "in", (41, 41), **NARROW_18)
    table, key, value, message = WRONG[kind]
    monkeypatch.setitem(getattr(tables, table), key, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        export(tmp_path / "in", tmp_path / "out", form="mmseg")
    assert not (tmp_path / "out").exists()
