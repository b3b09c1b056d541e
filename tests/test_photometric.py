"""Checks the colours against mmsegmentation's arithmetic, step by step, and the law of what is drawn."""

import cv2
import numpy as np
import pytest

from psp_jax.data.photometric import Distortion, distort, draw_distortion


def convert(values, alpha=1.0, beta=0.0):
    return np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)


def steps(image, distortion):
    """PhotoMetricDistortion on BGR, as there."""
    bgr = image[..., ::-1].copy()
    if distortion.brightness is not None:
        bgr = convert(bgr, beta=distortion.brightness)
    if distortion.contrast_first and distortion.contrast is not None:
        bgr = convert(bgr, alpha=distortion.contrast)
    if distortion.saturation is not None:
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = convert(hsv[:, :, 1], alpha=distortion.saturation)
        bgr = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if distortion.hue is not None:
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + distortion.hue) % 180
        bgr = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if not distortion.contrast_first and distortion.contrast is not None:
        bgr = convert(bgr, alpha=distortion.contrast)
    return bgr[..., ::-1]


def test_every_step_is_the_same_to_the_pixel():
    rng = np.random.default_rng(0)
    for _ in range(200):
        image = rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)
        before = image.copy()
        distortion = draw_distortion(rng)
        np.testing.assert_array_equal(distort(image[:, 2:12], distortion), steps(image[:, 2:12], distortion))
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("distortion", "expected"),
    [
        (Distortion(), (200, 40, 40)),
        (Distortion(brightness=-31.5), (168, 8, 8)),  # 168.5 and 8.5 are cut
        (Distortion(brightness=100.0, contrast=0.5), (127, 70, 70)),  # 255 / 2, after the cut at white
        (Distortion(contrast=1.5), (255, 60, 60)),
        (Distortion(saturation=0.5), (200, 120, 120)),  # of 255, the saturation is 204 and becomes 102
        (Distortion(saturation=1.5), (200, 0, 0)),
        (Distortion(hue=60), (40, 200, 40)),  # red by 120 degrees is green
        (Distortion(hue=-120), (40, 200, 40)),
        (Distortion(saturation=0.5, contrast=1.5), (255, 158, 158)),  # (255, 60, 60): 195 becomes 97
        (Distortion(saturation=0.5, contrast=1.5, contrast_first=False), (255, 180, 180)),
    ],
)
def test_a_pixel_by_hand(distortion, expected):
    assert tuple(distort(np.array([[[200, 40, 40]]], np.uint8), distortion)[0, 0]) == expected


def test_drawn_parts_follow_the_law():
    rng = np.random.default_rng(1)
    drawn = [draw_distortion(rng) for _ in range(20_000)]
    tolerance = 4 * 0.5 / len(drawn) ** 0.5
    for part, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        values = np.array([value for d in drawn if (value := getattr(d, part)) is not None])
        assert len(values) / len(drawn) == pytest.approx(0.5, abs=tolerance)
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / (12 * len(values)) ** 0.5)
    assert np.mean([d.contrast_first for d in drawn]) == pytest.approx(0.5, abs=tolerance)
