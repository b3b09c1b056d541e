"""Losses against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.losses import cross_entropy, presence_loss, segmentation_loss
from psp_jax.optimizer import poly_schedule, sgd


def test_cross_entropy_by_hand() -> None:
    # Three pixels; p(label) is 1/2, 3/4 and, under the void label, nothing.
    logits = jnp.log(jnp.array([[[[1.0, 1.0], [3.0, 1.0], [5.0, 1.0]]]]))
    label = jnp.array([[[1, 0, 255]]])
    expected = (np.log(2) + np.log(4 / 3)) / 2
    np.testing.assert_allclose(cross_entropy(logits, label, 255), expected, rtol=1e-6)


def test_void_pixels_have_no_gradient() -> None:
    logits = jax.random.normal(jax.random.key(0), (1, 2, 2, 3))
    label = jnp.array([[[0, 255], [255, 2]]])
    gradient = jax.grad(lambda x: cross_entropy(x, label, 255))(logits)
    assert np.all(np.asarray(gradient)[np.asarray(label) == 255] == 0)
    assert np.all(np.abs(np.asarray(gradient)[np.asarray(label) != 255]).sum(-1) > 0)


def test_nothing_but_void_is_zero_and_finite() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    label = jnp.full((2, 3, 3), 255)
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, label, 255))(logits)
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


def test_every_valid_pixel_weighs_the_same() -> None:
    """The mean is over the pixels of the batch, not over the means of its images."""
    logits = jnp.zeros((2, 1, 4, 2)).at[1, ..., 0].set(10.0)
    label = jnp.array([[[0, 0, 0, 0]], [[1, 255, 255, 255]]])
    expected = (4 * np.log(2) + np.log1p(np.exp(10.0))) / 5
    np.testing.assert_allclose(cross_entropy(logits, label, 255), expected, rtol=1e-6)


def test_main_and_auxiliary_loss_add_up() -> None:
    outputs = {"logits": jnp.zeros((1, 2, 2, 4)), "aux_logits": jnp.zeros((1, 2, 2, 4)).at[..., 1].set(np.log(5.0))}
    label = jnp.zeros((1, 9, 9), jnp.int32)
    loss, parts = segmentation_loss(outputs, label, aux_weight=0.4, align_corners=True, ignore_label=255)
    np.testing.assert_allclose(parts["main_loss"], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(parts["aux_loss"], np.log(8), rtol=1e-6)  # 1 + 1 + 1 + 5
    np.testing.assert_allclose(loss, np.log(4) + 0.4 * np.log(8), rtol=1e-6)


def test_presence_loss_by_hand() -> None:
    """Two crops and three classes; one pixel makes a class present, and void none."""
    label = jnp.array([[[0, 0], [255, 2]], [[255, 255], [255, 255]]])
    logits = jnp.log(jnp.array([[3.0, 1.0, 1.0], [1.0, 1.0, 1 / 3]]))  # probabilities 3/4, 1/2, 1/2; 1/2, 1/2, 1/4
    expected = (2 * np.log(4 / 3) + 4 * np.log(2)) / 6
    np.testing.assert_allclose(presence_loss(logits, label, 255), expected, rtol=1e-6)
    np.testing.assert_allclose(presence_loss(logits[1:], label[1:] - 253, 2), presence_loss(logits[1:], label[1:], 255))
    extreme = jnp.array([[1e4, -1e4, -1e4], [-1e4, -1e4, 1e4]])
    value, gradient = jax.value_and_grad(presence_loss)(extreme, label, 255)
    np.testing.assert_allclose(value, 2e4 / 6, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_presence_loss_joins_where_the_network_tells_the_classes_present() -> None:
    outputs = {"logits": jnp.zeros((1, 2, 2, 4)), "se_logits": jnp.zeros((1, 4))}
    options = {"aux_weight": 0.4, "se_weight": 0.2, "align_corners": True, "ignore_label": 255}
    loss, parts = segmentation_loss(outputs, jnp.zeros((1, 2, 2), jnp.int32), **options)
    np.testing.assert_allclose(parts["se_loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(loss, np.log(4) + 0.2 * np.log(2), rtol=1e-6)
    outputs.pop("se_logits")
    assert "se_loss" not in segmentation_loss(outputs, jnp.zeros((1, 2, 2), jnp.int32), **options)[1]


def test_poly_schedule() -> None:
    schedule = poly_schedule(0.01, 0.9, 100)
    np.testing.assert_allclose(schedule(0), 0.01, rtol=1e-6)
    np.testing.assert_allclose(schedule(50), 0.01 * 0.5**0.9, rtol=1e-5)
    assert schedule(100) == 0
    warm = poly_schedule(0.01, 0.9, 100, warmup_steps=4)
    np.testing.assert_allclose(warm(0), 0.0025, rtol=1e-5)
    np.testing.assert_allclose(warm(50), schedule(50), rtol=1e-6)


@pytest.mark.parametrize("decay_all", [True, False])
def test_sgd_is_torchs(decay_all: bool) -> None:
    """Two steps by hand: v = 0.9 v + g + wd p; p -= rate v; heads at ten times the rate."""
    params = {"backbone": {"kernel": jnp.array(2.0), "bias": jnp.array(1.0)}, "head": {"kernel": jnp.array(3.0)}}
    options = {"momentum": 0.9, "weight_decay": 0.1, "decay_bn_and_bias": decay_all, "head_lr_multiplier": 10.0}
    optimizer = sgd(lambda step: 0.5 / (step + 1), **options)
    state = optimizer.init(params)
    gradients = jax.tree.map(lambda p: jnp.array(1.0), params)
    expected = {"kernel": 2.0, "bias": 1.0, "head": 3.0}
    velocity = dict.fromkeys(expected, 0.0)
    for rate in (0.5, 0.25):
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        for name in expected:
            decay = 0.1 if decay_all or name != "bias" else 0.0
            velocity[name] = 0.9 * velocity[name] + 1.0 + decay * expected[name]
            expected[name] -= rate * (10 if name == "head" else 1) * velocity[name]
    np.testing.assert_allclose(params["backbone"]["kernel"], expected["kernel"], rtol=1e-6)
    np.testing.assert_allclose(params["backbone"]["bias"], expected["bias"], rtol=1e-6)
    np.testing.assert_allclose(params["head"]["kernel"], expected["head"], rtol=1e-6)
