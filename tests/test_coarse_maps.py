"""Coarse maps that a convolution takes beside features without resizing them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax import interpolation
from psp_jax.models import layers
from psp_jax.models.valid import zero_beyond


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("valid", [None, (5, 8), jnp.array([[7, 9], [4, 6]])])
def test_coarse_maps_beside_features_are_as_if_resized_and_joined(valid: Any, align_corners: bool) -> None:
    """Value and gradients of a 3x3 convolution, with the rest of the map beyond what is real at zero."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    x = zero_beyond(jax.random.normal(next(keys), (2, 7, 9, 3)), valid)
    cells = [jax.random.normal(next(keys), (2, n, n, channels)) for n, channels in ((1, 4), (2, 3), (6, 2))]
    conv = layers.Conv(5)
    kernel = jax.random.normal(next(keys), (3, 3, 12, 5))
    weight = jax.random.normal(next(keys), (2, 7, 9, 5))

    def joined(kernel: jax.Array, x: jax.Array, *cells: jax.Array) -> jax.Array:
        maps = [interpolation.resize_into(c, (7, 9), valid, align_corners) for c in cells]
        return conv.apply({"params": {"kernel": kernel}}, jnp.concatenate([x, *maps], -1))

    def beside(kernel: jax.Array, x: jax.Array, *cells: jax.Array) -> jax.Array:
        pairs = [(c, interpolation.resize_matrices(c.shape[1:3], (7, 9), valid, align_corners)) for c in cells]
        return conv.apply({"params": {"kernel": kernel}}, x, pairs)

    def value_and_gradients(f: Any) -> Any:
        def weighted(*args: Any) -> tuple[jax.Array, jax.Array]:
            y = f(*args)
            return (y * weight).sum(), y

        return jax.jit(jax.value_and_grad(weighted, tuple(range(2 + len(cells))), has_aux=True))(kernel, x, *cells)

    for ours, theirs in zip(*(jax.tree.leaves(value_and_gradients(f)) for f in (beside, joined)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
