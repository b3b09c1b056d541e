"""Every configuration file and variant passes the checks that a run begins with."""

import importlib.util

import pytest
from conftest import ROOT

from psp_jax.checks import check_values
from psp_jax.config import check_fields, defaults
from psp_jax.models import check_model

FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def module(name: str):
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
        check_fields(config)
        check_values(config)
        check_model(config.model)


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
