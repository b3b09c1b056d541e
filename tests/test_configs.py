"""Every configuration file and variant passes the checks that a run begins with."""

import contextlib
import importlib.util
import math
from typing import Any

import pytest
from conftest import ROOT

from psp_jax.checks import check_mesh, check_values, crop_size, eval_window, total_steps
from psp_jax.config import defaults
from psp_jax.data.builders import BUILDERS
from psp_jax.protocols import choose
from psp_jax.train import check_run

FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
RECIPES = ("ade20k.py", "ade20k_encnet.py", "cityscapes.py", "mmseg.py", "pcontext_encnet.py", "voc2012.py")


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), ROOT / "configs" / name)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_variant_is_a_run(name: str) -> None:
    file = module(name)
    for variant in ((), *((variant,) for variant in getattr(file, "VARIANTS", ()))):
        config = file.get_config(*variant)
        check_run(config)
        assert config.data.name in BUILDERS
        for scales in ("single",) if config.eval.protocol == "whole" else ("single", "multi"):
            numbers = config.eval.base_size, eval_window(config), config.eval.stride
            choose(config.eval.protocol, scales, *numbers, crop_size(config))


@pytest.mark.parametrize("name", RECIPES)
def test_every_variant_of_a_recipe_states_what_was_published(name: str) -> None:
    file = module(name)
    assert list(file.EXPECTED) == list(file.VARIANTS)
    for expected in file.EXPECTED.values():
        assert list(expected) == ["mean_iou_single", "mean_iou_multi", "source"]
        numbers = [number for number in (expected["mean_iou_single"], expected["mean_iou_multi"]) if number is not None]
        assert bool(numbers) != expected["source"].startswith("none ")
        assert numbers == sorted(numbers)  # several scales were never worse
        assert all(30 < number < 90 for number in numbers)  # in percent


@pytest.mark.parametrize(
    ("name", "variant", "images", "steps"),
    [
        ("ade20k.py", "resnet50", 20210, 126_300),
        ("ade20k_encnet.py", "resnet101", 20210, 227_340),
        ("voc2012.py", "resnet50", 10582, 33_050),
        ("cityscapes.py", "resnet101", 2975, 37_200),
        ("pcontext_encnet.py", "resnet50", 4998, 24_960),
        ("mmseg.py", "encnet_r101_ade20k_160k", 20210, 160_000),
    ],
)
def test_steps_of_the_recipes(name: str, variant: str, images: int, steps: int) -> None:
    assert total_steps(module(name).get_config(variant), images) == steps


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("pspnet_r50_ade20k_80k", ("psp", 50, False, 16, 0.01, 5e-4, (2048, 512), (), (41.13, 41.94))),
        ("fcn_r101_voc2012_40k", ("fcn", 101, False, 16, 0.01, 5e-4, (2048, 512), (), (69.91, 72.38))),
        ("deeplabv3_r101_cityscapes769_80k", ("aspp", 101, True, 8, 0.01, 5e-4, (2049, 1025), (769,), (79.67, 80.81))),
        ("encnet_r50_cityscapes_40k", ("enc", 50, False, 8, 0.01, 5e-4, (2048, 1024), (), (75.67, 77.08))),
        ("pspnet_r101_pcontext_40k", ("psp", 101, False, 16, 0.004, 1e-4, (520, 520), (480,), (52.02, 53.54))),
    ],
)
def test_recipes_of_mmsegmentation(variant: str, expected: tuple[Any, ...]) -> None:
    file = module("mmseg.py")
    config, published = file.get_config(variant), file.EXPECTED[variant]
    model, optimizer = config.model, config.optimizer
    assert expected == (
        *(model.head, model.depth, model.align_corners, config.train.batch_size),
        *(optimizer.base_lr, optimizer.weight_decay, config.augment.base_size, config.eval.window),
        (published["mean_iou_single"], published["mean_iou_multi"]),
    )
    assert config.eval.base_size == config.augment.base_size
    assert (optimizer.end_lr, optimizer.head_lr_multiplier) == (1e-4, 1.0)
    assert (model.fcn_convs, model.fcn_concat) == ((2, True) if model.head == "fcn" else (1, False))
    assert config.train.se_weight == (0.2 if model.head == "enc" else 0.0)


