"""From images of any size to labels of the same size, with a fixed number of compiled shapes.

Every image is resized, keeping its ratio, into one canvas (the host's work), runs through the network once, and its
class scores are read off at the original resolution tile by tile: a tile's pixels are linear combinations of the
feature map's positions, with weights computed at run time, so that no image size needs a compile of its own and no
full-resolution score map is ever stored.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding

from psp_jax import parallel
from psp_jax.data.fitting import fit_image
from psp_jax.data.transforms import PIXEL_FILL
from psp_jax.interpolation import resize_weights, weights_at
from psp_jax.metrics import confusion_matrix
from psp_jax.train_step import normalize

Array = jax.Array
Variables = dict[str, Any]
# (variables, images u8 [H, W, 3]) -> for each image its labels u8 [H, W] and their probabilities u8 [H, W], 255 = 1.
Labeler = Callable[[Variables, Sequence[np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]

# Rows and columns of the piece of a label map that is worked on at a time.
TILE = 128


def make_forward(model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[..., Array]:
    """Return the function (variables, image u8 or raw f32 [B, H, W, 3], valid=None) -> class scores f32 [B, h, w, C].

    `valid` i32 [B, 2] says that only the first (height, width) of each image are real, and the rest of the mean colour.
    """

    def forward(variables: Variables, image: Array, valid: Array | None = None) -> Array:
        outputs: Any = model.apply(variables, normalize(image, mean, std), train=False, valid=valid)
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


def tile_scores(
    scores: Array,
    origin: tuple[Array, Array],
    size: Array,
    valid: Array,
    *,
    canvas: tuple[int, int],
    align_corners: bool,
    tile: int = TILE,
) -> Array:
    """Read the class scores of one tile of each image at its original resolution: f32 [B, tile, tile, C].

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
    return jnp.einsum("buw,btwc->btuc", columns, strip, precision=lax.Precision.HIGHEST)


