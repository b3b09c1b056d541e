"""Convolutions by rows are the convolutions, and the network made of them is the network."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from psp_jax import build, parallel
from psp_jax.config import defaults
from psp_jax.models import build_model
from psp_jax.models.lowering import Lowering, product
from psp_jax.models.phases import divides, from_phases, to_phases
from psp_jax.models.row_convolution import convolve_rows


@pytest.mark.parametrize(
    ("height", "width", "size", "stride", "dilation"),
    [(13, 9, 3, 1, 1), (13, 10, 3, 2, 1), (12, 9, 3, 1, 2), (15, 15, 3, 1, 4), (8, 7, 1, 2, 1), (21, 22, 7, 2, 1)],
)
def test_values_and_gradients(height: int, width: int, size: int, stride: int, dilation: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 5, 6)), jnp.float32)
    padding = dilation * (size - 1) // 2
    dims = ("NHWC", "HWIO", "NHWC")

    def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
        pads, dilations = [(padding, padding)] * 2, (dilation, dilation)
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, rhs_dilation=dilations, dimension_numbers=dims
        )

    expected, pull = jax.vjp(native, x, kernel)
    ours, our_pull = jax.vjp(lambda x, kernel: convolve_rows(x, kernel, stride, dilation, padding), x, kernel)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    weights = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for mine, theirs in zip(our_pull(weights), pull(weights), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_phases_of_a_map() -> None:
    x = jnp.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    phases = to_phases(x, 2)
    assert phases.shape == (8, 3, 2, 3)
    np.testing.assert_array_equal(phases[4 + 2 * 1 + 0], x[1, 1::2, 0::2])  # the second image's phase (1, 0)
    np.testing.assert_array_equal(from_phases(phases, 2), x)
    assert divides(x, None, 2)
    assert not divides(x, None, 4)
    assert not divides(x, (5, 4), 2)
    assert not divides(x, jnp.array([[4, 4], [6, 4]]), 2)


@pytest.mark.parametrize(
    ("depth", "first_block", "side"),
    [(10, "full", 57), (10, "contracted", 57), (10, "full", 41), pytest.param(50, "full", 57, marks=pytest.mark.slow)],
)
def test_the_same_network(depth: int, first_block: str, side: int) -> None:
    """In phases, by rows and natively, for maps of 8 x 8, which divide by 2 and 4, and of 6 x 6, by 2 alone."""
    settings = defaults().model
    settings.update(depth=depth, width=8, head_channels=8, aux_channels=8, first_block_dilation=first_block)
    plain = build_model(settings, 4)
    phased = build_model(settings.to_dict() | {"phases": True}, 4)
    variables = jax.jit(lambda: plain.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=True))()
    image = jax.random.normal(jax.random.key(side), (1, side, side, 3))

    def by_rows(call, args, kwargs, context):  # type: ignore[no-untyped-def]
        layer = context.module
        if context.method_name == "convolve":
            return convolve_rows(*args, layer.stride, layer.dilation, layer.padding)
        return call(*args, **kwargs)

    expected = jax.jit(lambda x: plain.apply(variables, x, train=False)["logits"])(image)
    ours = jax.jit(lambda x: phased.apply(variables, x, train=False)["logits"])(image)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    with nn.intercept_methods(by_rows):
        ours = jax.jit(lambda x: plain.apply(variables, x, train=False)["logits"])(image)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "features"), [(5, 7), (7, 5)])
def test_a_product_is_the_convolution_of_a_single_cell(channels: int, features: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 8, channels)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(channels, features)), jnp.float32)

    def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    expected, pull = jax.vjp(native, x, kernel)
    ours, our_pull = jax.vjp(product, x, kernel)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    weights = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for mine, theirs in zip(our_pull(weights), pull(weights), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_cpu_computes_products_and_rows_that_are_spread_do_not() -> None:
    config = defaults()
    config.train.update(batch_size=8)
    for spatial, convolutions, found in ((1, "auto", True), (2, "auto", False), (1, "native", False)):
        config.mesh.spatial, config.model.convolutions = spatial, convolutions
        mesh = parallel.make_mesh(-1, spatial)
        assert build.choose_lowering(config, mesh) == Lowering(0, products=found)


@pytest.mark.parametrize(
    ("data", "spatial", "chosen"),
    [
        (16, 1, Lowering(math.inf)),  # an image a chip
        (16, 2, Lowering(math.inf)),  # half of one
        (4, 1, Lowering(3, pairs=True)),
        (8, 2, Lowering(0, pairs=True)),  # halves of two images
    ],
)
def test_what_a_tpu_computes(data: int, spatial: int, chosen: Lowering) -> None:
    config: Any = defaults()
    config.train.batch_size = 16
    chips: Any = SimpleNamespace(
        shape={"data": data, "spatial": spatial}, devices=np.array([SimpleNamespace(platform="tpu")])
    )
    assert build.choose_lowering(config, chips) == chosen
    config.model.convolutions = "native"
    assert build.choose_lowering(config, chips) == Lowering(0)