def test_heads_of_the_ade20k_variants() -> None:
    config = module("ade20k.py").get_config
    heads = {variant: config(variant).model.head for variant in ("resnet50", "fcn", "deeplabv3")}
    assert heads == {"resnet50": "psp", "fcn": "fcn", "deeplabv3": "aspp"}


def test_presence_loss_needs_a_head_that_tells_the_classes_present() -> None:
    config = defaults()
    config.train.update(steps=1, se_weight=0.2)
    with pytest.raises(ValueError, match=r"train\.se_weight=0\.2 needs a head .* set model\.head=enc"):
        check_values(config)
    config.model.head = "enc"
    check_values(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.ema_decay", math.nan, r"train\.ema_decay=nan must be at least 0, and finite"),
        ("optimizer.base_lr", math.inf, r"optimizer\.base_lr=inf must be at least 0, and finite"),
        ("optimizer.head_lr_multiplier", -1.0, r"optimizer\.head_lr_multiplier=-1\.0 must be at least 0"),
        ("optimizer.end_lr", 0.1, r"optimizer\.end_lr=0\.1 must not be above optimizer\.base_lr=0\.01"),
    ],
)
def test_values_that_make_no_run_are_refused(field: str, value: float, message: str) -> None:
    config = defaults()
    config.train.steps = 1
    check_values(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        check_values(config)


def test_an_evaluation_takes_any_rows() -> None:
    config = defaults()
    config.train.crop_size = (41,)
    config.eval.precise_bn_batches = 2
    check_mesh(config, (41, 41), False, 4, 4, 1)
    with pytest.raises(ValueError, match=r"train\.batch_size=16 does not divide over 5 devices"):
        check_mesh(config, (41, 41), False, 5, 1, 1)
    config.eval.precise_bn_batches = 0
    check_mesh(config, (41, 41), False, 5, 1, 1)


@pytest.mark.parametrize(
    ("rows", "data", "spatial", "processes", "message"),
    [
        (41, 4, 2, 1, None),
        (41, 4, 6, 1, r"mesh\.spatial=6 leaves fewer than 2 of the 6 rows .*crops of 41 rows.*; choose at most 5\."),
        (473, 16, 8, 32, None),  # an image over two processes of four devices
        (473, 8, 3, 6, r"mesh\.spatial=3 neither divides the 4 devices of a process nor is a multiple"),
    ],
)
def test_images_spread_over_devices(rows: int, data: int, spatial: int, processes: int, message: str | None) -> None:
    config = defaults()
    if message is None:
        check_mesh(config, (rows, rows), True, data, spatial, processes)
    else:
        with pytest.raises(ValueError, match=message):
            check_mesh(config, (rows, rows), True, data, spatial, processes)


@pytest.mark.parametrize(
    ("crop", "spatial", "align_corners", "message"),
    [
        ((473, 697), 2, True, None),  # 60 x 88 maps
        ((473, 473), 5, True, None),
        ((473, 713), 1, True, r"4 divides; crops of 473 x 713 make them 60 x 90, .* k \* 32 - 7 pixels"),
        ((473, 473), 7, True, r"make them 63 x 60, 60 rows of them real"),
        ((472, 480), 1, False, r"make them 59 x 60, 59 rows of them real\. Choose crops of k \* 32 pixels"),
    ],
)
def test_phases_need_maps_that_divide(
    crop: tuple[int, int], spatial: int, align_corners: bool, message: str | None
) -> None:
    config = defaults()
    config.model.update(phases=True, align_corners=align_corners)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        check_mesh(config, crop, True, 1, spatial, 1)
    config.model.phases = False
    check_mesh(config, crop, True, 1, spatial, 1)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("scales", "three", r"eval\.scales='three' is unknown; choose one of: single, multi"),
        ("protocol", "foo", r"eval\.protocol='foo' is unknown"),
        ("base_size", (1, 2), r"eval\.base_size=\(1, 2\) does not fit eval\.protocol=semseg"),
    ],
)
def test_training_refuses_what_evaluation_would(field: str, value: object, problem: str) -> None:
    config = defaults()
    config.train.steps = 1
    check_run(config)
    config.eval[field] = value
    with pytest.raises(ValueError, match=problem):
        check_run(config)
