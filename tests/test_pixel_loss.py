"""The options of the cross entropy against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.losses import WEIGHTINGS, PixelLoss, cross_entropy, hard_pixels, segmentation_loss

# Three pixels of two classes; the probabilities of their own classes are 1/2, 3/4 and, under void, nothing.
LOGITS = jnp.log(jnp.array([[[[1.0, 1.0], [3.0, 1.0], [5.0, 1.0]]]]))
LABEL = jnp.array([[[1, 0, 255]]])


def loss(**options: object) -> float:
    return float(cross_entropy(LOGITS, LABEL, 255, PixelLoss(**options)))


def test_class_weights_count_in_the_sum_and_in_the_number() -> None:
    expected = (3 * np.log(2) + 0.5 * np.log(4 / 3)) / 3.5
    np.testing.assert_allclose(loss(class_weights=(0.5, 3.0)), expected, rtol=1e-6)
    np.testing.assert_allclose(loss(class_weights=(7.0, 7.0)), loss(), rtol=1e-6)


def test_no_pixel_of_a_weighted_class_is_zero_and_finite() -> None:
    options = PixelLoss(class_weights=(0.0, 1.0))
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, jnp.array([[[0, 0, 255]]]), 255, options))(LOGITS)
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


def test_label_smoothing_spreads_a_share_evenly() -> None:
    even = (np.log(2), (np.log(4 / 3) + np.log(4)) / 2)
    expected = np.mean([0.9 * np.log(2) + 0.1 * even[0], 0.9 * np.log(4 / 3) + 0.1 * even[1]])
    np.testing.assert_allclose(loss(label_smoothing=0.1), expected, rtol=1e-6)


def test_label_smoothing_with_class_weights_is_torchs() -> None:
    """The even part weighs each class by its own weight; the divisor is that of the pixels' classes."""
    w = (0.5, 3.0)
    even = [(w[0] * a + w[1] * b) / 2 for a, b in ((np.log(2), np.log(2)), (np.log(4 / 3), np.log(4)))]
    own = [3 * np.log(2), 0.5 * np.log(4 / 3)]
    expected = sum(0.8 * o + 0.2 * e for o, e in zip(own, even, strict=True)) / 3.5
    np.testing.assert_allclose(loss(class_weights=w, label_smoothing=0.2), expected, rtol=1e-6)


def test_hard_examples_by_hand() -> None:
    np.testing.assert_allclose(loss(ohem_threshold=0.7), np.log(2), rtol=1e-6)  # only the pixel of 1/2 counts
    np.testing.assert_allclose(loss(ohem_threshold=0.9), loss(), rtol=1e-6)
    assert loss(ohem_threshold=0.4) == 0  # none is hard
    np.testing.assert_allclose(loss(ohem_threshold=0.4, ohem_min_kept=1), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(loss(ohem_threshold=0.4, ohem_min_kept=99), loss(), rtol=1e-6)


def test_as_many_hard_pixels_as_a_sort_finds() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(size=(2, 9, 11)).astype(np.float32)
    valid = rng.uniform(size=probability.shape) < 0.7
    for min_kept in (1, 30, 60, 500):
        hard = np.asarray(jax.jit(hard_pixels, static_argnums=(2, 3))(probability, valid, 0.2, min_kept))
        last = np.sort(probability[valid])[min(2 * min_kept, valid.sum()) - 1]
        np.testing.assert_array_equal(hard, valid & ((probability < 0.2) | (probability <= last)))


def test_hard_examples_are_mined_for_the_main_loss_alone() -> None:
    outputs = {"logits": LOGITS, "aux_logits": LOGITS}
    options = {"aux_weight": 0.4, "align_corners": True, "ignore_label": 255}
    parts = segmentation_loss(outputs, LABEL, **options, pixel_loss=PixelLoss(ohem_threshold=0.7))[1]
    np.testing.assert_allclose(parts["main_loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(parts["aux_loss"], loss(), rtol=1e-6)


def test_class_weights_that_were_not_made_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Make class_weights of class_weighting='inverse_log_frequency' first"):
        loss(class_weighting=WEIGHTINGS[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, r"loss\.class_weights holds 2 numbers .* each of the 3 classes"),
        ({"class_weights": (1.0, -2.0, 1.0)}, r"from -2\.0 to 1\.0"),
        ({"class_weights": (0.0, 0.0, 0.0)}, r"not all 0"),
        ({"label_smoothing": 1.0}, r"loss\.label_smoothing=1\.0 must be at least 0 and below 1"),
        ({"ohem_threshold": 1.5}, r"loss\.ohem_threshold=1\.5 is no probability"),
        ({"cross_entropy": 0.0}, r"loss\.cross_entropy, loss\.dice and loss\.lovasz are all 0; give one of them"),
        ({"dice": -1.0}, r"loss\.dice=-1\.0 is no weight; choose 0 \(off\) or more"),
        ({"lovasz": float("nan")}, r"loss\.lovasz=nan is no weight"),
        ({"class_weighting": "enet"}, r"'enet' is unknown; choose one of: none, inverse_log_frequency"),
        ({"class_weighting": WEIGHTINGS[1], "class_weights": (1.0, 1.0, 1.0)}, r"are both given; choose one"),
        ({"ohem_min_kept": 5}, r"loss\.ohem_min_kept=5 must be .* 0 without loss\.ohem_threshold"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelLoss(**options).check(3)
