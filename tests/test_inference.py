"""Labels at original size against OpenCV's step-by-step resizes, and counting against NumPy."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.data.fitting import fit_image, fitted_size
from psp_jax.inference import count_parts, join_halves, make_eval_step, make_labeler
from psp_jax.interpolation import resize

CANVAS = (65, 81)


def scores_of(variables: object, image: jax.Array) -> jax.Array:
    """A stand-in for a network: smooth class scores [B, 9, 11, 5] that depend on the image."""
    del variables
    x = image.astype(jnp.float32)[:, ::8, ::8] / 255
    return jnp.concatenate(
        [
            x,
            1.2 - x[..., :2],
        ],
        axis=-1,
    )


def expected_labels(image: np.ndarray, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chain one step at a time: resize, pad, scores, upsample, crop, resize back: labels, probability, margin."""
    fitted, valid = fit_image(image, CANVAS)
    scores = scores_of(None, jnp.asarray(fitted[None]))
    full = np.asarray(resize(scores, CANVAS, align_corners))[0, : valid[0], : valid[1]]
    back = cv2.resize(full, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_LINEAR)
    top = np.sort(back, axis=-1)
    probability = 1 / np.exp(back - top[..., -1:]).sum(-1)
    return back.argmax(-1), probability, top[..., -1] - top[..., -2]


def smooth_image(height: int, width: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("align_corners", [True, False])
def test_labels_agree_with_the_chain_at_every_size(align_corners: bool) -> None:
    label = make_labeler(scores_of, canvas=CANVAS, align_corners=align_corners, batch=4, tile=32)
    sizes = [(65, 81), (130, 100), (20, 33), (64, 300), (7, 5), (1, 1)]
    images = [smooth_image(*size, seed) for seed, size in enumerate(sizes)]
    for image, (labels, confidence) in zip(images, label({}, images), strict=True):
        size = image.shape[:2]
        expected, probability, margin = expected_labels(image, align_corners)
        assert labels.shape == confidence.shape == size
        assert labels.dtype == confidence.dtype == np.uint8
        clear = margin > 1e-4
        np.testing.assert_array_equal(labels[clear], expected[clear])
        assert clear.mean() > 0.95 or size == (1, 1)
        np.testing.assert_allclose(confidence, 255 * probability, atol=0.51)


def test_counting_agrees_with_labelling_and_ignores_padding() -> None:
    tile = 32
    sizes = [(65, 81), (30, 50), (90, 33)]
    images = [smooth_image(*size, seed) for seed, size in enumerate(sizes)]
    rng = np.random.default_rng(1)
    truths = [rng.choice([0, 1, 2, 3, 4, 255], size).astype(np.uint8) for size in sizes]
    batch = {
        "image": np.full((4, *CANVAS, 3), 120, np.uint8),
        "valid": np.ones((4, 2), np.int32),
        "label": np.full((4, 96, 96), 255, np.uint8),
        "size": np.ones((4, 2), np.int32),
        "index": np.array([0, 1, 2, -1]),
    }
    for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
        batch["image"][i], batch["valid"][i] = fit_image(image, CANVAS)
        batch["label"][i, : truth.shape[0], : truth.shape[1]] = truth
        batch["size"][i] = truth.shape
    step = jax.jit(make_eval_step(scores_of, num_classes=5, canvas=CANVAS, align_corners=True, tile=tile))
    counts = step({}, {k: jnp.asarray(v) for k, v in batch.items()})

    label = make_labeler(scores_of, canvas=CANVAS, align_corners=True, tile=tile)
    expected = np.zeros((4, 5, 5), np.int64)
    for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
        valid, found = truth != 255, label({}, [image])[0][0]
        np.add.at(expected[i], (truth[valid], found[valid]), 1)
        np.testing.assert_array_equal(counts["labels"][i, : truth.shape[0], : truth.shape[1]], found)
    np.testing.assert_array_equal(join_halves(np.asarray(counts["confusion"])), expected.sum(0))
    parts = [np.diagonal(expected, axis1=1, axis2=2), expected.sum(2), expected.sum(1)]
    np.testing.assert_array_equal(counts["images"], np.stack(parts, 1))


def test_fitted_size_keeps_the_ratio() -> None:
    assert fitted_size((100, 200), (65, 81)) == (40, 81)
    assert fitted_size((200, 100), (65, 81)) == (65, 32)


def test_counts_of_many_large_images_do_not_overflow() -> None:
    confusion = jnp.full((5, 2, 2), 2**30 + 12_345, jnp.int32)
    total = join_halves(np.asarray(jax.jit(count_parts)(confusion)["confusion"]))
    np.testing.assert_array_equal(total, np.full((2, 2), 5 * (2**30 + 12_345)))