def make_eval_step(
    forward: Callable[[Variables, Array], Array],
    *,
    num_classes: int,
    canvas: tuple[int, int],
    align_corners: bool,
    tile: int = TILE,
) -> Callable[[Variables, dict[str, Array]], dict[str, Array]]:
    """Return the function (variables, batch) -> counts.

    The batch is what `data.pipeline.eval_batches` yields: label [B, Hm, Wm] with Hm and Wm multiples of `tile`; its
    padding is void and counts nowhere. As many tiles are computed as the largest image of the batch needs.
    The counts are what `count_parts` makes of each image's confusion matrix, labels u8 [B, Hm, Wm], and the index.
    """

    def eval_step(variables: Variables, batch: dict[str, Array]) -> dict[str, Array]:
        scores = forward(variables, batch["image"])
        size, valid, label = batch["size"], batch["valid"], batch["label"]
        rows, columns = ((size[:, i].max() + tile - 1) // tile for i in range(2))

        # Image by image until the end, so that devices which share the batch exchange counts once, not for every tile.
        count_image = jax.vmap(functools.partial(confusion_matrix, num_classes=num_classes))

        def count(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            confusion, labels = state
            origin = (tile * (index // columns), tile * (index % columns))
            pieces = tile_scores(scores, origin, size, valid, canvas=canvas, align_corners=align_corners, tile=tile)
            found = pieces.argmax(-1)
            truth = lax.dynamic_slice(label, (0, *origin), found.shape)
            labels = lax.dynamic_update_slice(labels, found.astype(jnp.uint8), (0, *origin))
            return confusion + count_image(truth, found), labels

        zeros = jnp.zeros((label.shape[0], num_classes, num_classes), jnp.int32)
        confusion, labels = lax.fori_loop(0, rows * columns, count, (zeros, jnp.zeros_like(label)))
        return count_parts(confusion) | {"labels": labels, "index": batch["index"]}

    return eval_step


def counted(
    step: Callable[[Variables, dict[str, Array]], dict[str, Array]], mesh: Mesh, sharding: NamedSharding
) -> Any:
    """Jit a function (variables, batch) -> counts: every device gets the counts, label maps stay, in `sharding`."""
    everywhere = dict.fromkeys(("confusion", "images", "index"), parallel.replicated(mesh))
    return jax.jit(step, out_shardings=everywhere | {"labels": sharding})


def count_parts(confusion: Array) -> dict[str, Array]:
    """Return, of the confusion matrices i32 [B, C, C] of B images, row = label, what an evaluation keeps.

    Returns:
      confusion: i32 [2, C, C], the sums of the upper and of the lower 16 bits; no number of images overflows them.
      images: i32 [B, 3, C], hits, labelled and predicted pixels of each image and class.
    """
    hits = jnp.diagonal(confusion, axis1=1, axis2=2)
    halves = jnp.stack([(confusion >> 16).sum(0), (confusion & 0xFFFF).sum(0)])
    return {"confusion": halves, "images": jnp.stack([hits, confusion.sum(2), confusion.sum(1)], 1)}


def join_halves(confusion: np.ndarray) -> np.ndarray:
    """Return the confusion matrix i64 [C, C] of the halves i32 [2, C, C] of `count_parts`."""
    upper, lower = confusion.astype(np.int64)
    return (upper << 16) + lower


def make_labeler(
    forward: Callable[[Variables, Array], Array],
    *,
    canvas: tuple[int, int],
    align_corners: bool,
    batch: int = 1,
    tile: int = TILE,
) -> Labeler:
    """Return the labeler that resizes each image into the canvas and runs it once; two compiles, for any sizes.

    `batch` images share a forward pass; where fewer are left, empty canvases fill it.
    """
    jit_forward = jax.jit(forward)

    @jax.jit
    def label_tile(scores: Array, index: Array, origin: tuple[Array, Array], size: Array, valid: Array) -> Array:
        one = lax.dynamic_slice_in_dim(scores, index, 1)
        pieces = tile_scores(one, origin, size, valid, canvas=canvas, align_corners=align_corners, tile=tile)[0]
        return labels_and_confidence(pieces, jax.nn.softmax(pieces))

    def label(variables: Variables, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        results = []
        for start in range(0, len(images), batch):
            group = images[start : start + batch]
            fitted = np.full((batch, *canvas, 3), PIXEL_FILL, np.uint8)
            valid = np.ones((batch, 1, 2), np.int32)
            for k, image in enumerate(group):
                fitted[k], valid[k] = fit_image(image, canvas)
            scores = jit_forward(variables, fitted)
            for k, image in enumerate(group):
                size = np.array([image.shape[:2]], np.int32)
                on_tile = functools.partial(label_tile, scores, np.int32(k), size=size, valid=valid[k])
                results.append(join_tiles(image.shape[0], image.shape[1], tile, on_tile))
        return results

    return label


def labels_and_confidence(scores: Array, probabilities: Array, axis: int = -1) -> Array:
    """Stack the best class along `axis` and its probability, 255 = 1: [H, W, C] -> u8 [2, H, W]."""
    return jnp.stack([scores.argmax(axis), jnp.round(255 * probabilities.max(axis))]).astype(jnp.uint8)


def join_tiles(
    height: int, width: int, tile: int, label_tile: Callable[[tuple[np.int32, np.int32]], Array]
) -> tuple[np.ndarray, np.ndarray]:
    """Make labels and confidence u8 [height, width] of the tiles u8 [2, tile, tile] at origins (y, x)."""
    maps = np.empty((2, height, width), np.uint8)
    for y in range(0, height, tile):
        # Read by rows: the device works on the whole row before it is waited for.
        row = [label_tile((np.int32(y), np.int32(x))) for x in range(0, width, tile)]
        for x, piece in zip(range(0, width, tile), jax.device_get(row), strict=True):
            maps[:, y : y + tile, x : x + tile] = piece[:, : height - y, : width - x]
    return maps[0], maps[1]
