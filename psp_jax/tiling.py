"""Labels images that are far larger than the network's window, at their own resolution, in bounded memory.

Windows of the training crop's size overlap by a third or more and run in batches of one shape. Only the scores of the
rows of windows at hand are kept, at the network's low resolution; each tile of the label map upsamples the windows that
touch it and averages their probabilities, with weights that rise from a window's edge over the overlap.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from psp_jax.data.transforms import PIXEL_FILL
from psp_jax.inference import TILE, Labeler, Variables, join_tiles, labels_and_confidence
from psp_jax.interpolation import resize_weights

Array = jax.Array
Scores = dict[tuple[int, int], tuple[Array, int]]  # (row, column) of a window -> scores [B, h, w, C], index in them


def make_tile_labeler(
    forward: Callable[[Variables, Array], Array],
    *,
    window: tuple[int, int],
    align_corners: bool,
    batch: int = 1,
    tile: int = TILE,
) -> Labeler:
    """Return the labeler that covers each image with windows; its compiles do not depend on the images' sizes.

    Args:
      forward: see `inference.make_forward`.
      window: (height, width) of the network's input; a smaller image is padded with the mean colour.
      align_corners: how the scores are upsampled to the window.
      batch: windows that run at a time.
      tile: rows and columns of the piece of the label map that is worked on at a time.
    """
    jit_forward = jax.jit(forward)
    decide = jax.jit(lambda total: labels_and_confidence(total, total, axis=0))

    @jax.jit
    def add_window(total: Array, scores: Array, index: Array, pixels: list[Array], weights: list[Array]) -> Array:
        rows, columns = (
            jnp.asarray(resize_weights(window[i], scores.shape[1 + i], align_corners))[pixels[i]] for i in range(2)
        )
        # Classes first: on a CPU half the time for 150 classes.
        strip = jnp.einsum("th,hwc->ctw", rows, scores[index], precision=lax.Precision.HIGHEST)
        pieces = jnp.einsum("uw,ctw->ctu", columns, strip, precision=lax.Precision.HIGHEST)
        return total + weights[0][:, None] * weights[1] * jax.nn.softmax(pieces, axis=0)

    def label(variables: Variables, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tops, lefts = (window_origins(image.shape[i], window[i]) for i in range(2))
        scored = _score_windows(lambda windows: jit_forward(variables, windows), image, tops, lefts, window, batch)
        kept: Scores = {}

        def label_tile(origin: tuple[np.int32, np.int32]) -> Array:
            rows = _touching(tops, window[0], image.shape[0], int(origin[0]), tile)
            columns = _touching(lefts, window[1], image.shape[1], int(origin[1]), tile)
            for passed in [key for key in kept if key[0] < min(rows)]:
                del kept[passed]
            while (max(rows), max(columns)) not in kept:
                kept.update(next(scored))
            classes = next(iter(kept.values()))[0].shape[-1]
            total = jnp.zeros((classes, tile, tile))
            for i, (row_pixels, row_weights) in rows.items():
                for j, (column_pixels, column_weights) in columns.items():
                    pixels, weights = [row_pixels, column_pixels], [row_weights, column_weights]
                    total = add_window(total, *kept[i, j], pixels, weights)
            return decide(total)

        return join_tiles(image.shape[0], image.shape[1], tile, label_tile)

    return lambda variables, images: [label(variables, image) for image in images]


def window_origins(length: int, window: int) -> np.ndarray:
    """Return the first pixels i64 [n] of the fewest windows that cover `length` evenly, a third or more in common."""
    stride = window - -(-window // 3)
    count = 1 + max(0, -((window - length) // stride))
    return np.linspace(0, max(0, length - window), count).round().astype(np.int64)


def _score_windows(
    run: Callable[[np.ndarray], Array],
    image: np.ndarray,
    tops: np.ndarray,
    lefts: np.ndarray,
    window: tuple[int, int],
    batch: int,
) -> Iterator[Scores]:
    """Yield the scores of the image's windows, a batch at a time, row by row of windows."""
    places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
    for start in range(0, len(places), batch):
        group = places[start : start + batch]
        windows = np.full((batch, *window, 3), PIXEL_FILL, np.uint8)
        for k, (i, j) in enumerate(group):
            part = image[tops[i] : tops[i] + window[0], lefts[j] : lefts[j] + window[1]]
            windows[k, : part.shape[0], : part.shape[1]] = part
        scores = run(windows)
        yield {place: (scores, k) for k, place in enumerate(group)}


def _touching(
    origins: np.ndarray, window: int, length: int, start: int, tile: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Find the windows of an axis that touch the pixels start .. start + tile - 1.

    Returns {window: (those pixels inside the window i32 [tile], clamped, and the window's weight there f32 [tile])};
    the weights of all windows sum to 1 at each pixel. What lies beyond `length` repeats the last pixel.
    """
    inside = np.minimum(np.arange(start, start + tile), length - 1) - origins[:, None]
    overlap = window - np.diff(origins)
    # Half a pixel of overlap gives the outer edges of the first and the last window full weight.
    before, after = np.concatenate([[0.5], overlap]), np.concatenate([overlap, [0.5]])
    rise, fall = (inside + 0.5) / before[:, None], (window - inside - 0.5) / after[:, None]
    weights = np.clip(np.minimum(rise, fall), 0.0, 1.0)
    weights = (weights / weights.sum(0)).astype(np.float32)
    pixels = np.clip(inside, 0, window - 1).astype(np.int32)
    return {int(i): (pixels[i], weights[i]) for i in np.flatnonzero(weights.any(1))}
