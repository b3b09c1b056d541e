"""Labels of very large images against windows at full resolution in NumPy; memory, seams and compiles."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax import tiling
from psp_jax.data.transforms import PIXEL_FILL
from psp_jax.interpolation import resize_weights
from psp_jax.tiling import make_tile_labeler, window_origins

WINDOW = (65, 49)
SIZES = [(1, 1), (65, 49), (66, 50), (20, 180), (150, 121), (7, 400), (203, 40)]


def scores_of(variables: object, image: jax.Array) -> jax.Array:
    """A stand-in for a network: class scores [B, 9, 7, 5] of the image and of the place in the window."""
    del variables
    x = image.astype(jnp.float32)[:, ::8, ::8] / 64
    place = jnp.broadcast_to(jnp.linspace(0, 3, x.shape[1])[None, :, None, None], (*x.shape[:3], 1))
    return jnp.concatenate([x, 4 - x[..., :1], place], axis=-1)


def reference(image: np.ndarray, align_corners: bool) -> np.ndarray:
    """Average the probabilities of all windows at full resolution, one window at a time: f64 [H, W, 5]."""
    height, width = image.shape[:2]
    total, weights = np.zeros((height, width, 5)), np.zeros((height, width, 1))
    tops, lefts = window_origins(height, WINDOW[0]), window_origins(width, WINDOW[1])
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            window = np.full((*WINDOW, 3), PIXEL_FILL, np.uint8)
            part = image[top : top + WINDOW[0], left : left + WINDOW[1]]
            window[: part.shape[0], : part.shape[1]] = part
            scores = np.asarray(scores_of(None, jnp.asarray(window[None])))[0].astype(np.float64)
            rows, columns = (resize_weights(WINDOW[k], scores.shape[k], align_corners) for k in range(2))
            full = np.einsum("yh,xw,hwc->yxc", rows, columns, scores)[: part.shape[0], : part.shape[1]]
            probabilities = np.exp(full - full.max(-1, keepdims=True))
            probabilities /= probabilities.sum(-1, keepdims=True)
            weight = np.outer(ramp(tops, i, WINDOW[0]), ramp(lefts, j, WINDOW[1]))[..., None]
            weight = weight[: part.shape[0], : part.shape[1]]
            inside = np.s_[top : top + WINDOW[0], left : left + WINDOW[1]]
            total[inside] += weight * probabilities
            weights[inside] += weight
    return total / weights


def ramp(origins: np.ndarray, index: int, window: int) -> np.ndarray:
    """Weight of each pixel of a window: 1, but rising from its edge over what it shares with its neighbour."""
    weight = np.ones(window)
    for q in range(window):
        if index > 0:
            weight[q] = min(weight[q], (q + 0.5) / (origins[index - 1] + window - origins[index]))
        if index < len(origins) - 1:
            weight[q] = min(weight[q], (window - q - 0.5) / (origins[index] + window - origins[index + 1]))
    return weight


def smooth_image(height: int, width: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, 3)


@pytest.mark.parametrize("align_corners", [True, False])
def test_tiles_agree_with_whole_windows_at_every_size(align_corners: bool) -> None:
    traces = []

    def forward(variables: object, image: jax.Array) -> jax.Array:
        traces.append(image.shape)
        return scores_of(variables, image)

    label = make_tile_labeler(forward, window=WINDOW, align_corners=align_corners, batch=3, tile=32)
    images = [smooth_image(*size, seed) for seed, size in enumerate(SIZES)]
    for image, (labels, confidence) in zip(images, label({}, images), strict=True):
        probabilities = reference(image, align_corners)
        top = np.sort(probabilities, axis=-1)
        assert labels.shape == confidence.shape == image.shape[:2]
        assert labels.dtype == confidence.dtype == np.uint8
        clear = top[..., -1] - top[..., -2] > 1e-4
        np.testing.assert_array_equal(labels[clear], probabilities.argmax(-1)[clear])
        # Where 1e-4 of probability cannot carry it over half a step, the rounded value is the same.
        exact = 255 * top[..., -1]
        steady = np.abs(exact % 1 - 0.5) > 0.0255
        np.testing.assert_array_equal(confidence[steady], np.round(exact)[steady])
        assert image.size == 3 or (clear.mean() > 0.95 and steady.mean() > 0.8)
    assert traces == [(3, *WINDOW, 3)]


def test_no_seam_shows_where_windows_meet() -> None:
    """A network whose answer depends on the place in the window alone: steps of confidence would show every border."""

    def forward(variables: object, image: jax.Array) -> jax.Array:
        sure = 4 * jnp.hypot(jnp.linspace(-1, 1, 9)[:, None], jnp.linspace(-1, 1, 7)[None])
        return jnp.broadcast_to(jnp.stack([sure, -sure], -1), (image.shape[0], 9, 7, 2))

    label = make_tile_labeler(forward, window=WINDOW, align_corners=True, batch=4, tile=32)
    [(labels, confidence)] = label({}, [np.zeros((200, 170, 3), np.uint8)])
    assert (labels == 0).all()
    steps = [np.abs(np.diff(confidence.astype(int), axis=axis)).max() for axis in range(2)]
    one_window = np.asarray(jax.nn.softmax(jnp.linspace(0, 4 * np.sqrt(2), 33)[:, None] * jnp.array([1.0, -1.0])))[:, 0]
    assert confidence.min() < 220  # the middles are unsure, as in one window
    assert max(steps) <= 255 * np.diff(one_window).max() * 1.5


@pytest.mark.parametrize("size", [(2000, 300), (300, 2000)])
def test_scores_are_kept_for_few_rows_of_windows(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    batch, peak = 4, 0
    touching = tiling._touching

    def watched(*arguments: object) -> object:
        nonlocal peak
        live = sum(array.shape[0] for array in jax.live_arrays() if array.shape == (batch, 9, 7, 5))
        peak = max(peak, live)
        return touching(*arguments)

    monkeypatch.setattr(tiling, "_touching", watched)
    label = make_tile_labeler(scores_of, window=WINDOW, align_corners=True, batch=batch, tile=32)
    [(labels, _)] = label({}, [smooth_image(*size, 0)])
    assert labels.shape == size
    in_a_row = len(window_origins(size[1], WINDOW[1]))
    assert 0 < peak <= 3 * in_a_row + 2 * batch  # a batch may begin in one row and end in the next


@pytest.mark.parametrize("window", [41, 64, 473])
def test_windows_cover_the_axis_and_share_a_third(window: int) -> None:
    for length in [1, window - 1, window, window + 1, *range(window + 2, 6 * window, 37)]:
        origins = window_origins(length, window)
        assert origins[0] == 0 and origins[-1] == max(0, length - window)
        assert (window - np.diff(origins) >= window / 3).all()
        fewer = len(origins) - 1
        assert fewer == 0 or window + (fewer - 1) * (window - -(-window // 3)) < length
