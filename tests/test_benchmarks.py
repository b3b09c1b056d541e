"""What the benchmarks compare computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.convolutions import LOWERINGS, native


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("size", [(12, 8), (13, 7)])
def test_lowerings_of_a_dilated_convolution_agree(dilation: int, size: tuple[int, int]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *size, 5))
    kernel = jax.random.normal(keys[1], (3, 3, 5, 6))
    gradient = jax.random.normal(keys[2], (2, *size, 6))
    expected, pull = jax.vjp(lambda x, k: native(x, k, dilation), x, kernel)
    for name, convolve in LOWERINGS.items():
        value, ours = jax.vjp(lambda x, k, f=convolve: f(x, k, dilation), x, kernel)
        np.testing.assert_allclose(value, expected, atol=1e-4, err_msg=name)
        for a, b in zip(ours(gradient), pull(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3, err_msg=name)


def test_the_peer_is_the_same_network() -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.torch_pspnet import PSPNet

    network = PSPNet(150, (3, 4, 6, 3))
    assert sum(p.numel() for p in network.parameters()) == 49_180_908


def test_random_batches_hold_void() -> None:
    from benchmarks.train_step import random_batch

    image, label = random_batch(2, 33)
    assert image.shape == (2, 33, 33, 3)
    assert 0.02 < (label == 255).mean() < 0.09
    assert jnp.asarray(image).dtype == jnp.uint8
