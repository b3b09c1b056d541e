"""Random access to the prepared records of a split. Imports no jax: worker processes of the pipeline unpickle it."""

import itertools
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from psp_jax.classes import ClassTable
from psp_jax.command import cause
from psp_jax.data import builders, decode

METADATA_FILE = "metadata.json"


class Source:
    """The examples of one split, or of several one after the other ("train+train_extra"), decoded when asked for.

    `source[i]` is {"image": u8[H, W, 3] RGB, "label": u8[H, W] training ids with 255 for void, "id": str}.
    Of several splits an id begins with the name of its own, "train_extra.NAME", since two may have the same ids.

    Attributes:
      split: its name, or the names.
      classes: the class table of the data set.
      max_size: (largest height, largest width) of a label in the split, in pixels.
    """

    def __init__(self, directory: Path, split: str) -> None:
        """Open a split, or several joined by +, of the records in `directory`.

        Raises:
          FileNotFoundError, ValueError: see `read_info`; or there is no such split, or it is named twice.
        """
        directory = Path(directory).absolute()  # worker processes may start in another folder
        info, metadata = read_info(directory)
        names = split.split("+")
        for name in names:
            if name not in info.splits:
                raise ValueError(_no_split(directory, name, list(info.splits), metadata.get("absent", {})))
            if names.count(name) > 1:
                raise ValueError(f"The split {name} stands twice in {split}; name each once.")
        self.directory = directory
        self.split = split
        self.classes = ClassTable.from_dict(metadata["classes"])
        height, width = (max(lengths) for lengths in zip(*(metadata["max_size"][name] for name in names), strict=True))
        self.max_size: tuple[int, int] = (height, width)
        # Where each split ends, and what its ids begin with.
        ends = itertools.accumulate(info.splits[name].num_examples for name in names)
        self._prefixes = [(end, f"{name}." if len(names) > 1 else "") for end, name in zip(ends, names, strict=True)]
        skip = tfds.decode.SkipDecoding()
        builder = tfds.builder_from_directory(directory)
        self._records = builder.as_data_source(split, decoders={"image": skip, "annotation": skip})

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pair(index)
        image = decode.decode_image(pair.image, pair.image_name)
        return {"image": image, "label": self._decoded(pair), "id": pair.id}

    def pair(self, index: int) -> builders.Pair:
        """Return an example as it is stored: image and annotation encoded, and the names that errors give them."""
        record = self._record(index)
        name = self._id(index, record)
        where = f"{self.directory}, {self.split} example {index} ({name})"
        files = (record["image"], record["annotation"])
        return builders.Pair(name, *files, f"The image of {where}", f"The annotation of {where}")

    def label(self, index: int) -> np.ndarray:
        """Return the label of an example, u8[H, W] training ids with 255 for void, without decoding its image."""
        return self._decoded(self.pair(index))

    def _decoded(self, pair: builders.Pair) -> np.ndarray:
        annotation = decode.decode_annotation(pair.annotation, pair.annotation_name)
        return self.classes.to_train(annotation, pair.annotation_name)

    def ids(self, index: int) -> str:
        """Return the id of an example without decoding its pixels."""
        return self._id(index, self._record(index))

    def sizes(self) -> list[tuple[int, int]]:
        """Return (height, width) of every label, read from the files' headers."""
        headers = (self._record(index)["annotation"][16:24] for index in range(len(self)))
        return [(height, width) for width, height in (struct.unpack(">II", header) for header in headers)]

    def _id(self, index: int, record: dict[str, bytes]) -> str:
        return next(prefix for end, prefix in self._prefixes if index < end) + record["id"].decode()

    def _record(self, index: int) -> dict[str, bytes]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no example {index} in {self.split}, which has {len(self)}.")
        try:
            return self._records[index]
        except Exception as error:  # array_record raises its own kinds for a damaged file
            raise ValueError(
                f"{self.directory}, {self.split} example {index} cannot be read ({error}); {_remedy(self.directory)}"
            ) from None


