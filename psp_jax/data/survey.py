"""One look at every pair of a data set, broken ones too: what is wrong with it, and what it holds.

Of a pair only counts, a digest and, on request, a small picture are kept, so that memory does not grow with the pixels.
"""

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from psp_jax.classes import ClassTable
from psp_jax.data import decode
from psp_jax.data.builders import Pair
from psp_jax.data.builders.base import check_same_size
from psp_jax.data.contents import Contents, Problem
from psp_jax.data.frequencies import count_values
from psp_jax.data.threads import map_ahead
from psp_jax.visualize import overlay_with_legend

PICTURES = 3  # of each split
PICTURE_SIDE = 640  # pixels, the longer side of an image in a picture


class Look(NamedTuple):
    """What one pair is found to hold; None where a file cannot be read.

    Attributes:
      size: (height, width) of the image.
      mean, deviation: f64[3] of its RGB values 0-255.
      digest: 16 bytes that are the same for the same pixels.
      turned: whether viewers turn the image by its EXIF orientation.
      values: i64[256], pixels of each annotation value.
      picture: a JPEG of the annotation over the image, b"" where none was asked for.
    """

    split: str
    name: str
    problems: tuple[Problem, ...]
    size: tuple[int, int] | None = None
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None
    digest: bytes = b""
    turned: bool = False
    values: np.ndarray | None = None
    picture: bytes = b""


@dataclass
class Tally:
    """The sums over one split. `sizes` counts (height, width); see `Look` for the others."""

    images: int = 0
    pixels: int = 0
    rgb: np.ndarray = field(default_factory=lambda: np.zeros(3))
    rgb_squared: np.ndarray = field(default_factory=lambda: np.zeros(3))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    labels: int = 0
    values: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # pixels of each annotation value
    present: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # annotations that hold each value

    def add(self, seen: Look) -> None:
        """Count what one pair holds."""
        if seen.size is not None and seen.mean is not None and seen.deviation is not None:
            count = seen.size[0] * seen.size[1]
            self.images += 1
            self.pixels += count
            self.sizes[seen.size] += 1
            self.rgb += count * seen.mean
            self.rgb_squared += count * (seen.mean**2 + seen.deviation**2)
        if seen.values is not None:
            self.labels += 1
            self.values += seen.values
            self.present += seen.values > 0

    def mean(self) -> np.ndarray:
        """Return the mean f64[3] of all pixels, RGB 0-255."""
        return self.rgb / max(1, self.pixels)

    def deviation(self) -> np.ndarray:
        """Return the standard deviation f64[3] of all pixels."""
        return np.sqrt(np.maximum(self.rgb_squared / max(1, self.pixels) - self.mean() ** 2, 0))


def survey(contents: Contents) -> Iterator[Look]:
    """Look at every pair once, in order of splits and names, several at a time."""
    items = ((split, index) for split, count in contents.counts.items() for index in range(count))
    return map_ahead(lambda item: look(contents, *item), items)


def look(contents: Contents, split: str, index: int) -> Look:
    """Read one pair; a few of each split, evenly spread, get a picture."""
    problems: list[Problem] = []

    @contextlib.contextmanager
    def noting(kind: str, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            problems.append(Problem(kind, split, str(getattr(error, "filename", None) or name), str(error)))

    pair: Pair | None = None
    image: np.ndarray | None = None
    label: np.ndarray | None = None
    with noting("file", f"{split} {index}"):
        pair = contents.pair(split, index)
    if pair is None:
        return Look(split, problems[0].name, tuple(problems))
    with noting("image", pair.image_name):
        image = decode.decode_image(pair.image, pair.image_name)
    with noting("label", pair.annotation_name):
        label = decode.decode_annotation(pair.annotation, pair.annotation_name)
    if label is not None:
        with noting("values", pair.annotation_name):
            contents.classes.to_train(label, pair.annotation_name)
    picture = b""
    if image is not None and label is not None:
        with noting("size", pair.annotation_name):
            check_same_size(pair, image, label)
        if image.shape[:2] == label.shape and index in np.linspace(0, contents.counts[split] - 1, PICTURES).astype(int):
            picture = _picture(image, label, contents.classes)
    seen = Look(split, pair.id, tuple(problems), picture=picture)
    if image is not None:
        mean, deviation = (np.array(value).ravel() for value in cv2.meanStdDev(image))
        digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
        digest.update(image.data)  # of its own memory: a copy of a large image takes gigabytes
        turned = decode.exif_orientation(pair.image) > 1
        size = (image.shape[0], image.shape[1])
        seen = seen._replace(size=size, mean=mean, deviation=deviation, digest=digest.digest(), turned=turned)
    return seen if label is None else seen._replace(values=count_values(label))


def _picture(image: np.ndarray, label: np.ndarray, classes: ClassTable) -> bytes:
    """Return a JPEG of the label map over its image, both made smaller where they are large, with a legend."""
    train_ids = np.full(256, classes.ignore_label, np.uint8)
    train_ids[list(classes.raw_ids)] = range(classes.num_classes)
    scale = min(1.0, PICTURE_SIDE / max(label.shape))
    size = (max(1, round(scale * label.shape[1])), max(1, round(scale * label.shape[0])))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    ids = cv2.resize(train_ids[label], size, interpolation=cv2.INTER_NEAREST_EXACT)
    drawn = overlay_with_legend(small, ids, classes.names, classes.palette)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
