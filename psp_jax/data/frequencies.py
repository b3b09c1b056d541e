"""How often each class occurs in a split, and class weights that follow from it. Imports no jax."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from psp_jax.data import decode
from psp_jax.data.source import Source


def count_pixels(source: Source, advance: Callable[[int], None]) -> np.ndarray:
    """Return the number of labelled pixels of each class over a split, i64 [C], from one look at every label.

    Args:
      source: the split; its images are not decoded.
      advance: told of every label that is counted, for a progress display.

    Raises:
      ValueError: a label cannot be read; the sentence names it.
    """

    def count(index: int) -> np.ndarray:
        record = source._record(index)
        where = f"The annotation of {source.directory}, {source.split} example {index} ({record['id'].decode()})"
        label = source.classes.to_train(decode.decode_annotation(record["annotation"], where), where)
        return np.bincount(label.ravel(), minlength=256)[: source.classes.num_classes]

    total = np.zeros(source.classes.num_classes, np.int64)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:  # decoding lets go of the interpreter's lock
        for counts in threads.map(count, range(len(source))):
            total += counts
            advance(1)
    return total


def inverse_log_frequency(pixels: np.ndarray) -> tuple[float, ...]:
    """Return the class weight 1 / ln(1.02 + share) of each class from counts of its labelled pixels [C].

    Source: ENet (Paszke et al., 2016), section 5.2. Weights are from 1.42 (all pixels) to 50.5 (none).
    """
    share = pixels / max(1, pixels.sum())
    return tuple((1 / np.log(1.02 + share)).tolist())
