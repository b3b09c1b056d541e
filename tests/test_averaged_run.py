"""Runs with averaged parameters, statistics over batches, class weights and added losses."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import Run, write_stripes
from ml_collections import ConfigDict
from PIL import Image

import psp_jax
from psp_jax import checks, class_weights
from psp_jax.checkpoint import load_variables
from psp_jax.config import defaults
from psp_jax.data.frequencies import count_pixels, inverse_log_frequency
from psp_jax.data.prepared import ensure_prepared
from psp_jax.data.source import Source, open_source
from psp_jax.evaluate import evaluate
from psp_jax.losses import PixelLoss
from psp_jax.train import train
from psp_jax.train_step import TrainState


class Averaged(NamedTuple):
    """Three steps, saved after each and validated after the second and the last."""

    folder: Path
    config: ConfigDict
    sources: list[Source]
    workdir: Path
    state: TrainState


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Averaged:
    base = tmp_path_factory.mktemp("averaged")
    folder = write_stripes(base / "stripes", {"train": 9, "val": 4})
    config = defaults()
    config.data.update(name="image_folder", dir=str(folder), prepared_dir=str(base), eval_split="val", num_workers=0)
    config.model.update(depth=10, width=4, stem="7x7", head="fcn", head_channels=4, aux_channels=4)
    config.train.update(steps=3, crop_size=(41,), batch_size=8, log_every_steps=1, ema_decay=0.5)
    config.eval.update(every_steps=2, batch_size=8, precise_bn_batches=2, gallery=0, protocol="whole")
    config.loss.update(dice=0.5, lovasz=0.5, class_weighting="inverse_log_frequency")
    config.checkpoint.every_steps = 1
    config.log.update(tensorboard=False, images=0)
    checks.check_values(config)
    where = {"prepared_dir": str(base), "classes": None}
    ensure_prepared("image_folder", str(folder), archive=None, **where)
    sources = [open_source("image_folder", str(folder), split, **where) for split in ("train", "val")]
    return Averaged(folder, config, sources, base / "w", train(config, base / "w", *sources))


def metrics(workdir: Path) -> Any:
    return json.loads((workdir / "eval" / "metrics.json").read_text())


@pytest.mark.slow
def test_a_resumed_run_ends_as_if_never_stopped(
    averaged: Averaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its class weights too: no label is counted again."""
    monkeypatch.setattr(class_weights, "count_pixels", lambda *_: pytest.fail("labels are read again"))
    workdir = tmp_path / "w"
    shutil.copytree(averaged.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / "3")
    resumed = train(averaged.config, workdir, *averaged.sources)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((resumed, averaged.state)))


def test_averaged_parameters_are_loaded_and_trained_ones_saved_beside(averaged: Averaged) -> None:
    ours, state = psp_jax.load(averaged.workdir).variables, jax.device_get(averaged.state)
    jax.tree.map(np.testing.assert_array_equal, ours, {"params": state.averaged, "batch_stats": state.batch_stats})
    beside = load_variables(averaged.workdir / "checkpoints" / "3" / "trained", ours["params"])
    jax.tree.map(np.testing.assert_array_equal, beside, state.params)
    kernel = ours["params"]["head"]["classifier"]["conv"]["kernel"]
    assert np.abs(kernel - state.params["head"]["classifier"]["conv"]["kernel"]).max() > 1e-4


def test_class_weights_are_those_of_the_labelled_pixels(averaged: Averaged) -> None:
    record = json.loads((averaged.workdir / "config.json").read_text())
    files = sorted((averaged.folder / "annotations" / "train").glob("*.png"))
    labels = np.concatenate([np.asarray(Image.open(file)).ravel() for file in files])
    shares = np.array([(labels == index).sum() / (labels != 255).sum() for index in range(3)])
    np.testing.assert_allclose(record["resolved"]["class_weights"], 1 / np.log(1.02 + shares), rtol=1e-12)


