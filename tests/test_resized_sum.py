"""The cross entropy of resized class scores that are never stored, against that of stored ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.interpolation import resize
from psp_jax.losses import PixelLoss, cross_entropy, resized_cross_entropy

OPTIONS = {
    "plain": PixelLoss(),
    "weights": PixelLoss(class_weights=(1.0, 0.0, 2.5, 0.3, 1.0)),
    "smoothing": PixelLoss(label_smoothing=0.1),
    "both": PixelLoss(class_weights=(1.0, 0.5, 2.5, 0.3, 1.0), label_smoothing=0.2),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("size", "align_corners"),
    [((9, 300), True), ((5, 128), False), ((2, 129), True), ((17, 25), True), ((3, 13), True)],
)
def test_value_and_gradient(name: str, size: tuple[int, int], align_corners: bool) -> None:
    """Three blocks of columns, one, and two of which the second is not full; then phases: 8 x 4 and 1 x 2."""
    options, rng = OPTIONS[name], np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(0, 3, (2, 3, 7, 5)), jnp.float32)
    label = rng.integers(0, 5, (2, *size))
    label[rng.random(label.shape) < 0.2] = 255
    label = jnp.asarray(label)

    def stored(x: jax.Array) -> jax.Array:
        full = resize(x, size, align_corners, jax.lax.Precision.HIGHEST)
        return 0.7 * cross_entropy(full, label, 255, options)

    def ours(x: jax.Array) -> jax.Array:
        return 0.7 * resized_cross_entropy(x, label, 255, align_corners, options)

    (expected, slope), (value, gradient) = (jax.jit(jax.value_and_grad(f))(scores) for f in (stored, ours))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("align_corners", [True, False])
def test_all_void(align_corners: bool) -> None:
    scores, label = jnp.ones((1, 2, 2, 3)), jnp.full((1, 4, 4), 255)
    value, gradient = jax.value_and_grad(lambda x: resized_cross_entropy(x, label, 255, align_corners))(scores)
    assert value == 0
    assert not np.any(gradient)


@pytest.mark.parametrize(("rows", "size", "align_corners"), [(8, (64, 2048), False), (5, (65, 2033), True)])
def test_the_scores_are_never_stored_at_full_size(rows: int, size: tuple[int, int], align_corners: bool) -> None:
    """They are 26 MB; a block of columns is 1.6 MB, and a row of phases 2 MB."""
    scores, label = jnp.ones((1, rows, 128, 50)), jnp.zeros((1, *size), jnp.int32)
    compiled = jax.jit(jax.grad(lambda x: resized_cross_entropy(x, label, 255, align_corners))).lower(scores).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * size[0] * size[1] * 50 * 4
