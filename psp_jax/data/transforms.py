"""Augments training images and fits evaluation images, with the exact laws and order of hszhao/semseg.

Training follows semseg's util/transform.py: scale, rotate, blur, mirror, pad, crop. The steps are folded into one
affine warp from the source image to the crop, so that only the crop's pixels are computed and the scaled image is
never made. The warp interpolates once where the step-by-step chain interpolates twice (scale, then rotate).
"""

import dataclasses
import math

import cv2
import numpy as np
from numpy.typing import NDArray

PIXEL_FILL = (124, 116, 104)  # RGB mean 255 * [.485, .456, .406], rounded: about zero once normalised
LABEL_FILL = 255
_BLUR_MARGIN = 2  # radius of the 5x5 kernel

U8 = NDArray[np.uint8]
Size = tuple[int, int]  # (height, width) in pixels


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """The law that augmentations are drawn from (semseg's values for ADE20K and VOC2012)."""

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


DEFAULT_SETTINGS = AugmentSettings()


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """One drawn augmentation.

    angle: degrees, positive is counter-clockwise, 0.0 if the image is not rotated.
    top, left: corner of the crop in the scaled (rotated, blurred, mirrored) canvas; negative where padding comes first.
    """

    scale: float
    angle: float
    blur: bool
    flip: bool
    top: int
    left: int


