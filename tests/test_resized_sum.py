"""The cross entropy of resized class scores that are never stored, against that of stored ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.interpolation import resize, resize_matrices
from psp_jax.losses import PixelLoss, cross_entropy, resized_cross_entropy

OPTIONS = {
    "plain": PixelLoss(),
    "weights": PixelLoss(class_weights=(1.0, 0.0, 2.5, 0.3, 1.0)),
    "smoothing": PixelLoss(label_smoothing=0.1),
    "both": PixelLoss(class_weights=(1.0, 0.5, 2.5, 0.3, 1.0), label_smoothing=0.2),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("size", "align_corners"), [((9, 300), True), ((5, 128), False), ((2, 129), True)])
def test_value_and_gradient(name: str, size: tuple[int, int], align_corners: bool) -> None:
    """Three blocks of columns, one, and two of which the second is not full."""
    options, rng = OPTIONS[name], np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(0, 3, (2, 3, 7, 5)), jnp.float32)
    label = rng.integers(0, 5, (2, *size))
    label[rng.random(label.shape) < 0.2] = 255
    label = jnp.asarray(label)

    def stored(x: jax.Array) -> jax.Array:
        full = resize(x, size, align_corners, jax.lax.Precision.HIGHEST)
        return 0.7 * cross_entropy(full, label, 255, options)

    def ours(x: jax.Array) -> jax.Array:
        return 0.7 * resized_cross_entropy(x, label, 255, resize_matrices((3, 7), size, None, align_corners), options)

    (expected, slope), (value, gradient) = (jax.jit(jax.value_and_grad(f))(scores) for f in (stored, ours))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)


def test_all_void() -> None:
    scores, label = jnp.ones((1, 2, 2, 3)), jnp.full((1, 4, 4), 255)
    matrices = resize_matrices((2, 2), (4, 4), None, True)
    value, gradient = jax.value_and_grad(lambda x: resized_cross_entropy(x, label, 255, matrices))(scores)
    assert value == 0
    assert not np.any(gradient)


def test_the_scores_are_never_stored_at_full_size() -> None:
    """Of 64 x 1024 pixels and 50 classes they are 13.1 MB; a block, or an array of their own width, is 1.6 MB."""
    scores, label = jnp.ones((1, 8, 128, 50)), jnp.zeros((1, 64, 1024), jnp.int32)
    matrices = resize_matrices((8, 128), (64, 1024), None, True)
    compiled = jax.jit(jax.grad(lambda x: resized_cross_entropy(x, label, 255, matrices))).lower(scores).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * 64 * 1024 * 50 * 4