def test_class_weights_are_made_where_there_are_none_to_keep(averaged: Averaged) -> None:
    """The weights that config.json holds are those of other data, and of no use to a run without a step left."""
    config = averaged.config.to_dict()
    loss, former = PixelLoss(**config["loss"]), class_weights.recorded(averaged.workdir, config, 9)
    config["data"]["train_split"] = "val"
    val = inverse_log_frequency(count_pixels(averaged.sources[1], lambda n: None))
    for start, steps, expected in ((0, 3, val), (2, 3, val), (3, 3, ())):
        found = class_weights.complete(loss, config, averaged.sources[1], averaged.workdir, start, steps)
        assert found.class_weights == expected != former
        assert found.class_weighting == "none"


def test_parts_of_the_loss_are_logged(averaged: Averaged) -> None:
    for line in map(json.loads, (averaged.workdir / "metrics.jsonl").read_text().splitlines()):
        assert line["main_loss"] > (line["dice_loss"] + line["lovasz_loss"]) / 2 > 0
        assert line["loss"] == pytest.approx(line["main_loss"] + 0.4 * line["aux_loss"], rel=1e-4)


def test_evaluation_takes_the_statistics_anew(averaged: Averaged, tmp_path: Path) -> None:
    """With the run's own number of batches the scores are those of its last validation, with another they are not.

    The crops are the network's own, whatever those of the command's configuration; 0 batches leave what was saved.
    """
    workdir = tmp_path / "w"
    shutil.copytree(averaged.workdir, workdir)
    before = metrics(workdir)
    config = ConfigDict(averaged.config.to_dict())  # a ConfigDict of a ConfigDict shares its sections
    config.train.crop_size = (65,)
    for number in (2, 1, 0):
        config.eval.precise_bn_batches = number
        evaluate(config, workdir, averaged.sources[1], averaged.sources[0])
        found = {name: value for name, value in metrics(workdir).items() if name.startswith("precise_bn")}
        sizes = {"precise_bn_batch_size": 8, "precise_bn_crop_size": [41, 41]}
        assert found == ({"precise_bn_batches": number} | sizes if number else {})
        assert (metrics(workdir)["per_class_iou"] == before["per_class_iou"]) == (number != 1)


def test_statistics_of_no_images_are_refused(averaged: Averaged) -> None:
    with pytest.raises(ValueError, match=r"eval\.precise_bn_batches=2 takes batches of training images; give .* 0\."):
        evaluate(averaged.config, averaged.workdir, averaged.sources[1])


@pytest.mark.slow
def test_the_command_evaluates_with_statistics_of_the_training_split(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.workdir, tmp_path / "w")
    flags = ("--mode=evaluate", "--config.eval.protocol=whole", "--config.eval.precise_bn_batches=2")
    done = finished_run.start(tmp_path / "w", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "batch-norm statistics: 2/2" in done.stdout
    assert metrics(tmp_path / "w")["per_class_iou"] != metrics(finished_run.workdir)["per_class_iou"]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_averaging_may_change_but_neither_begin_nor_end_on_the_way(
    decay: float, averaged: Averaged, tmp_path: Path
) -> None:
    shutil.copytree(averaged.workdir, tmp_path / "w")
    config = ConfigDict(averaged.config.to_dict())  # a ConfigDict of a ConfigDict shares its sections
    config.train.ema_decay = decay
    remedy = "give --resume=override" if decay else "choose a new --workdir"
    with pytest.raises(ValueError, match=rf"train\.ema_decay: 0\.5 -> {decay}.*{remedy}"):
        train(config, tmp_path / "w", *averaged.sources)
    if decay:
        assert int(train(config, tmp_path / "w", *averaged.sources, override=True).step) == 3
        return
    with pytest.raises(ValueError, match=r"a run with averaged parameters, which can neither begin nor end on the way"):
        train(config, tmp_path / "w", *averaged.sources, override=True)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["config"]["train"]["ema_decay"] == 0.5