def open_source(
    name: str,
    data_dir: str | Path,
    split: str,
    *,
    prepared_dir: str | Path = "data",
    classes: str | Path | None = None,
) -> Source:
    """Open a split of a prepared data set, or several joined by +; the other arguments are those of `builders.locate`.

    Raises:
      FileNotFoundError, ValueError: not prepared, prepared in part, no such split; see also `builders.locate`.
    """
    directory = builders.locate(name, data_dir, prepared_dir=prepared_dir, classes=classes)
    if not directory.exists():
        flags = f"--source {data_dir} --data_dir {prepared_dir}" if name == "image_folder" else f"--data_dir {data_dir}"
        raise FileNotFoundError(
            f"There is no {directory}; prepare it: `python -m psp_jax.prepare --dataset {name} {flags}`."
        )
    return Source(directory, split)


def read_info(directory: Path) -> tuple[tfds.core.DatasetInfo, dict[str, Any]]:
    """Return TFDS's info and our metadata of prepared records, after a check that every shard is there and whole.

    Raises:
      ValueError: something is missing or damaged; the sentence names the file and the remedy.
    """
    for name in ("dataset_info.json", "features.json", METADATA_FILE):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} is prepared only in part, {name} is missing; {_remedy(directory)}")
    try:
        info, metadata = _descriptions(directory)
        shards = [
            (Path(shard), length)
            for split in info.splits.values()
            for shard, length in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
        if any(len(os.fsencode(part)) > 255 for shard, _ in shards for part in shard.parts):
            raise ValueError("dataset_info.json gives a file a name that is too long")
    except Exception as error:  # json, protobuf and TFDS raise their own kinds for a damaged file
        raise ValueError(f"A .json file in {directory} is damaged ({cause(error)}); {_remedy(directory)}") from None
    for shard, length in shards:
        problem = _shard_problem(shard, length)
        if problem:
            raise ValueError(f"{shard} {problem}; {_remedy(directory)}")
    return info, metadata


def _descriptions(directory: Path) -> tuple[tfds.core.DatasetInfo, dict[str, Any]]:
    """Return TFDS's info and our metadata; raises anything where they are damaged or do not belong together."""
    named = _classes_in(json.loads((directory / "features.json").read_text("utf-8")))
    if foreign := [name for name in named if not name.startswith("tensorflow_datasets.core.")]:
        raise ValueError(f"features.json names {foreign[0]!r}, which TFDS would import")
    info = tfds.builder_from_directory(directory).info
    metadata = json.loads((directory / METADATA_FILE).read_text("utf-8"))
    if set(info.features) != {"image", "annotation", "id"}:
        raise ValueError(f"features.json has the features {', '.join(info.features)}")
    for split in info.splits:
        height, width = metadata["max_size"][split]
        if not all(isinstance(side, int) and 0 < side < 2**31 for side in (height, width)):
            raise ValueError(f"{METADATA_FILE} has no size of {split}")
    if not (isinstance(metadata["note"], str) and isinstance(metadata.get("absent", {}), dict)):
        raise ValueError(f"{METADATA_FILE} has a note or absent splits of another kind")
    ClassTable.from_dict(metadata["classes"])
    return info, metadata


def _classes_in(value: Any) -> list[str]:
    """Return the names of classes in what features.json holds, however deep."""
    if isinstance(value, list):
        return [name for item in value for name in _classes_in(item)]
    if not isinstance(value, dict):
        return []
    own = [str(item) for key, item in value.items() if key in ("pythonClassName", "python_class_name")]
    return own + _classes_in(list(value.values()))


def _shard_problem(shard: Path, length: int) -> str:
    """Return what is wrong with a shard in words, or ""; only the table of contents at its end is read."""
    if not shard.is_file():
        return "is missing"
    try:
        reader = ArrayRecordReader(str(shard), options="readahead_buffer_size:0")
        found = reader.num_records()
        reader.close()
    except Exception as error:  # array_record raises its own kinds for a damaged file
        return f"is damaged or truncated ({error})"
    return "" if found == length else f"has {found} records, not {length}"


def _no_split(directory: Path, name: str, known: list[str], absent: dict[str, str]) -> str:
    if name in absent:
        return (
            f"{directory} has no split {name!r}, it was prepared without {absent[name]}; put that beside the other "
            f"archives, then {_remedy(directory)}"
        )
    return f"{directory} has no split {name!r}; its splits are {', '.join(known)}, and + joins several."


def _remedy(directory: Path) -> str:
    return f"delete the folder {directory} and prepare the data set again."
