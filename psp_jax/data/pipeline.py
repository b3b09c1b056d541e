"""Makes the batches of training and evaluation: deterministic, sharded by host, computed in worker processes.

Batch k of a training run is a pure function of (seed, k): the same records, the same augmentations, in the same order
of rows, whatever the number of hosts and workers. So the data position of a run is one integer, its step. Pixels stay
u8; normalisation happens on the device. Imports no jax (grain, which does where it can, is imported where it is used).
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from psp_jax.data import fitting, transforms
from psp_jax.data.transforms import DEFAULT_SETTINGS, AugmentSettings, Size
from psp_jax.data.workers import Batch, WorkerPool

Example = dict[str, np.ndarray]


class Source(Protocol):
    """Random access to the records of a split; see psp_jax/data/source.py."""

    max_size: Size

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def ids(self, index: int) -> str: ...


class BatchIterator(Protocol):
    """Batches of this host, in order. `close` frees its threads or processes at once; an exhausted one is closed."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def close(self) -> None: ...


def train_batches(
    source: Source,
    *,
    crop_size: Size,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    augment: AugmentSettings = DEFAULT_SETTINGS,
    num_workers: int = 0,
) -> BatchIterator:
    """Returns this host's rows of the training batches start_step, start_step + 1, ... (`num_steps` of them, or all).

    batch_size is global: with n = batch_size / shard_count, host i gets the rows [i n, (i + 1) n). Every epoch is a
    new permutation of the whole split, and a batch may span two epochs. num_workers 0 uses threads of this process.
    Batches: image u8[n, h, w, 3], label u8[n, h, w] (255 void and padding), index i64[n] record of the split.

    Raises ValueError if the split is empty or the batch does not divide; `next` raises it, naming the record, for one
    that cannot be read.
    """
    batches = train_rows(source, crop_size, batch_size, seed, shard_index, shard_count, augment)
    return _iterate(batches, start_step, sys.maxsize if num_steps is None else start_step + num_steps, num_workers)


def train_rows(
    source: Source,
    crop_size: Size,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    augment: AugmentSettings = DEFAULT_SETTINGS,
) -> "HostBatches":
    """Returns what threads or workers compute for `train_batches`: this host's rows by step, one thread a call."""
    import grain

    examples = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_TrainExample(source, crop_size, augment))
    )
    return _host_batches(source, examples, batch_size, shard_index, shard_count)


def eval_batches(
    source: Source,
    *,
    canvas: Size | None,
    label_tile: int,
    batch_size: int,
    indices: Sequence[int] | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    num_workers: int = 0,
) -> BatchIterator:
    """Returns this host's rows of the records `indices` (or all), in order, each exactly once over all hosts.

    batch_size is global. Every host gets the same number of batches; padding examples have index -1, label 255
    everywhere, size (1, 1) and plain colour. Batches: image u8[n, Hc, Wc, 3], valid i32[n, 2], label u8[n, Hm, Wm],
    size i32[n, 2], index i64[n], as fitting.fit makes them; Hm, Wm is the source's max_size rounded up to
    multiples of label_tile. Without a canvas images keep their size: image u8[n, Hm, Wm, 3], no `valid`. Errors as in
    train_batches.
    """
    positions = tuple(range(len(source)) if indices is None else indices)
    label_size = tuple(-(-length // label_tile) * label_tile for length in source.max_size)
    examples = _EvalExamples(source, positions, canvas, (label_size[0], label_size[1]))
    batches = _host_batches(source, examples, batch_size, shard_index, shard_count)
    return _iterate(batches, 0, -(-len(positions) // batch_size), num_workers)


def _host_batches(
    source: Source, examples: "_Examples", batch_size: int, shard_index: int, shard_count: int
) -> "HostBatches":
    """Cuts this host's rows out of the global batches."""
    if not len(source):
        raise ValueError("The split holds no records; prepare the data set again or choose another split.")
    if batch_size < 1 or batch_size % shard_count:
        raise ValueError(
            f"The global batch size {batch_size} does not divide among {shard_count} hosts; make it a multiple of that."
        )
    rows = batch_size // shard_count
    return HostBatches(examples, batch_size, shard_index * rows, rows)


def _iterate(batches: "HostBatches", start: int, stop: int, num_workers: int) -> BatchIterator:
    if num_workers:
        return WorkerPool(batches, start, stop, num_workers)
    import grain

    threads = min(os.cpu_count() or 1, 8)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)  # in batches, which are large
    return iter(grain.MapDataset.range(start, stop).map(batches.__getitem__).to_iter_dataset(options))


class _Examples(Protocol):
    def __getitem__(self, position: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class HostBatches:
    """This host's rows of global batch k: contiguous ones, since dropout masks depend on the row."""

    examples: _Examples
    batch_size: int
    first_row: int
    num_rows: int

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_size + self.first_row
        rows = [self.examples[position] for position in range(first, first + self.num_rows)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    source: Source
    crop_size: Size
    settings: AugmentSettings

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        with _naming_record(self.source, index):
            record = self.source[index]
            image, label = transforms.augment(rng, record["image"], record["label"], self.crop_size, self.settings)
        return {"image": image, "label": label, "index": np.array(index, np.int64)}


@dataclasses.dataclass(frozen=True)
class _EvalExamples:
    source: Source
    indices: tuple[int, ...]
    canvas: Size | None
    label_size: Size

    def __getitem__(self, position: int) -> Example:
        if position >= len(self.indices):
            # A void pixel of the mean colour, since a size of 0 would divide by zero further on.
            image = np.full((1, 1, 3), transforms.PIXEL_FILL, np.uint8)
            return self._fit(image, np.full((1, 1), transforms.LABEL_FILL, np.uint8), -1)
        index = self.indices[position]
        with _naming_record(self.source, index):
            record = self.source[index]
            return self._fit(record["image"], record["label"], index)

    def _fit(self, image: np.ndarray, label: np.ndarray, index: int) -> Example:
        example = fitting.fit(image, label, self.canvas, self.label_size)
        return {**example, "index": np.array(index, np.int64)}


@contextlib.contextmanager
def _naming_record(source: Source, index: int) -> Iterator[None]:
    """Turns whatever goes wrong with a record into one sentence that names it, if it does not do so by itself."""
    try:
        yield
    except Exception as error:
        problem = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        try:
            name = source.ids(index)
        except Exception:  # the id may be the very thing that cannot be read
            raise ValueError(f"Record {index}: {problem}") from error
        raise ValueError(problem if name in problem else f"Record {index} ({name}): {problem}") from error
