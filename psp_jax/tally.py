"""What an evaluation has counted so far, kept in a file so that an interrupted one goes on where it was."""

from pathlib import Path

import numpy as np

from psp_jax.atomic import replacing
from psp_jax.weights.formats import read_tensors


class Tally:
    """Counts of the images of a split: i64 confusion [C, C] and, per image, hits, labelled and predicted pixels.

    Attributes:
      confusion: i64 [C, C], row = label, of all images done.
      images: i32 [N, 3, C], hits, labelled and predicted pixels of each image and class.
      done: bool [N].
    """

    def __init__(self, num_images: int, num_classes: int) -> None:
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.images = np.zeros((num_images, 3, num_classes), np.int32)
        self.done = np.zeros(num_images, np.bool_)

    def add(self, confusion: np.ndarray, images: np.ndarray, index: np.ndarray) -> None:
        """Add a batch: confusion [C, C], images [B, 3, C] and index [B] of its images, -1 for padding."""
        real = index >= 0
        if self.done[index[real]].any():
            raise ValueError("An image was counted twice; this is a fault of the program.")
        self.confusion += confusion
        self.images[index[real]] = images[real]
        self.done[index[real]] = True

    def save(self, path: Path, owner: str) -> None:
        """Write the counts, atomically; `owner` says of which evaluation they are."""
        with replacing(path) as partial, partial.open("wb") as file:
            name = np.frombuffer(owner.encode(), np.uint8)
            np.savez(file, owner=name, confusion=self.confusion, images=self.images, done=self.done)

    def load(self, path: Path, owner: str) -> str:
        """Take over the counts in `path`, if they are of the same evaluation; return what happened, in words."""
        if not path.exists():
            return ""
        try:
            held = read_tensors(path)
            if held["owner"].tobytes() != owner.encode() or held["done"].shape != self.done.shape:
                return f"{path} is of another evaluation; starting anew"
            found = {name: np.array(held[name]) for name in ("confusion", "images", "done")}  # those read are read-only
        except KeyError as error:
            return f"{path} is damaged (it holds no {error}); starting anew"
        except (OSError, ValueError) as error:
            return f"{str(error).rstrip('.')}; starting anew"
        for name, array in found.items():
            own = getattr(self, name)
            if (array.shape, array.dtype) != (own.shape, own.dtype):
                return f"{path} is damaged ({name} is {array.dtype} {list(array.shape)}); starting anew"
        self.confusion, self.images, self.done = found.values()
        return f"going on after {self.done.sum()} of {len(self.done)} images"
