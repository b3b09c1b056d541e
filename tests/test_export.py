"""Every format of psp_jax.export against the live model, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import Run, environment, run_module

import psp_jax
from psp_jax import api, classes
from psp_jax import export as export_module
from psp_jax.checkpoint import save_variables
from psp_jax.config import defaults
from psp_jax.deploy import stablehlo
from psp_jax.deploy.fold import fold_batch_norm
from psp_jax.export import export
from psp_jax.models import build_model, variable_shapes
from psp_jax.workdir import ModelCard, write_json

SMALL = {"depth": 10, "width": 8, "stem": "32-32-64", "head_channels": 16, "aux_channels": 8}


def write_random_model(directory: Path, size: tuple[int, int], **settings: Any) -> api.Model:
    """Write an export, of the format orbax, of a network with random weights and batch-norm statistics; load it."""
    card = ModelCard(
        model=defaults().model.to_dict() | settings,
        classes=classes.get("camvid"),
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        size=size,
        window=size,
        base_size=512,
    )
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        if kind in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if kind == "kernel" else 0.1
        return (spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = variable_shapes(card.model, card.classes.num_classes)
    save_variables(directory / api.PARAMETERS, jax.tree_util.tree_map_with_path(fill, shapes))
    write_json(directory / "export.json", {"step": 3})
    card.write(directory)
    return psp_jax.load(directory)


def random_images(count: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, *size, 3)).astype(np.float32)


def live_scores(model: api.Model, images: np.ndarray) -> np.ndarray:
    return np.asarray(model.logits(model.normalize(images)))


def assert_close(scores: np.ndarray, expected: np.ndarray) -> None:
    assert scores.shape == expected.shape
    assert np.abs(scores - expected).max() < 1e-4 * np.abs(expected).max()


def run_documented(doc: str, exported: Path, images: np.ndarray, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Run the loader that a docstring shows on `images`, in a process that cannot import this package or flax."""
    lines = doc.replace("DIR", str(exported)).strip().splitlines()[2:]
    assert 0 < len(lines) <= 10
    np.save(folder / "images.npy", images)
    place = next(i for i, line in enumerate(lines) if line.startswith("image = "))
    lines.insert(place + 1, "assert image.shape[1:] == np.load('images.npy').shape[1:]; image = np.load('images.npy')")
    code = ["import sys", "sys.modules |= {'psp_jax': None, 'flax': None}", *lines]
    code.append("np.savez('outputs.npz', logits=logits, labels=labels)")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "outputs.npz") as outputs:
        return outputs["logits"], outputs["labels"]


