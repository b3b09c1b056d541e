"""Augments training images, with the exact laws and order of hszhao/semseg.

Training follows semseg's util/transform.py: scale, rotate, blur, mirror, pad, crop. The steps are folded into one
affine warp from the source image to the crop, so that only the crop's pixels are computed and the scaled image is
never made. The warp interpolates once where the step-by-step chain interpolates twice (scale, then rotate). What other
recipes need besides is off by default: a common size before the scale, crops of more than one class, and colours.
"""

import dataclasses
import math

import cv2
import numpy as np
from numpy.typing import NDArray

from psp_jax.data.photometric import Distortion, distort, draw_distortion

PIXEL_FILL = (124, 116, 104)  # RGB mean 255 * [.485, .456, .406], rounded: about zero once normalised
LABEL_FILL = 255
_BLUR_MARGIN = 2  # radius of the 5x5 kernel
_REDRAWS = 10

U8 = NDArray[np.uint8]
Size = tuple[int, int]  # (height, width) in pixels


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """The law that augmentations are drawn from (semseg's values for ADE20K and VOC2012).

    base_size: the size that the scale is a factor of; see `limited_size`. () is each image's own.
    max_class_share: crops of which one class has as much are drawn anew; see `redraw_crop`. 1 is off.
    photometric: whether brightness, contrast, saturation and hue vary; see `draw_distortion`.
    """

    scale_min: float = 0.5
    scale_max: float = 2.0
    rotate_degrees: float = 10.0
    rotate_probability: float = 0.5
    blur_probability: float = 0.5
    flip_probability: float = 0.5
    base_size: tuple[int, ...] = ()
    max_class_share: float = 1.0
    photometric: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.scale_min <= self.scale_max:
            raise ValueError(
                f"augment.scale_min {self.scale_min} and augment.scale_max {self.scale_max} must be 0 < min <= max."
            )
        for name in ("rotate_probability", "blur_probability", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; give a probability between 0 and 1.")
        if len(self.base_size) > 2 or any(side < 1 for side in self.base_size):
            raise ValueError(
                f"augment.base_size={self.base_size} must be (long side,) or (long, short) limits in pixels, or () for "
                "images of their own size."
            )
        if not 0 < self.max_class_share <= 1:
            raise ValueError(
                f"augment.max_class_share={self.max_class_share} must be above 0 and at most 1, where it is off."
            )


DEFAULT_SETTINGS = AugmentSettings()


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """One drawn augmentation.

    angle: degrees, positive is counter-clockwise, 0.0 if the image is not rotated.
    top, left: corner of the crop in the scaled (rotated, blurred, mirrored) canvas; negative where padding comes first.
    resized: (height, width) of the scaled image, each side by its own factor; None is `scale` for both.
    distortion: of the colours, if any; the padding stays as it is.
    """

    scale: float
    angle: float
    blur: bool
    flip: bool
    top: int
    left: int
    resized: Size | None = None
    distortion: Distortion | None = None


def scaled_size(size: Size, scale: float) -> Size:
    """Returns the canvas that cv2.resize(fx=scale, fy=scale) makes of an image: rounded half to even, at least 1."""
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def limited_size(size: Size, base_size: tuple[int, ...], scale: float) -> Size:
    """Returns the size of the same ratio, as large as base_size * scale allows, at least 1 pixel a side.

    base_size: (long side,), as in PyTorch-Encoding (whose draws also reach the largest side itself), or (long, short)
    limits, as in mmsegmentation's RandomResize. Both cut the limits to whole pixels and round the sides, halves up.
    """
    limits = [int(limit * scale) for limit in sorted(base_size, reverse=True)]
    sides = sorted(size, reverse=True)[: len(limits)]
    factor = min(limit / side for limit, side in zip(limits, sides, strict=True))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def augment(
    rng: np.random.Generator, image: U8, label: U8, crop_size: Size, settings: AugmentSettings
) -> tuple[U8, U8]:
    """Draws an augmentation for an image and its label and returns what `apply` makes of them."""
    drawn = draw(rng, (label.shape[0], label.shape[1]), crop_size, settings)
    if settings.max_class_share < 1:
        drawn = redraw_crop(rng, label, drawn, crop_size, settings.max_class_share)
    return apply(image, label, drawn, crop_size)


def draw(rng: np.random.Generator, image_size: Size, crop_size: Size, settings: AugmentSettings) -> Augmentation:
    """Draws one augmentation in semseg's order: scale, rotation, blur, mirror, crop offset.

    The scale is uniform (not log-uniform), the offsets are uniform and inclusive. A canvas smaller than the crop is
    padded on both sides, floor(padding / 2) before it. The colours come last.
    """
    scale = settings.scale_min + (settings.scale_max - settings.scale_min) * rng.random()
    rotated = rng.random() < settings.rotate_probability
    angle = settings.rotate_degrees * (2 * rng.random() - 1) if rotated else 0.0
    blur = bool(rng.random() < settings.blur_probability)
    flip = bool(rng.random() < settings.flip_probability)
    resized = limited_size(image_size, settings.base_size, scale) if settings.base_size else None
    top, left = _draw_corner(rng, resized or scaled_size(image_size, scale), crop_size)
    distortion = draw_distortion(rng) if settings.photometric else None
    return Augmentation(scale, angle, blur, flip, top, left, resized, distortion)


def redraw_crop(
    rng: np.random.Generator, label: U8, drawn: Augmentation, crop_size: Size, max_class_share: float
) -> Augmentation:
    """Draws the crop's corner anew, at most ten times, until it holds two classes, each with less than the share.

    label: u8[H, W]; pixels of 255 do not count. Source: mmsegmentation's RandomCrop with cat_max_ratio.
    """
    canvas, _ = _canvas_of((label.shape[0], label.shape[1]), drawn)
    for _ in range(_REDRAWS):
        top, left, bottom, right = _visible(drawn, canvas, crop_size)
        crop = _warp_label(label, drawn, (top, left), (bottom - top, right - left))
        counts = np.bincount(crop.ravel(), minlength=LABEL_FILL)[:LABEL_FILL]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_class_share:
            break
        top, left = _draw_corner(rng, canvas, crop_size)
        drawn = dataclasses.replace(drawn, top=top, left=left)
    return drawn


def _draw_corner(rng: np.random.Generator, canvas: Size, crop_size: Size) -> tuple[int, int]:
    """Draws (top, left) of a crop, uniform and inclusive."""
    offsets = []
    for length, crop in zip(canvas, crop_size, strict=True):
        padding = max(crop - length, 0)
        offsets.append(int(rng.integers(0, length + padding - crop, endpoint=True)) - padding // 2)
    return offsets[0], offsets[1]


def apply(image: U8, label: U8, augmentation: Augmentation, crop_size: Size) -> tuple[U8, U8]:
    """Returns the augmented crop: image u8[h, w, 3] and label u8[h, w], both contiguous.

    image: u8[H, W, 3] RGB, linear interpolation without antialiasing; outside of it comes PIXEL_FILL.
    label: u8[H, W], nearest: floor(i / scale) for the scale, rounding for the rotation; outside of it comes 255.
    """
    canvas, _ = _canvas_of((label.shape[0], label.shape[1]), augmentation)
    top, left, bottom, right = _visible(augmentation, canvas, crop_size)
    before = (top - augmentation.top, left - augmentation.left)
    after = (crop_size[0] - before[0] - (bottom - top), crop_size[1] - before[1] - (right - left))

    # The margin keeps the blur's own border away from the crop; at the canvas edge it is cut, so that the kernel
    # reflects there, and only there, as it does over the whole canvas.
    margin = _BLUR_MARGIN if augmentation.blur else 0
    box_top, box_left = max(top - margin, 0), max(left - margin, 0)
    box_bottom, box_right = min(bottom + margin, canvas[0]), min(right + margin, canvas[1])
    warped = _warp_image(image, augmentation, (box_top, box_left), (box_bottom - box_top, box_right - box_left))
    if augmentation.blur:
        warped = cv2.GaussianBlur(warped, (5, 5), 0, borderType=cv2.BORDER_REFLECT_101)  # sigma 0: [1, 4, 6, 4, 1] / 16
    warped = warped[top - box_top : bottom - box_top, left - box_left : right - box_left]
    if augmentation.distortion is not None:
        warped = distort(warped, augmentation.distortion)
    nearest = _warp_label(label, augmentation, (top, left), (bottom - top, right - left))
    return pad(warped, before, after, PIXEL_FILL), pad(nearest, before, after, (LABEL_FILL,))


def _canvas_of(size: Size, augmentation: Augmentation) -> tuple[Size, tuple[float, float]]:
    """Returns the size of the scaled image and its (vertical, horizontal) scale."""
    if augmentation.resized is None:
        return scaled_size(size, augmentation.scale), (augmentation.scale, augmentation.scale)
    height, width = augmentation.resized
    return (height, width), (height / size[0], width / size[1])


def _visible(augmentation: Augmentation, canvas: Size, crop_size: Size) -> tuple[int, int, int, int]:
    """Returns (top, left, bottom, right) of what the crop has of the canvas."""
    bottom = min(augmentation.top + crop_size[0], canvas[0])
    right = min(augmentation.left + crop_size[1], canvas[1])
    return max(augmentation.top, 0), max(augmentation.left, 0), bottom, right


def pad(content: np.ndarray, before: Size, after: Size, fill: tuple[int, ...]) -> U8:
    """Surrounds `content` with `fill`, into a new contiguous array."""
    padded = cv2.copyMakeBorder(
        content, before[0], after[0], before[1], after[1], borderType=cv2.BORDER_CONSTANT, value=fill
    )
    return np.asarray(padded, np.uint8)


def _canvas_to_scaled(augmentation: Augmentation, canvas: Size, corner: Size) -> NDArray[np.float64]:
    """Returns the 3x3 matrix from a pixel (x, y, 1) of the box at `corner` to the scaled, not yet rotated, canvas."""
    height, width = canvas
    to_canvas = np.array([[1.0, 0.0, corner[1]], [0.0, 1.0, corner[0]], [0.0, 0.0, 1.0]])
    if augmentation.flip:
        to_canvas = np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) @ to_canvas
    if not augmentation.angle:
        return to_canvas
    # About (w/2, h/2) as in semseg, half a pixel from the centre of the pixel grid.
    rotation = cv2.getRotationMatrix2D((width / 2, height / 2), augmentation.angle, 1.0)
    return np.vstack([cv2.invertAffineTransform(rotation), [0.0, 0.0, 1.0]]) @ to_canvas


def _warp_image(image: U8, augmentation: Augmentation, corner: Size, size: Size) -> np.ndarray:
    """Computes the box of the scaled, rotated, mirrored canvas in one linear warp of the source image: u8[h, w, 3]."""
    canvas, scales = _canvas_of((image.shape[0], image.shape[1]), augmentation)
    down, right = 1.0 / scales[0], 1.0 / scales[1]
    to_source = np.array([[right, 0.0, 0.5 * right - 0.5], [0.0, down, 0.5 * down - 0.5], [0.0, 0.0, 1.0]])
    matrix = (to_source @ _canvas_to_scaled(augmentation, canvas, corner))[:2]
    # A scaled image repeats its edge pixels (as cv2.resize does), a rotated one fades into the fill. With a fourth
    # channel the warp gives the same numbers in half the time.
    warped = cv2.warpAffine(
        cv2.cvtColor(image, cv2.COLOR_RGB2RGBA),
        matrix,
        (size[1], size[0]),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT if augmentation.angle else cv2.BORDER_REPLICATE,
        borderValue=PIXEL_FILL,
    )
    return np.asarray(cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB))


