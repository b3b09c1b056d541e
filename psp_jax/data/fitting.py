"""Fits evaluation images into shapes that compiled programs share, by the resize of hszhao/semseg's tool/test.py."""

import cv2
import numpy as np

from psp_jax.data.transforms import LABEL_FILL, PIXEL_FILL, U8, Size, pad


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
    return pad(resized, (0, 0), (canvas[0] - valid[0], canvas[1] - valid[1]), PIXEL_FILL), valid


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
        "label": pad(label, (0, 0), after, (LABEL_FILL,)),
        "size": np.array(size, np.int32),
    }
    if canvas is None:
        return example | {"image": pad(image, (0, 0), after, PIXEL_FILL)}
    fitted, valid = fit_image(image, canvas)
    return example | {"image": fitted, "valid": np.array(valid, np.int32)}
