"""Random brightness, contrast, saturation and hue, by the law of mmsegmentation's PhotoMetricDistortion."""

import dataclasses

import cv2
import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]

_LEVELS = np.arange(256, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Distortion:
    """One drawn distortion; None leaves its part out.

    brightness: what is added to the grey levels.
    contrast, saturation: factors of the grey levels and of the saturation.
    hue: what is added to the hue, in OpenCV's units of two degrees.
    contrast_first: whether the contrast comes before saturation and hue, or after them.
    """

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: int | None = None
    contrast_first: bool = True


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draws each part with probability 1/2, uniformly from its range, and the place of the contrast."""

    def half() -> bool:
        return bool(rng.random() < 0.5)

    return Distortion(
        brightness=rng.uniform(-32, 32) if half() else None,
        contrast=rng.uniform(0.5, 1.5) if half() else None,
        saturation=rng.uniform(0.5, 1.5) if half() else None,
        hue=int(rng.integers(-18, 18)) if half() else None,  # 18 itself is left out there too
        contrast_first=half(),
    )


def distort(image: U8, distortion: Distortion) -> U8:
    """Returns an image u8[H, W, 3] RGB with the parts in order; each ends in u8, cut and not rounded, as there."""
    contrast = None if distortion.contrast is None else _table(distortion.contrast, 0.0)
    if distortion.brightness is not None:
        image = _look_up(image, _table(1.0, distortion.brightness))
    if contrast is not None and distortion.contrast_first:
        image = _look_up(image, contrast)
    if distortion.saturation is not None:
        image = _in_hsv(image, 1, _table(distortion.saturation, 0.0))
    if distortion.hue is not None:
        image = _in_hsv(image, 0, ((np.arange(256) + distortion.hue) % 180).astype(np.uint8))
    if contrast is not None and not distortion.contrast_first:
        image = _look_up(image, contrast)
    return image


def _table(factor: float, offset: float) -> U8:
    """Returns u8[256], what becomes of each level."""
    return np.clip(_LEVELS * factor + offset, 0, 255).astype(np.uint8)


def _look_up(image: U8, table: U8) -> U8:
    return np.asarray(cv2.LUT(image, table), np.uint8)


def _in_hsv(image: U8, channel: int, table: U8) -> U8:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = table[hsv[..., channel]]
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
