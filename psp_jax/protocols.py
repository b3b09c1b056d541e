"""Evaluation protocols as geometry: which windows of which resized views of an image are scored, and how they add up.

Both protocols resize an image to several scales, score windows of each scaled image and of its mirror image, average,
and resize back. They differ in almost every detail (`semseg`, `mmseg`), and a published number holds for one only.
NumPy only: the arithmetic that decides positions is exact, integers or Python's own rounding.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

Size = tuple[int, int]
Plan = dict[str, np.ndarray]

SINGLE, MULTI = (1.0,), (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
SCALES = {"single": SINGLE, "multi": MULTI}
NAMES = ("semseg", "mmseg", "whole")
WHOLE_VIEW = (0, 0)
MAX_GROUPS = 3  # of images that share a window which holds their whole views; each compiles once


@dataclass(frozen=True)
class Protocol:
    """Sizes and orders of one protocol; made by `semseg` or `mmseg`.

    A view is one scaled image whose scores are averaged on a canvas of their own before anything else happens.

    Attributes:
      name: semseg or mmseg.
      scales: factors of `limits`.
      limits: (long,) resizes the long side to long * scale, up or down; (long, short) makes the image as large as both
        limits times the scale allow.
      window: (height, width) of the network's input; `WHOLE_VIEW` until `grouped` has seen the images.
      stride: (vertical, horizontal) distance of windows; the last one of a row or column is shifted back inside.
      mirrored: whether each scale is scored as its mirror image too.
      pad: a view smaller than the window is padded with the mean colour on both sides (semseg); otherwise the window
        is the view itself, and what lies beyond counts as the zeros around every convolution (mmseg).
      softmax_first: probabilities of the windows are averaged, and a scale and its mirror image share a view (semseg);
        otherwise logits are, and each view becomes probabilities at the original size (mmseg).
      round_pixels: whether the resized image is rounded to whole grey values, as a resize of 8-bit images is.
    """

    name: str
    scales: tuple[float, ...]
    limits: tuple[int, ...]
    window: Size
    stride: Size
    mirrored: bool
    pad: bool
    softmax_first: bool
    round_pixels: bool

    @property
    def views(self) -> tuple[tuple[float, tuple[bool, ...]], ...]:
        """(scale, mirrored or not of the windows that it averages) of each view."""
        both = (False, True) if self.mirrored else (False,)
        if self.softmax_first:
            return tuple((scale, both) for scale in self.scales)
        return tuple((scale, (mirror,)) for scale in self.scales for mirror in both)

    def resized(self, size: Size, scale: float) -> Size:
        """Return the size of the scaled image, at least 1 pixel a side."""
        height, width = size
        if len(self.limits) == 1:
            long = round(scale * self.limits[0])
            if height > width:
                return long, max(round(long / height * width), 1)
            return max(round(long / width * height), 1), long
        long, short = (int(limit * scale) for limit in self.limits)
        factor = min(long / max(size), short / min(size))
        return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)

    def canvas(self, size: Size, scale: float) -> Size:
        """Return the size of the canvas on which a view's windows are averaged: the scaled image, padded if need be."""
        height, width = self.resized(size, scale)
        return (max(height, self.window[0]), max(width, self.window[1])) if self.pad else (height, width)

    def describe(self) -> dict[str, object]:
        """Return the protocol as plain values for a record."""
        order = (
            "softmax of each window, averaged over windows and mirror images, resized to the original size, averaged "
            "over scales"
            if self.softmax_first
            else "logits averaged over windows, resized to the original size, softmax averaged over mirror images and "
            "scales"
        )
        return {
            "name": self.name,
            "description": f"sliding windows; {order}" if self.window != WHOLE_VIEW else f"whole images; {order}",
            "scales": list(self.scales),
            "flip": self.mirrored,
            "base_size": list(self.limits),
        } | ({} if self.window == WHOLE_VIEW else {"window": list(self.window), "stride": list(self.stride)})


