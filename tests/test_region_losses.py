"""Dice and Lovasz-softmax against values worked out by hand, NumPy and finite differences; all losses on a mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax import parallel
from psp_jax.losses import PixelLoss, segmentation_loss
from psp_jax.region_losses import dice_loss, lovasz_softmax

# Three labelled pixels of two classes: probabilities of class 0 are 3/4, 1/2 and 1/4; the last pixel is void.
LOGITS = jnp.log(jnp.array([[[[3.0, 1.0], [1.0, 1.0], [1.0, 3.0], [9.0, 1.0]]]]))
LABEL = jnp.array([[[0, 0, 1, 255]]])
BOTH = pytest.mark.parametrize("loss", [dice_loss, lovasz_softmax])
Loss = Callable[[jax.Array, jax.Array, int], jax.Array]


def batch(
    seed: int, shape: tuple[int, ...] = (2, 5, 7), classes: int = 6, present: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels, of which the last classes are absent and a third is void."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, present, shape).astype(np.int32)
    label[rng.uniform(size=shape) < 1 / 3] = 255
    return 2 * rng.normal(size=(*shape, classes)).astype(np.float32), label


def jaccard_loss_of_errors(error: np.ndarray, own: np.ndarray) -> float:
    """The definition: errors in falling order, each times what the Jaccard loss of the wrong set grows by."""
    order = np.argsort(-error, kind="stable")
    total, former = 0.0, 0.0
    for k in range(1, len(order) + 1):
        wrong = np.zeros(len(own), bool)
        wrong[order[:k]] = True
        jaccard = 1 - (own & ~wrong).sum() / (own | wrong).sum()
        total += error[order[k - 1]] * (jaccard - former)
        former = jaccard
    return total


def numpy_loss(loss: Loss, logits: np.ndarray, label: np.ndarray) -> float:
    """Both losses in float64 over the labelled pixels, class by class."""
    scores, labels = logits[label != 255].astype(np.float64), label[label != 255]
    probability = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    found = []
    for index in np.unique(labels):
        p, own = probability[:, index], labels == index
        if loss is dice_loss:
            found.append(1 - 2 * p[own].sum() / (p.sum() + own.sum()))
        else:
            found.append(jaccard_loss_of_errors(np.abs(own - p), own))
    return float(np.mean(found))


def test_dice_by_hand() -> None:
    expected = np.mean([1 - 2 * (5 / 4) / (3 / 2 + 2), 1 - 2 * (3 / 4) / (3 / 2 + 1)])
    np.testing.assert_allclose(dice_loss(LOGITS, LABEL, 255), expected, rtol=1e-6)


def test_lovasz_by_hand() -> None:
    """Errors are 1/4, 1/2, 1/4 for both classes; the second pixel goes wrong first, then the first, then the third.

    Class 0 holds the first two pixels: its Jaccard loss grows to 1/2, 1, 1. Class 1 holds the third: 1/2, 2/3, 1.
    """
    class_0 = 1 / 2 * 1 / 2 + 1 / 4 * 1 / 2
    class_1 = 1 / 2 * 1 / 2 + 1 / 4 * 1 / 6 + 1 / 4 * 1 / 3
    np.testing.assert_allclose(lovasz_softmax(LOGITS, LABEL, 255), (class_0 + class_1) / 2, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_value_is_numpys(loss: Loss, seed: int) -> None:
    logits, label = batch(seed)
    np.testing.assert_allclose(
        jax.jit(loss, static_argnums=2)(logits, label, 255), numpy_loss(loss, logits, label), rtol=1e-5
    )


@BOTH
def test_gradient_is_that_of_finite_differences(loss: Loss) -> None:
    logits, label = batch(3, (1, 3, 4))
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(logits), label, 255))
    expected = np.zeros_like(gradient, np.float64)
    for place in np.ndindex(*logits.shape):
        step = np.zeros(logits.shape)
        step[place] = 1e-6
        expected[place] = (numpy_loss(loss, logits + step, label) - numpy_loss(loss, logits - step, label)) / 2e-6
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-2
    assert np.all(gradient[label == 255] == 0)


@BOTH
def test_nothing_but_void_is_zero_and_finite(loss: Loss) -> None:
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(batch(0)[0]), jnp.full((2, 5, 7), 255), 255)
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


@BOTH
def test_certain_right_and_wrong_predictions(loss: Loss) -> None:
    label = jnp.array([[[0, 1], [2, 255]]])
    right = 1e4 * jax.nn.one_hot(label, 4)
    for logits, expected in ((right, 0.0), (-right, 1.0)):
        value, gradient = jax.value_and_grad(loss)(logits, label, 255)
        np.testing.assert_allclose(value, expected, atol=1e-6)
        assert np.isfinite(gradient).all()


def test_many_pixels_keep_their_slopes() -> None:
    """Half a million pixels of equal errors: the slopes sum to the whole Jaccard loss."""
    label = jnp.tile(jnp.array([0, 1]), 1 << 18)[None, None]
    loss, gradient = jax.value_and_grad(lovasz_softmax)(jnp.zeros((*label.shape, 2)), label, 255)
    np.testing.assert_allclose(loss, 0.5, rtol=1e-4)
    assert np.isfinite(gradient).all()


def test_parts_add_up_with_their_weights() -> None:
    options = PixelLoss(cross_entropy=0.0, dice=3.0, lovasz=0.5)
    outputs = {"logits": LOGITS, "aux_logits": 2 * LOGITS}
    loss, parts = segmentation_loss(
        outputs, LABEL, aux_weight=0.4, align_corners=True, ignore_label=255, pixel_loss=options
    )
    dice, lovasz = (
        [numpy_loss(f, factor * np.asarray(LOGITS), np.asarray(LABEL)) for factor in (1, 2)]
        for f in (dice_loss, lovasz_softmax)
    )
    np.testing.assert_allclose(parts["dice_loss"], dice[0], rtol=1e-5)
    np.testing.assert_allclose(parts["lovasz_loss"], lovasz[0], rtol=1e-5)
    np.testing.assert_allclose(parts["main_loss"], 3 * dice[0] + lovasz[0] / 2, rtol=1e-5)
    np.testing.assert_allclose(parts["aux_loss"], 3 * dice[1] + lovasz[1] / 2, rtol=1e-5)
    np.testing.assert_allclose(loss, parts["main_loss"] + 0.4 * parts["aux_loss"], rtol=1e-6)


@pytest.mark.parametrize("spatial", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        PixelLoss(dice=1.0),
        PixelLoss(lovasz=1.0),
        PixelLoss(ohem_threshold=0.3),
        PixelLoss(ohem_threshold=0.05, ohem_min_kept=20),
        PixelLoss(class_weights=(1.0, 2.0, 0.0, 1.0, 1.0, 3.0), label_smoothing=0.1),
    ],
    ids=["dice", "lovasz", "ohem", "ohem_min_kept", "weights"],
)
def test_a_sharded_batch_is_one_batch(options: PixelLoss, spatial: int) -> None:
    """Void and classes are spread unevenly over the devices on purpose; loss and gradient are those of one device."""
    logits, label = batch(4, (8, 8, 9))
    label[:3] = 255
    label[3][label[3] < 255] = 5

    def loss(logits: jax.Array, label: jax.Array) -> jax.Array:
        weights = {"aux_weight": 0.0, "align_corners": False, "ignore_label": 255}
        return segmentation_loss({"logits": logits}, label, **weights, pixel_loss=options)[0]

    step = jax.jit(jax.value_and_grad(loss))
    one = step(logits, label)
    mesh = parallel.make_mesh(-1, spatial)
    eight = step(*(jax.device_put(x, parallel.batch_sharding(mesh)) for x in (logits, label)))
    assert len(eight[1].sharding.device_set) == 8
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(eight[1], one[1], rtol=1e-5, atol=1e-8)
    assert np.abs(one[1]).max() > 1e-4