def test_orbax_loads_without_the_api(finished_run: Run, tmp_path: Path) -> None:
    done = run_module("psp_jax.export", "--workdir", finished_run.workdir, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "difference to the live model on a random image: 0.0e+00" in done.stdout
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    variables = ocp.StandardCheckpointer().restore(tmp_path / "out" / "parameters")
    network = build_model(card["model"], len(card["classes"]["names"]))
    model, images = psp_jax.load(finished_run.workdir), random_images(1, (41, 41))
    images = model.normalize(images)
    ours, expected = (network.apply(v, images, train=False)["logits"] for v in (variables, model.variables))
    np.testing.assert_array_equal(ours, expected)


def test_stablehlo_runs_without_this_package(finished_run: Run, tmp_path: Path) -> None:
    flags = ("--workdir", finished_run.workdir, "--format", "stablehlo", "--output", tmp_path / "out")
    done = run_module("psp_jax.export", *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["largest_relative_difference"] < 1e-5
    assert f"{record['largest_relative_difference']:.1e}" in done.stdout

    model, images = psp_jax.load(finished_run.workdir), random_images(3, (41, 41))
    logits, labels = run_documented(stablehlo.__doc__ or "", tmp_path / "out", images, tmp_path)
    assert_close(logits, live_scores(model, images))
    np.testing.assert_array_equal(labels, logits.argmax(-1))
    assert labels.dtype == np.uint8
    lowered = jax.export.deserialize(bytearray((tmp_path / "out" / stablehlo.FILE).read_bytes()))
    assert lowered.platforms == ("cpu", "cuda", "tpu")
    signature = json.loads((tmp_path / "out" / "signature.json").read_text())
    assert signature["classes"] == model.card.classes.as_dict()
    assert signature["outputs"][0]["shape"] == ["batch", 41, 41, 3]


def test_programs_of_another_size_with_batch_norm_folded(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "in", (41, 41), **SMALL)
    export(tmp_path / "in", tmp_path / "out", form="stablehlo", size=(49, 57), fold_bn=True)
    images = random_images(2, (49, 57))
    assert_close(stablehlo.run_stablehlo(tmp_path / "out", images), live_scores(model, images))
    assert json.loads((tmp_path / "out" / "export.json").read_text())["fold_bn"] is True


def test_folded_batch_norm_is_the_same_network(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "in", (41, 41), **SMALL)
    folded = fold_batch_norm(model.variables)
    assert jax.tree.structure(folded) == jax.tree.structure(model.variables)
    for path, value in jax.tree_util.tree_leaves_with_path(folded):
        neutral = {"scale": 1, "mean": 0, "var": np.float32(1) - np.float32(1e-5)}
        assert np.all(value == neutral.get(path[-1].key, value))
        assert value.dtype == np.float32
    images = random_images(2, (41, 41))
    expected = live_scores(model, images)
    difference = live_scores(api.Model(model.card, folded, 0), images) - expected
    assert 0 < np.abs(difference).max() < 1e-5 * np.abs(expected).max()


def test_bfloat16_is_exported_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_random_model(tmp_path / "in", (41, 41), **SMALL, dtype="bfloat16")
    assert (export(tmp_path / "in", tmp_path / "out", form="stablehlo") or 0) < 1e-5
    assert "computed in float32 (trained in bfloat16)" in capsys.readouterr().out
    images = random_images(1, (41, 41))
    scores, rounded = stablehlo.run_stablehlo(tmp_path / "out", images), live_scores(model, images)
    assert 1e-4 < np.abs(scores - rounded).max() / np.abs(rounded).max() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "semseg"}, "semseg builds no network with model.depth=10, only 50, 101, 152; export onnx instead"),
        ({"form": "stablehlo", "size": (40, 48)}, "--size=(40, 48) does not fit model.output_stride=8"),
        ({"size": (41, 41)}, "--size is for --format=stablehlo and onnx; leave it out for --format=orbax"),
        ({"form": "semseg", "fold_bn": True}, "--fold_bn is for --format=stablehlo and onnx"),
        ({"form": "coreml"}, "--format=coreml is unknown; choose one of: orbax, stablehlo, onnx, semseg, mmseg"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, finished_run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        export(finished_run.workdir, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_refusal_is_one_sentence(finished_run: Run, tmp_path: Path) -> None:
    flags = ("--workdir", finished_run.workdir, "--output", tmp_path / "out", "--format", "mmseg")
    done = run_module("psp_jax.export", *flags)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: mmseg builds no network with model.depth=10, only 18, 34, 50, 101, 152; export onnx instead."
    )
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_in_it_is_left_alone(finished_run: Run, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="is not empty; choose another --output"):
        export(finished_run.workdir, tmp_path, form="stablehlo")
    with pytest.raises(FileExistsError, match=r"holiday\.jpg is a file, and the export needs a folder; choose another"):
        export(finished_run.workdir, tmp_path / "holiday.jpg", form="stablehlo")
    with pytest.raises(OSError, match=r"holiday\.jpg/deep could not be written .*: a file is in its way"):
        export(finished_run.workdir, tmp_path / "holiday.jpg" / "deep", form="stablehlo")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize(
    ("form", "package", "extra"), [("onnx", "onnxruntime", "onnx"), ("mmseg", "safetensors", "weights")]
)
def test_a_missing_package_is_named(form: str, package: str, extra: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'psp-jax\[{extra}\]'"):
        export(tmp_path, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", [False, True], ids=["new", "empty"])
def test_other_scores_than_the_live_models_are_refused(made: bool, tmp_path: Path, monkeypatch: Any) -> None:
    write_random_model(tmp_path / "in", (41, 41), **SMALL)
    if made:
        (tmp_path / "out").mkdir()
    almost = lambda variables: jax.tree.map(lambda x: x * np.float32(1.001), variables)  # noqa: E731
    monkeypatch.setattr(export_module, "fold_batch_norm", almost)
    with pytest.raises(ValueError, match=r"differs from the live one by .* of the largest score, more than 1e-04"):
        export(tmp_path / "in", tmp_path / "out", form="stablehlo", fold_bn=True)
    assert list((tmp_path / "out").iterdir()) == [] if made else not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["orbax", "stablehlo"])
def test_a_killed_export_does_not_look_complete(form: str, tmp_path: Path) -> None:
    write_random_model(tmp_path / "in", (41, 41), **SMALL)
    output = tmp_path / "out"
    code = (
        "import os, pathlib, psp_jax.export as e\n"
        "e.versions = lambda: os._exit(9)\n"
        f"e.export(pathlib.Path({str(tmp_path / 'in')!r}), pathlib.Path({str(output)!r}), form={form!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 9
    assert any(output.iterdir())
    assert not {"model.json", "signature.json", "export.json"} & {path.name for path in output.iterdir()}
    with pytest.raises(FileNotFoundError, match=r"holds no model\.json"):
        psp_jax.load(output)


def test_a_damaged_export_is_refused(tmp_path: Path) -> None:
    """A bit that flips in the parameters would be another model, without an error of Orbax."""
    model = write_random_model(tmp_path, (41, 41), **SMALL)
    jax.tree.map(np.testing.assert_array_equal, psp_jax.load(tmp_path).variables, model.variables)
    arrays = max((tmp_path / "parameters").rglob("*"), key=lambda path: path.stat().st_size)
    sound = arrays.read_bytes()
    for damaged in (sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:], sound[:-1], None):
        arrays.unlink() if damaged is None else arrays.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^{tmp_path}/parameters is damaged, or .*; export it again") as told:
            psp_jax.load(tmp_path)
        assert "\n" not in str(told.value)
    arrays.write_bytes(sound)
    card = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(card.replace('"head_channels": 16', '"head_channels": 24'))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/parameters is damaged, or holds another network"):
        psp_jax.load(tmp_path)
    (tmp_path / "model.json").write_text(card)
    for record in ("[]", "{}"):
        (tmp_path / "export.json").write_text(record)
        with pytest.raises(ValueError, match=r"export\.json tells no step, it is damaged or missing; export"):
            psp_jax.load(tmp_path)