def choose(
    name: str,
    scales: str,
    base_size: tuple[int, ...],
    window: Size | None,
    stride: tuple[int, ...],
    crop: Size,
) -> Protocol | None:
    """Return the protocol of these names and numbers, None for "whole" (one resized forward pass, no windows).

    Args:
      name: semseg, mmseg or whole.
      scales: single or multi.
      base_size: (long side,) for semseg, () is 512; (long, short) for mmseg, () is 2048, 512.
      window: None is the training crop for semseg, the whole image for mmseg.
      stride: (vertical, horizontal), or one for both; () is two thirds of the window.
      crop: (height, width) of the training crops.

    Raises:
      ValueError: an unknown name, or numbers that make no protocol; the sentence lists what is known.
    """
    for field, value, known in (("protocol", name, NAMES), ("scales", scales, tuple(SCALES))):
        if value not in known:
            raise ValueError(f"eval.{field}={value!r} is unknown; choose one of: {', '.join(known)}.")
    if name == "whole":
        if scales != "single":
            raise ValueError("eval.protocol=whole has no scales; choose semseg or mmseg, or eval.scales=single.")
        return None
    limits = tuple(base_size) or ((512,) if name == "semseg" else (2048, 512))
    if len(limits) != (1 if name == "semseg" else 2) or min(limits) < 1:
        wanted = "(long side,)" if name == "semseg" else "(long, short)"
        raise ValueError(f"eval.base_size={base_size} does not fit eval.protocol={name}, which takes {wanted}.")
    steps = (stride[0], stride[-1]) if stride else None
    if steps and (len(stride) > 2 or min(stride) < 1):
        raise ValueError(f"eval.stride={stride} must be (vertical, horizontal) or one for both, in pixels.")
    if name == "semseg":
        protocol = semseg(SCALES[scales], limits[0], window or crop, steps)
    else:
        protocol = mmseg(SCALES[scales], (max(limits), min(limits)), window or WHOLE_VIEW, steps)
    if protocol.window != WHOLE_VIEW and any(s > w for s, w in zip(protocol.stride, protocol.window, strict=True)):
        raise ValueError(f"eval.stride={stride} is larger than the window {protocol.window}; pixels would be left out.")
    return protocol


def semseg(scales: tuple[float, ...], base_size: int, window: Size, stride: Size | None = None) -> Protocol:
    """Return the protocol of hszhao/semseg's tool/test.py (the one of PSPNet's published numbers for that code).

    Long side = round(scale * base_size); windows every ceil(2/3 window); mirror images always, also with one scale.
    """
    return Protocol("semseg", scales, (base_size,), window, stride or _two_thirds(window), True, True, True, False)


def mmseg(scales: tuple[float, ...], limits: Size, window: Size, stride: Size | None = None) -> Protocol:
    """Return the protocol of mmsegmentation's test configurations (img_scale = `limits`).

    With `WHOLE_VIEW` as window its mode "whole", else "slide". Mirror images only with several scales.
    """
    stride = stride or _two_thirds(window)
    return Protocol("mmseg", scales, limits, window, stride, len(scales) > 1, False, False, True)


def grouped(protocol: Protocol, sizes: Sequence[Size]) -> list[tuple[Protocol, list[int]]]:
    """Return the protocol with windows of fixed size, and for each the indices of the images (height, width) it is for.

    Only a protocol that scores whole views needs several: images of similar shape share a window that holds them all.
    """
    if protocol.window != WHOLE_VIEW:
        return [(protocol, list(range(len(sizes))))]
    largest = [protocol.resized(size, max(protocol.scales)) for size in sizes]
    groups = []
    for shapes in _partition(sorted(set(largest), key=lambda shape: (shape[0] / shape[1], shape)), MAX_GROUPS):
        window = max(height for height, _ in shapes), max(width for _, width in shapes)
        members = [i for i, shape in enumerate(largest) if shape in shapes]
        groups.append((replace(protocol, window=window, stride=window), members))
    return groups


def _partition(shapes: list[Size], most: int) -> list[set[Size]]:
    """Cut a list of shapes, ordered by aspect ratio, into at most `most` runs that waste the least area."""
    if most == 1 or len(shapes) == 1:
        return [set(shapes)]

    def waste(runs: list[set[Size]]) -> int:
        return sum(len(run) * max(h for h, _ in run) * max(w for _, w in run) for run in runs)

    cuts = [[set(shapes[:i]), *_partition(shapes[i:], most - 1)] for i in _cuts(len(shapes))]
    return min([[set(shapes)], *cuts], key=waste)


def _cuts(length: int) -> list[int]:
    """Return at most 32 places to cut a list, evenly spread: a split may hold a thousand shapes."""
    return sorted({round(i) for i in np.linspace(1, length - 1, min(length - 1, 32))})


