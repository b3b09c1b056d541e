"""Sliding-window scoring on the device: windows, scales and mirror images of any image with one compiled network.

Cutting a resized window out of an image, and reading a score at an original pixel, are linear in the pixels with
weights that depend on run-time integers alone. So images of every size share one program, and neither resized images
nor probabilities ever leave the device.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from psp_jax.inference import TILE, Labeler, Variables, count_parts, join_tiles, labels_and_confidence
from psp_jax.metrics import confusion_matrix
from psp_jax.protocols import Layout, Protocol, layout, plan
from psp_jax.workdir import ModelCard

Array = jax.Array
Plan = dict[str, Array]
Batch = dict[str, Array]


def _taps(numerator: Array, denominator: Array | int, length: Array | int) -> tuple[Array, Array]:
    """Return (lower sample i32, share of the next one f32) for the position numerator / denominator, clamped.

    Integers keep positions exact at any length; in float32 they would be off by 1e-4 of a pixel at 2,000 pixels.
    """
    lower = jnp.floor_divide(numerator, denominator)
    share = (numerator - lower * denominator).astype(jnp.float32) / denominator
    last = length - 1
    share = jnp.where((lower < 0) | (lower >= last), 0.0, share)
    return jnp.clip(lower, 0, last), share


def _resize_taps(pixel: Array, n_out: Array, n_in: Array, align_corners: bool) -> tuple[Array, Array]:
    """Return the taps in a signal of `n_in` samples for pixels of its resize to `n_out`."""
    if align_corners:
        return _taps(pixel * (n_in - 1), jnp.maximum(n_out - 1, 1), n_in)
    return _taps((2 * pixel + 1) * n_in - n_out, 2 * n_out, n_in)


def _matrix(taps: tuple[Array, Array], length: int) -> Array:
    """Turn taps [...] into interpolation weights f32 [..., length]."""
    lower, share = (part[..., None] for part in taps)
    samples = jnp.arange(length)
    return jnp.where(samples == lower, 1.0 - share, 0.0) + jnp.where(samples == lower + 1, share, 0.0)


@dataclass(frozen=True, eq=False)
class SlidingScorer:
    """The parts of scoring one image, all with static shapes.

    Attributes:
      forward: what `inference.make_forward` returns.
      protocol: what is done.
      shapes: canvases and number of windows that hold every image.
      mean: colour of the padding, RGB on the 0..255 scale.
      num_classes: C.
      align_corners: how scores are upsampled to the window.
      output_stride: pixels per score along an axis.
      batch: W, windows per run of the network.
      tile: rows and columns of the label map worked on at a time.
    """

    forward: Callable[..., Array]
    protocol: Protocol
    shapes: Layout
    mean: tuple[float, ...]
    num_classes: int
    align_corners: bool
    output_stride: int
    batch: int
    tile: int = TILE

    def plan(self, size: tuple[int, int] | None) -> dict[str, np.ndarray]:
        """Return `protocols.plan` of an image of `size`, with room for whole batches of windows."""
        arrays = plan(self.protocol, self.shapes, size)
        spare = -len(arrays["windows"]) % self.batch
        return arrays | {"windows": np.pad(arrays["windows"], ((0, spare), (0, 0)))}

    def empty_canvases(self) -> Array:
        """Return f32 [rows, columns, C] of zeros: the canvases of all views, one below the other."""
        return jnp.zeros((*self.shapes.shape, self.num_classes), jnp.float32)

    def cut(self, image: Array, size: Array, steps: Plan, first: Array) -> Array:
        """Cut `batch` windows, from number `first` on, out of an image: raw f32 [W, h, w, 3].

        image: u8 [H, W, 3] at the top left of any canvas; size: i32 [2], its (height, width).
        """
        windows, view, content = self._chunk(steps, first)
        taps, inside = [], []
        for axis in range(2):
            on_canvas = windows[:, 1 + axis, None] + self._order(windows, content, axis)
            pixel = on_canvas - view[:, 2 + axis, None]  # of the scaled image
            length = view[:, axis, None]
            inside.append((pixel >= 0) & (pixel < length))
            taps.append(_resize_taps(pixel, length, size[axis], align_corners=False))
        # Two rows and two columns make a pixel: the work does not grow with the room around a small image.
        (lower, share), share_right = taps[0], taps[1][1][:, None, :, None]
        rows = image[lower].astype(jnp.float32)  # [W, h, columns of the image, 3]
        below = image[jnp.minimum(lower + 1, size[0] - 1)].astype(jnp.float32)
        rows = rows + (below - rows) * share[..., None, None]
        left = taps[1][0][:, None, :, None]
        right = jnp.minimum(left + 1, size[1] - 1)
        cut = jnp.take_along_axis(rows, left, 2) * (1.0 - share_right)
        cut = cut + jnp.take_along_axis(rows, right, 2) * share_right
        if self.protocol.round_pixels:
            cut = jnp.round(cut)
        real = (inside[0][:, :, None] & inside[1][:, None])[..., None]
        return jnp.where(real, cut, jnp.asarray(self.mean, jnp.float32))

    def add(self, variables: Variables, canvases: Array, cut: Array, steps: Plan, first: Array) -> Array:
        """Score the windows `cut` and add them to the canvases, each pixel with its share of the average."""
        windows, _, content = self._chunk(steps, first)
        scores = self.forward(variables, cut, None if self.protocol.pad else content)
        weights = []
        for axis in range(2):
            length = content[:, axis, None]
            features = -(-length // self.output_stride)
            taps = _resize_taps(self._order(windows, content, axis), length, features, self.align_corners)
            weights.append(_matrix(taps, scores.shape[1 + axis]))
        scores = jnp.einsum("nxv,nhvc->nhxc", weights[1], scores, precision=lax.Precision.HIGHEST)
        scores = jnp.einsum("nyh,nhxc->nyxc", weights[0], scores, precision=lax.Precision.HIGHEST)
        if self.protocol.softmax_first:
            scores = jax.nn.softmax(scores)
        starts = jnp.asarray(self.shapes.starts)
        for i in range(self.batch):
            view, top, left, _ = windows[i]
            rows = lax.dynamic_slice(steps["row_shares"][view], (top,), self.protocol.window[:1])
            columns = lax.dynamic_slice(steps["column_shares"][view], (left,), self.protocol.window[1:])
            rows = rows * (first + i < steps["count"])
            place = (starts[view] + top, left, 0)
            before = lax.dynamic_slice(canvases, place, scores.shape[1:])
            after = before + scores[i] * rows[:, None, None] * columns[:, None]
            canvases = lax.dynamic_update_slice(canvases, after, place)
        return canvases

    def score(self, variables: Variables, image: Array, size: Array, steps: Plan) -> Array:
        """Return the canvases f32 [rows, columns, C] of one image after all its windows."""

        def advance(chunk: Array, canvases: Array) -> Array:
            first = chunk * self.batch
            return self.add(variables, canvases, self.cut(image, size, steps, first), steps, first)

        chunks = (steps["count"] + self.batch - 1) // self.batch
        return lax.fori_loop(0, chunks, advance, self.empty_canvases())

    def probabilities(self, canvases: Array, size: Array, steps: Plan, origin: tuple[Array, Array]) -> Array:
        """Read class probabilities f32 [tile, tile, C] at the original pixels from `origin` (y, x) on.

        Pixels beyond `size` repeat the edge and mean nothing.
        """
        align_corners = self.align_corners and not self.protocol.softmax_first  # OpenCV has no such mode
        total = jnp.zeros((self.tile, self.tile, self.num_classes), jnp.float32)
        for view, start in enumerate(self.shapes.starts):
            place = steps["views"][view]
            taps = []
            for axis, shift in enumerate((start + place[2], place[3])):
                pixel = jnp.minimum(origin[axis] + jnp.arange(self.tile), size[axis] - 1)
                lower, share = _resize_taps(pixel, size[axis], place[axis], align_corners)
                upper = jnp.minimum(lower + 1, place[axis] - 1)
                taps.append(((lower + shift, 1.0 - share), (upper + shift, share)))
            scores = sum(
                canvases[row[:, None], column] * (above[:, None, None] * beside[:, None])
                for row, above in taps[0]
                for column, beside in taps[1]
            )
            total = total + (scores if self.protocol.softmax_first else jax.nn.softmax(scores))
        return total / len(self.shapes.starts)

    def _chunk(self, steps: Plan, first: Array) -> tuple[Array, Array, Array]:
        """Return of `batch` windows: windows i32 [W, 4], their views i32 [W, 4], (height, width) inside i32 [W, 2]."""
        windows = lax.dynamic_slice(steps["windows"], (first, 0), (self.batch, 4))
        view = steps["views"][windows[:, 0]]
        window = jnp.asarray(self.protocol.window)
        content = window if self.protocol.pad else jnp.minimum(window, view[:, :2])
        return windows, view, jnp.broadcast_to(content, (self.batch, 2))

    def _order(self, windows: Array, content: Array, axis: int) -> Array:
        """Return 0, 1, 2, ... i32 [W, n] along an axis of each window, backwards where it is mirrored."""
        pixel = jnp.broadcast_to(jnp.arange(self.protocol.window[axis]), (self.batch, self.protocol.window[axis]))
        return jnp.where(windows[:, 3:] == 1, content[:, 1:] - 1 - pixel, pixel) if axis == 1 else pixel


def make_scorer(
    card: ModelCard, forward: Callable[..., Array], protocol: Protocol, sizes: Iterable[tuple[int, int]], batch: int
) -> SlidingScorer:
    """Return the scorer of a model for images of these original sizes (height, width), `batch` windows at a time."""
    return SlidingScorer(
        forward=forward,
        protocol=protocol,
        shapes=layout(protocol, sizes),
        mean=card.mean,
        num_classes=card.classes.num_classes,
        align_corners=card.model["align_corners"],
        output_stride=card.model["output_stride"],
        batch=batch,
    )


def make_sliding_step(scorer: SlidingScorer, mesh: Mesh) -> Callable[[Variables, Batch], dict[str, Array]]:
    """Return the function (variables, batch) -> counts, which shares the images out among all devices.

    Each device works through its own images, so that a large one keeps no other device waiting until the end; the
    network sees the same shapes on any number of devices, and the counts are the same to the last one.

    The batch holds image u8 [B, Hm, Wm, 3], label u8 [B, Hm, Wm], size i32 [B, 2] and the scorer's plans, stacked; Hm
    and Wm are multiples of the tile. The counts are those of `inference.make_eval_step`.
    """

    def count_image(variables: Variables, example: Batch) -> tuple[Array, Array]:
        label, size = example["label"], example["size"]
        canvases = scorer.score(variables, example["image"], size, example)
        tile = scorer.tile
        columns = (size[1] + tile - 1) // tile

        def count(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            confusion, labels = state
            origin = (tile * (index // columns), tile * (index % columns))
            piece = scorer.probabilities(canvases, size, example, origin).argmax(-1)
            truth = lax.dynamic_slice(label, origin, (tile, tile))
            confusion = confusion + confusion_matrix(truth, piece, scorer.num_classes)
            return confusion, lax.dynamic_update_slice(labels, piece.astype(jnp.uint8), origin)

        start = (jnp.zeros((scorer.num_classes, scorer.num_classes), jnp.int32), jnp.zeros_like(label))
        tiles = columns * ((size[0] + tile - 1) // tile) * (example["count"] > 0)
        confusion, labels = lax.fori_loop(0, tiles, count, start)
        return confusion, labels

    def count_local(variables: Variables, batch: Batch) -> dict[str, Array]:
        confusion, labels = lax.map(lambda example: count_image(variables, example), batch)
        counts = count_parts(confusion)
        total = lax.psum(counts["confusion"], mesh.axis_names)
        return counts | {"confusion": total, "labels": labels, "index": batch["index"]}

    shared = PartitionSpec(mesh.axis_names)
    parts = {"confusion": PartitionSpec(), "images": shared, "labels": shared, "index": shared}
    return jax.shard_map(count_local, mesh=mesh, in_specs=(PartitionSpec(), shared), out_specs=parts, check_vma=False)


def make_sliding_labeler(scorer: SlidingScorer) -> Labeler:
    """Return the labeler that scores each image as `make_sliding_step` does, one after the other.

    The network compiles once; cutting windows, which is small, once for each power of two that a side is rounded up to.
    """
    cut = jax.jit(scorer.cut)
    add = jax.jit(scorer.add, donate_argnums=1)
    empty = jax.jit(scorer.empty_canvases)

    @jax.jit
    def read(canvases: Array, size: Array, steps: Plan, origin: tuple[Array, Array]) -> Array:
        found = scorer.probabilities(canvases, size, steps, origin)
        return labels_and_confidence(found, found)

    def label(variables: Variables, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = image.shape[:2]
        room = [max(1 << (side - 1).bit_length(), 64) for side in (height, width)]
        padded = np.zeros((*room, 3), np.uint8)
        padded[:height, :width] = image
        held, size = jax.device_put(padded), np.array([height, width], np.int32)
        steps: Any = jax.device_put(scorer.plan((height, width)))
        canvases = empty()
        for first in range(0, int(steps["count"]), scorer.batch):
            number = np.int32(first)
            canvases = add(variables, canvases, cut(held, size, steps, number), steps, number)
        return join_tiles(height, width, scorer.tile, lambda origin: read(canvases, size, steps, origin))

    return lambda variables, images: [label(variables, image) for image in images]
