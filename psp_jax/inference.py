"""From images of any size to labels of the same size, with a fixed number of compiled shapes.

Every image is resized, keeping its ratio, into one canvas (the host's work), runs through the network once, and its
class scores are read off at the original resolution tile by tile: a tile's pixels are linear combinations of the
feature map's positions, with weights computed at run time, so that no image size needs a compile of its own and no
full-resolution score map is ever stored.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from psp_jax.data.transforms import fit_image
from psp_jax.interpolation import resize_weights, weights_at
from psp_jax.metrics import confusion_matrix
from psp_jax.train_step import normalize

Array = jax.Array
Variables = dict[str, Any]

# Rows and columns of the piece of a label map that is worked on at a time.
TILE = 128


def make_forward(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Variables, Array], Array]:
    """Return the function (variables, image u8 or raw f32 [B, H, W, 3]) -> class scores f32 [B, h, w, C]."""

    def forward(variables: Variables, image: Array) -> Array:
        outputs: Any = model.apply(variables, normalize(image, mean, std), train=False)
        return outputs["logits"]

    return forward


def _axis_weights(
    origin: Array, size: Array, valid: Array, canvas: int, features: int, align_corners: bool, tile: int
) -> Array:
    """Weights f32 [B, tile, features] that read a feature axis at pixels origin .. origin + tile - 1.

    An original axis of `size` [B] pixels was resized, half-pixel, to the first `valid` [B] pixels of the canvas, and
    the canvas to `features` positions; both steps are linear, so their matrices are multiplied.
    """
    pixels = origin + jnp.arange(tile, dtype=jnp.float32)
    ratio = (valid / size).astype(jnp.float32)[:, None]
    positions = jnp.clip((pixels + 0.5) * ratio - 0.5, 0.0, (valid - 1.0)[:, None])
    upsample = jnp.asarray(resize_weights(canvas, features, align_corners))
    return jnp.matmul(weights_at(positions, canvas), upsample, precision=lax.Precision.HIGHEST)


def tile_labels(
    scores: Array,
    origin: tuple[Array, Array],
    size: Array,
    valid: Array,
    *,
    canvas: tuple[int, int],
    align_corners: bool,
    tile: int = TILE,
) -> Array:
    """Label one tile of each image at its original resolution: i32 [B, tile, tile].

    Args:
      scores: f32 [B, h, w, C], the network's output for the canvas.
      origin: (y, x) of the tile's first pixel, scalars.
      size: i32 [B, 2], original (height, width); what lies beyond it repeats the edge and means nothing.
      valid: i32 [B, 2], (height, width) of the resized image inside the canvas.
      canvas: (height, width) of the network's input.
      align_corners: how the scores are upsampled to the canvas.
      tile: rows and columns of a tile.
    """
    rows, columns = (
        _axis_weights(origin[i], size[:, i], valid[:, i], canvas[i], scores.shape[1 + i], align_corners, tile)
        for i in range(2)
    )
    strip = jnp.einsum("bth,bhwc->btwc", rows, scores, precision=lax.Precision.HIGHEST)
    return jnp.einsum("buw,btwc->btuc", columns, strip, precision=lax.Precision.HIGHEST).argmax(-1)


def make_eval_step(
    forward: Callable[[Variables, Array], Array],
    *,
    num_classes: int,
    canvas: tuple[int, int],
    align_corners: bool,
    tile: int = TILE,
) -> Callable[[Variables, dict[str, Array]], Array]:
    """Return the function (variables, batch) -> confusion matrix i32 [C, C] of the batch, row = label.

    The batch is what `data.pipeline.eval_batches` yields: label [B, Hm, Wm] with Hm and Wm multiples of `tile`; its
    padding is void and counts nowhere. As many tiles are computed as the largest image of the batch needs.
    """

    def eval_step(variables: Variables, batch: dict[str, Array]) -> Array:
        scores = forward(variables, batch["image"])
        size, valid, label = batch["size"], batch["valid"], batch["label"]
        rows, columns = ((size[:, i].max() + tile - 1) // tile for i in range(2))

        # Image by image until the end, so that devices which share the batch exchange counts once, not for every tile.
        count_image = jax.vmap(functools.partial(confusion_matrix, num_classes=num_classes))

        def count(index: Array, total: Array) -> Array:
            origin = (tile * (index // columns), tile * (index % columns))
            labels = tile_labels(scores, origin, size, valid, canvas=canvas, align_corners=align_corners, tile=tile)
            truth = lax.dynamic_slice(label, (0, *origin), (label.shape[0], tile, tile))
            return total + count_image(truth, labels)

        zeros = jnp.zeros((label.shape[0], num_classes, num_classes), jnp.int32)
        return lax.fori_loop(0, rows * columns, count, zeros).sum(0)

    return eval_step


def count_split(
    eval_step: Callable[[Variables, dict[str, Array]], Array],
    variables: Variables,
    batches: Iterable[dict[str, np.ndarray]],
    to_device: Callable[[dict[str, np.ndarray]], dict[str, Array]],
) -> np.ndarray:
    """Sum the confusion matrices of a whole split: i64 [C, C], the same on every process."""
    total: np.ndarray | int = 0
    pending: Array | None = None
    for batch in batches:
        counts = eval_step(variables, to_device({k: v for k, v in batch.items() if k != "index"}))
        if pending is not None:  # read the batch before, so that the device is never waited for
            total = total + np.asarray(pending, np.int64)
        pending = counts
    if pending is None:
        raise ValueError("The evaluation split holds no image.")
    return np.asarray(total + np.asarray(pending, np.int64))


def make_labeler(
    forward: Callable[[Variables, Array], Array], *, canvas: tuple[int, int], align_corners: bool, tile: int = TILE
) -> Callable[[Variables, np.ndarray], np.ndarray]:
    """Return the function (variables, image u8 [H, W, 3]) -> labels u8 [H, W]; it compiles twice, for any sizes."""
    jit_forward = jax.jit(forward)
    jit_tile = jax.jit(
        lambda scores, origin, size, valid: tile_labels(
            scores, origin, size, valid, canvas=canvas, align_corners=align_corners, tile=tile
        ).astype(jnp.uint8)
    )

    def label(variables: Variables, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        fitted, valid = fit_image(image, canvas)
        scores = jit_forward(variables, fitted[None])
        size = np.array([[height, width]], np.int32)
        inside = np.array([valid], np.int32)
        labels = np.empty((height, width), np.uint8)
        for y, x in _tile_origins(height, width, tile):
            piece = np.asarray(jit_tile(scores, (np.int32(y), np.int32(x)), size, inside))[0]
            labels[y : y + tile, x : x + tile] = piece[: height - y, : width - x]
        return labels

    return label


def _tile_origins(height: int, width: int, tile: int) -> Iterator[tuple[int, int]]:
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            yield y, x
