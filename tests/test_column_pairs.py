"""The first layers by pairs of columns are the layers, and a training step with them is the step."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import lax

from psp_jax import parallel
from psp_jax.config import defaults
from psp_jax.models import build_model
from psp_jax.models.batch_norm import BatchNorm
from psp_jax.models.column_pairs import ColumnPairs, convolve_pairs
from psp_jax.models.layers import max_pool
from psp_jax.models.lowering import NATIVE, Lowering
from psp_jax.train_step import create_state, make_train_step

Array = jax.Array


def joined(pairs: Array | ColumnPairs) -> Array:
    """Return the map that pairs are of."""
    if isinstance(pairs, Array):
        return pairs
    even, odd = pairs.apart()
    odd = jnp.pad(odd, ((0, 0), (0, 0), (0, even.shape[2] - odd.shape[2]), (0, 0)))
    stacked = jnp.stack([even, odd], axis=3)
    return stacked.reshape(*even.shape[:2], -1, even.shape[3])[:, :, : pairs.width]


def paired(x: Array, side_by_side: bool) -> ColumnPairs:
    """Return a map by pairs, with a number that means nothing where a column is missing."""
    even, odd = x[:, :, ::2], x[:, :, 1::2]
    if not side_by_side:
        return ColumnPairs((even, odd), x.shape[2])
    missing = even.shape[2] - odd.shape[2]
    odd = jnp.pad(odd, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=7.0)
    return ColumnPairs((jnp.concatenate([even, odd], -1),), x.shape[2])


def assert_same_function(ours: Any, expected: Any, *arguments: Array) -> None:
    """Compare values, and gradients of a random weighting of them."""
    (y, pull), (z, pull_expected) = jax.vjp(ours, *arguments), jax.vjp(expected, *arguments)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=z.shape), z.dtype)
    for mine, theirs in zip(pull(weights), pull_expected(weights), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "features"),
    [(13, 6), (14, 72), (1, 6)],  # 144 channels of two columns are not put side by side
)
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("given", ["map", "rows", "side by side", "apart"])
def test_convolutions(given: str, size: int, stride: int, width: int, features: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, width, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 5, features)), jnp.float32)
    pad = (size - 1) // 2

    def ours(x: Array, kernel: Array) -> Array:
        wanted = x if given in ("map", "rows") else paired(x, given == "side by side")
        y = convolve_pairs(wanted, kernel, stride, pad, by_rows=given == "rows")
        assert len(y.maps) == (1 if features == 6 else 2)
        assert (y.width, y.shape) == (joined(y).shape[2], joined(y).shape)
        return joined(y)

    def native(x: Array, kernel: Array) -> Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=dims)

    assert_same_function(ours, native, x, kernel)


def test_pairs_are_for_training() -> None:
    x = jnp.zeros((1, 2, 4, 3))
    variables = BatchNorm().init(jax.random.key(0), x, True)
    with pytest.raises(TypeError, match="for training alone"):
        BatchNorm().apply(variables, paired(x, True), False)


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("width", [6, 7])
def test_batch_norm(width: int, groups: int, side_by_side: bool) -> None:
    layer = BatchNorm(relu=True)
    x = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (4, 5, width, 3)), jnp.float32)
    variables = layer.init(jax.random.key(0), x, True)
    parameters = {"scale": jnp.array([1.0, -0.5, 2.0]), "bias": jnp.array([0.1, 0.2, -0.3])}

    def call(x: Any, params: Any) -> tuple[Any, Any]:
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        return layer.apply(given, x, True, groups=groups, mutable=["batch_stats"])  # type: ignore[return-value]

    assert_same_function(
        lambda x, *p: joined(call(paired(x, side_by_side), dict(zip(parameters, p, strict=True)))[0]),
        lambda x, *p: call(x, dict(zip(parameters, p, strict=True)))[0],
        x,
        *parameters.values(),
    )
    ours, expected = (call(given, parameters)[1] for given in (paired(x, side_by_side), x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)


@pytest.mark.parametrize("size", [(1, 1), (7, 8), (8, 9)])
@pytest.mark.parametrize("given", ["map", "side by side", "apart"])
def test_max_pool(given: str, size: tuple[int, int]) -> None:
    """Of numbers that are all different, for which the gradient is the library's too."""
    x = jnp.asarray(np.random.default_rng(0).permutation(2 * size[0] * size[1] * 4), jnp.float32) - 20
    x = x.reshape(2, *size, 4)
    assert_same_function(
        lambda x: max_pool(x if given == "map" else paired(x, given == "side by side"), train=True),
        lambda x: nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))),
        x,
    )


@pytest.mark.parametrize(("stem", "width", "rows", "spatial"), [("64-64-128", 40, 0, 2), ("7x7", 16, 3, 1)])
def test_a_training_step(stem: str, width: int, rows: int, spatial: int) -> None:
    """Also with the rows of images spread over devices, of which 48 are made where 41 are real."""
    settings = defaults().model
    settings.update(depth=10, width=width, stem=stem, head_channels=8, aux_channels=8)
    model, optimizer = build_model(settings, 4), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 41, 41, 3)).astype(np.uint8)
    batch = {"image": image, "label": rng.integers(0, 4, (4, 41, 41)).astype(np.uint8)}
    ends = []
    for lowering, mesh in (
        (NATIVE, parallel.make_mesh(devices=jax.devices()[:1])),
        (Lowering(rows, pairs=True), parallel.make_mesh(1, spatial, jax.devices()[:spatial])),
    ):
        state = create_state(model, optimizer, 0, mesh)
        step = make_train_step(
            model,
            optimizer,
            mean=(128.0,) * 3,
            std=(64.0,) * 3,
            aux_weight=0.4,
            align_corners=True,
            ignore_label=255,
            dropout_seed=0,
            bn_groups=2,
            lowering=lowering,
            split=parallel.split_rows(mesh, 4, 41, 8),
        )
        text = jax.jit(step).lower(state, batch).as_text()
        by_pairs = re.findall(r"stablehlo.convolution.* -> tensor<(?:4x2[14]|84x1)x11x", text)
        least = 4 if stem == "64-64-128" else 1  # two with their columns side by side, and one of two maps
        assert len(by_pairs) >= least if lowering.pairs else not by_pairs
        ends.append(jax.device_get(jax.jit(step)(state, batch)))
    (ours, measures), (expected, others) = ends[1], ends[0]
    assert measures["loss"] == pytest.approx(others["loss"], rel=1e-5)
    assert measures["grad_norm"] == pytest.approx(others["grad_norm"], rel=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), ours.params, expected.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours.batch_stats, expected.batch_stats
    )