def scaled_size(size: Size, scale: float) -> Size:
    """Returns the canvas that cv2.resize(fx=scale, fy=scale) makes of an image: rounded half to even, at least 1."""
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def draw(rng: np.random.Generator, image_size: Size, crop_size: Size, settings: AugmentSettings) -> Augmentation:
    """Draws one augmentation in semseg's order: scale, rotation, blur, mirror, crop offset.

    The scale is uniform (not log-uniform), the offsets are uniform and inclusive. A canvas smaller than the crop is
    padded on both sides, floor(padding / 2) before it.
    """
    scale = settings.scale_min + (settings.scale_max - settings.scale_min) * rng.random()
    rotated = rng.random() < settings.rotate_probability
    angle = settings.rotate_degrees * (2 * rng.random() - 1) if rotated else 0.0
    blur = bool(rng.random() < settings.blur_probability)
    flip = bool(rng.random() < settings.flip_probability)
    offsets = []
    for canvas, crop in zip(scaled_size(image_size, scale), crop_size, strict=True):
        padding = max(crop - canvas, 0)
        offsets.append(int(rng.integers(0, canvas + padding - crop, endpoint=True)) - padding // 2)
    return Augmentation(scale, angle, blur, flip, top=offsets[0], left=offsets[1])


def apply(image: U8, label: U8, augmentation: Augmentation, crop_size: Size) -> tuple[U8, U8]:
    """Returns the augmented crop: image u8[h, w, 3] and label u8[h, w], both contiguous.

    image: u8[H, W, 3] RGB, linear interpolation without antialiasing; outside of it comes PIXEL_FILL.
    label: u8[H, W], nearest: floor(i / scale) for the scale, rounding for the rotation; outside of it comes 255.
    """
    canvas = scaled_size((label.shape[0], label.shape[1]), augmentation.scale)
    top, left = max(augmentation.top, 0), max(augmentation.left, 0)
    bottom = min(augmentation.top + crop_size[0], canvas[0])
    right = min(augmentation.left + crop_size[1], canvas[1])
    before = (top - augmentation.top, left - augmentation.left)
    after = (crop_size[0] - before[0] - (bottom - top), crop_size[1] - before[1] - (right - left))

    # The margin keeps the blur's own border away from the crop; at the canvas edge it is cut, so that the kernel
    # reflects there, and only there, as it does over the whole canvas.
    margin = _BLUR_MARGIN if augmentation.blur else 0
    box_top, box_left = max(top - margin, 0), max(left - margin, 0)
    box_bottom, box_right = min(bottom + margin, canvas[0]), min(right + margin, canvas[1])
    warped = _warp_image(image, augmentation, canvas, (box_top, box_left), (box_bottom - box_top, box_right - box_left))
    if augmentation.blur:
        warped = cv2.GaussianBlur(warped, (5, 5), 0, borderType=cv2.BORDER_REFLECT_101)  # sigma 0: [1, 4, 6, 4, 1] / 16
    warped = warped[top - box_top : bottom - box_top, left - box_left : right - box_left]
    nearest = _warp_label(label, augmentation, canvas, (top, left), (bottom - top, right - left))
    return _pad(warped, before, after, PIXEL_FILL), _pad(nearest, before, after, (LABEL_FILL,))


def _pad(content: np.ndarray, before: Size, after: Size, fill: tuple[int, ...]) -> U8:
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


def _warp_image(image: U8, augmentation: Augmentation, canvas: Size, corner: Size, size: Size) -> np.ndarray:
    """Computes the box of the scaled, rotated, mirrored canvas in one linear warp of the source image: u8[h, w, 3]."""
    inverse = 1.0 / augmentation.scale
    half_pixel = 0.5 * inverse - 0.5
    to_source = np.array([[inverse, 0.0, half_pixel], [0.0, inverse, half_pixel], [0.0, 0.0, 1.0]])
    matrix = (to_source @ _canvas_to_scaled(augmentation, canvas, corner))[:2]
    # A scaled image repeats its edge pixels (as cv2.resize does), a rotated one fades into the fill.
    return cv2.warpAffine(
        image,
        matrix,
        (size[1], size[0]),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT if augmentation.angle else cv2.BORDER_REPLICATE,
        borderValue=PIXEL_FILL,
    )


def _warp_label(label: U8, augmentation: Augmentation, canvas: Size, corner: Size, size: Size) -> np.ndarray:
    """Computes the box of the canvas for the labels, bit by bit as two nearest steps do: u8[h, w].

    floor(round(x) / scale) is no affine law, so the scale is a table look-up, only for what the box can see.
    """
    matrix = _canvas_to_scaled(augmentation, canvas, corner)
    corners = matrix[:2] @ np.array([[0, size[1] - 1, 0, size[1] - 1], [0, 0, size[0] - 1, size[0] - 1], [1, 1, 1, 1]])
    # Clamped to hold a pixel at least: a small crop in a corner may see nothing but fill after the rotation.
    left, top = (
        min(max(math.floor(value), 0), length - 1)
        for value, length in zip(corners.min(axis=1), (canvas[1], canvas[0]), strict=True)
    )
    right = max(min(math.ceil(corners[0].max()) + 1, canvas[1]), left + 1)
    bottom = max(min(math.ceil(corners[1].max()) + 1, canvas[0]), top + 1)
    rows = np.minimum(np.arange(top, bottom) * (1.0 / augmentation.scale), label.shape[0] - 1).astype(np.intp)
    columns = np.minimum(np.arange(left, right) * (1.0 / augmentation.scale), label.shape[1] - 1).astype(np.intp)
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


def fitted_size(size: Size, canvas: Size) -> Size:
    """Returns the largest size of the same ratio that fits the canvas, rounded, at least 1 pixel.

    On a square canvas this is semseg's long-side rule (tool/test.py), which also enlarges small images.
    """
    (height, width), (canvas_height, canvas_width) = size, canvas
    if height * canvas_width > width * canvas_height:
        return canvas_height, max(round(canvas_height / height * width), 1)
    return max(round(canvas_width / width * height), 1), canvas_width


def fit_image(image: U8, canvas: Size) -> tuple[U8, Size]:
    """Resizes an image u8[H, W, 3] (cv2 linear) into a canvas (Hc, Wc).

    Returns u8[Hc, Wc, 3] with the content at the top left and PIXEL_FILL around it, and the content's (h, w).
    """
    valid = fitted_size((image.shape[0], image.shape[1]), canvas)
    resized = cv2.resize(image, (valid[1], valid[0]), interpolation=cv2.INTER_LINEAR)
    return _pad(resized, (0, 0), (canvas[0] - valid[0], canvas[1] - valid[1]), PIXEL_FILL), valid


def fit(image: U8, label: U8, canvas: Size | None, label_size: Size) -> dict[str, np.ndarray]:
    """Fits one evaluation example to fixed shapes, without touching the label's resolution.

    image: u8[H, W, 3]; label: u8[H, W]; canvas: (Hc, Wc); label_size: (Hm, Wm), at least (H, W).
    Returns image u8[Hc, Wc, 3] resized (cv2 linear) with the content at the top left, the rest PIXEL_FILL;
    valid i32[2] (h, w) of that content; label u8[Hm, Wm] at the top left, the rest 255; size i32[2] original (H, W).
    Without a canvas the image keeps its size, image u8[Hm, Wm, 3], and there is no `valid`.
    """
    size = label.shape[0], label.shape[1]
    if size[0] > label_size[0] or size[1] > label_size[1]:
        raise ValueError(
            f"The label is {size[0]}x{size[1]} pixels, more than the {label_size[0]}x{label_size[1]} that its split"
            " announces; prepare the data set again."
        )
    after = (label_size[0] - size[0], label_size[1] - size[1])
    example: dict[str, np.ndarray] = {
        "label": _pad(label, (0, 0), after, (LABEL_FILL,)),
        "size": np.array(size, np.int32),
    }
    if canvas is None:
        return example | {"image": _pad(image, (0, 0), after, PIXEL_FILL)}
    fitted, valid = fit_image(image, canvas)
    return example | {"image": fitted, "valid": np.array(valid, np.int32)}
