"""How often each class occurs in a split, and class weights that follow from it. Imports no jax."""

from collections.abc import Callable

import numpy as np

from psp_jax.data.source import Source
from psp_jax.data.threads import map_ahead


def count_pixels(source: Source, advance: Callable[[int], None]) -> np.ndarray:
    """Return the number of labelled pixels of each class over a split, i64 [C], from one look at every label.

    Args:
      source: the split; its images are not decoded.
      advance: told of every label that is counted, for a progress display.

    Raises:
      ValueError: a label cannot be read; the sentence names it.
    """

    def count(index: int) -> np.ndarray:
        return count_values(source.label(index))[: source.classes.num_classes]

    total = np.zeros(source.classes.num_classes, np.int64)
    for counts in map_ahead(count, range(len(source))):
        total += counts
        advance(1)
    return total


def count_values(label: np.ndarray) -> np.ndarray:
    """Return i64[256], the pixels of each value of a label u8[H, W]; row by row, as NumPy counts in copies of i64."""
    counts = np.zeros(256, np.int64)
    for row in label:
        counts += np.bincount(row, minlength=256)
    return counts


def inverse_log_frequency(pixels: np.ndarray) -> tuple[float, ...]:
    """Return the class weight 1 / ln(1.02 + share) of each class from counts of its labelled pixels [C].

    Source: ENet (Paszke et al., 2016), section 5.2. Weights are from 1.42 (all pixels) to 50.5 (none).
    """
    share = pixels / max(1, pixels.sum())
    return tuple((1 / np.log(1.02 + share)).tolist())