def _warp_label(label: U8, augmentation: Augmentation, corner: Size, size: Size) -> np.ndarray:
    """Computes the box of the canvas for the labels, bit by bit as two nearest steps do: u8[h, w].

    floor(round(x) / scale) is no affine law, so the scale is a table look-up, only for what the box can see.
    """
    canvas, scales = _canvas_of((label.shape[0], label.shape[1]), augmentation)
    matrix = _canvas_to_scaled(augmentation, canvas, corner)
    corners = matrix[:2] @ np.array([[0, size[1] - 1, 0, size[1] - 1], [0, 0, size[0] - 1, size[0] - 1], [1, 1, 1, 1]])
    # Clamped to hold a pixel at least: a small crop in a corner may see nothing but fill after the rotation.
    left, top = (
        min(max(math.floor(value), 0), length - 1)
        for value, length in zip(corners.min(axis=1), (canvas[1], canvas[0]), strict=True)
    )
    right = max(min(math.ceil(corners[0].max()) + 1, canvas[1]), left + 1)
    bottom = max(min(math.ceil(corners[1].max()) + 1, canvas[0]), top + 1)
    rows = np.minimum(np.arange(top, bottom) * (1.0 / scales[0]), label.shape[0] - 1).astype(np.intp)
    columns = np.minimum(np.arange(left, right) * (1.0 / scales[1]), label.shape[1] - 1).astype(np.intp)
    if augmentation.flip and not augmentation.angle:
        columns = columns[::-1]
    scaled = label[rows].take(columns, axis=1)
    if not augmentation.angle:
        return scaled
    matrix[:2, 2] -= left, top
    return cv2.warpAffine(
        scaled,
        matrix[:2],
        (size[1], size[0]),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(LABEL_FILL,),
    )