def _two_thirds(window: Size) -> Size:
    height, width = (math.ceil(Fraction(2 * side, 3)) for side in window)
    return height, width


@dataclass(frozen=True)
class Layout:
    """Shapes that hold every image of a set: canvases of all views below each other, and the number of windows.

    Attributes:
      canvases: (height, width) of each view's canvas.
      window: (height, width) of a window; larger than a canvas, it reaches into the next one and adds zeros there.
      windows: how many windows an image has at most.
    """

    canvases: tuple[Size, ...]
    window: Size
    windows: int

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each view's canvas."""
        heights = [height for height, _ in self.canvases]
        return tuple(sum(heights[:i]) for i in range(len(heights)))

    @property
    def shape(self) -> Size:
        """(rows, columns) of all canvases together."""
        needed = [max(height, self.window[0]) for height, _ in self.canvases]
        rows = max(start + height for start, height in zip(self.starts, needed, strict=True))
        return rows, max(self.window[1], *(width for _, width in self.canvases))


def layout(protocol: Protocol, sizes: Iterable[Size]) -> Layout:
    """Return the shapes that the images of these original sizes need."""
    canvases, windows = [(0, 0)] * len(protocol.views), 0
    for size in set(sizes):
        needed = [protocol.canvas(size, scale) for scale, _ in protocol.views]
        canvases = [(max(a[0], b[0]), max(a[1], b[1])) for a, b in zip(canvases, needed, strict=True)]
        windows = max(windows, len(_windows(protocol, size)))
    return Layout(tuple(canvases), protocol.window, windows)


def plan(protocol: Protocol, shapes: Layout, size: Size | None) -> Plan:
    """Return what is done with an image of this size (height, width), nothing for None, as arrays of fixed shapes.

    Returns:
      windows: i32 [N, 4], (view, top, left, mirrored) on the view's canvas; N = `shapes.windows`, only the first
        `count` are real.
      count: i32 [].
      views: i32 [V, 4], (height, width) of the scaled image and (top, left) of its place on the canvas.
      row_shares: f32 [V, rows], 1 / number of windows that cover a canvas row; 0 beyond the canvas.
      column_shares: f32 [V, columns], likewise, and divided by the number of mirror images.
    """
    rows, columns = (np.zeros((len(protocol.views), length), np.float32) for length in shapes.shape)
    views = np.zeros((len(protocol.views), 4), np.int32)
    windows = np.zeros((shapes.windows, 4), np.int32)
    count = np.array(0, np.int32)
    steps: Plan = {"windows": windows, "count": count, "views": views, "row_shares": rows, "column_shares": columns}
    if size is None:
        return steps
    for view, (scale, mirrors) in enumerate(protocol.views):
        resized, canvas = protocol.resized(size, scale), protocol.canvas(size, scale)
        views[view] = *resized, (canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2
        for shares, axis, pairs in ((rows, 0, 1), (columns, 1, len(mirrors))):
            covered = np.zeros(canvas[axis])
            for first in origins(canvas[axis], protocol.window[axis], protocol.stride[axis]):
                covered[first : first + protocol.window[axis]] += 1
            if mirrors == (True,) and axis == 1:
                covered = covered[::-1]
            shares[view, : canvas[axis]] = 1.0 / (covered * pairs)
    listed = _windows(protocol, size)
    windows[: len(listed)] = listed
    count[...] = len(listed)
    return steps


def origins(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixel of each window along an axis; the last is shifted back inside.

    An axis shorter than the window has one, at 0.
    """
    count = max(math.ceil((length - window) / stride), 0) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def _windows(protocol: Protocol, size: Size) -> list[tuple[int, int, int, bool]]:
    found = []
    for view, (scale, mirrors) in enumerate(protocol.views):
        canvas = protocol.canvas(size, scale)
        tops, lefts = (origins(canvas[i], protocol.window[i], protocol.stride[i]) for i in range(2))
        for mirror in mirrors:
            # mmseg mirrors the whole view before it cuts windows, semseg each window.
            flipped = mirror and not protocol.softmax_first
            width = min(protocol.window[1], canvas[1])
            found += [(view, y, canvas[1] - x - width if flipped else x, mirror) for y in tops for x in lefts]
    return found
