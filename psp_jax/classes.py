"""Class tables: names, colours, and the one mapping between the values in annotation files and training ids.

A table is a JSON file, ours in `class_tables/` or the user's `classes.json`:

    {"names": ["road", "tree"], "palette": [[128, 64, 128], [0, 128, 0]], "raw_ids": [0, 1], "ignore": 255}

`names` is required. `palette` is RGB (default: colours of PASCAL VOC). `raw_ids[c]` is the value of class c in the
annotation files (default: 0, 1, 2, ...). `ignore` is the value, or the list of values, that mean void (default: 255).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

IGNORE_LABEL = 255
MAX_CLASSES = 254  # training ids are bytes: 255 is void, and 254 marks values that the table does not know
UNKNOWN = 254
NAMES = ("ade20k", "camvid", "cityscapes", "context_scenes", "pascal_context", "voc2012")


@dataclass(frozen=True, eq=False)
class ClassTable:
    """The classes of a data set.

    Attributes:
      name: of the data set.
      names: of the classes, in the order of the training ids 0 .. C-1.
      palette: u8[C, 3] RGB.
      raw_ids: value of each class in the annotation files.
      void_ids: values in the annotation files that mean void; they train as `ignore_label`.
      ignore_label: the training id of void.

    Raises:
      ValueError: the table contradicts itself; the sentence names the table and the field.
    """

    name: str
    names: tuple[str, ...]
    palette: np.ndarray
    raw_ids: tuple[int, ...]
    void_ids: tuple[int, ...]
    ignore_label: int = IGNORE_LABEL
    _to_train: bytes = field(init=False, repr=False)
    _to_raw: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self)
        to_train, to_raw = bytearray([UNKNOWN] * 256), bytearray([self.void_ids[0]] * 256)
        for train, raw in enumerate(self.raw_ids):
            to_train[raw], to_raw[train] = train, raw
        for raw in self.void_ids:
            to_train[raw] = self.ignore_label
        object.__setattr__(self, "_to_train", bytes(to_train))
        object.__setattr__(self, "_to_raw", bytes(to_raw))

    @property
    def num_classes(self) -> int:
        """The number of classes C, void not counted."""
        return len(self.names)

    def to_train(self, raw: np.ndarray, where: str) -> np.ndarray:
        """Map annotation values u8[H, W] to training ids u8[H, W]; void becomes `ignore_label`.

        Raises:
          ValueError: values that are neither a class nor void; names `where`, the values and the legal ones.
        """
        train = _translate(raw, self._to_train)
        if (train == UNKNOWN).any():
            found = ", ".join(str(value) for value in np.unique(raw[train == UNKNOWN])[:8])
            raise ValueError(
                f"{where} holds the value {found}, which the class table {self.name} does not know: classes are "
                f"{_ranges(self.raw_ids)}, void is {_ranges(self.void_ids)}; correct the file or the table."
            )
        return train

    def to_raw(self, train: np.ndarray) -> np.ndarray:
        """Map training ids u8[H, W] to annotation values u8[H, W]; 255 (anything >= C) becomes the first void value."""
        return _translate(train, self._to_raw)

    def as_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values, in the format of `classes.json` with a name; `from_dict` reads it."""
        return {
            "name": self.name,
            "names": list(self.names),
            "palette": self.palette.tolist(),
            "raw_ids": list(self.raw_ids),
            "ignore": list(self.void_ids),
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], name: str | None = None) -> "ClassTable":
        """Build a table from the JSON values described at the top of this file; `name` serves where the table has none.

        Raises:
          ValueError: no names, an unknown field, or values that contradict each other.
        """
        known = ("name", "names", "palette", "raw_ids", "ignore")
        name = table.get("name") or name or "classes"
        unknown = [key for key in table if key not in known]
        if unknown or not isinstance(table.get("names"), list):
            problem = f"has the unknown field {unknown[0][:80]!r}" if unknown else "has no list of names"
            raise ValueError(f"Class table {name} {problem}; its fields are {', '.join(known)}.")
        names = tuple(table["names"])
        ignore = table.get("ignore", IGNORE_LABEL)
        try:
            palette = np.array(table.get("palette", default_palette(len(names))), np.int64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"Class table {name}: palette must be a list of [red, green, blue].") from None
        raw_ids = tuple(table.get("raw_ids", range(len(names))))
        return cls(name, names, palette, raw_ids, tuple(ignore) if isinstance(ignore, list) else (ignore,))

    def digest(self) -> str:
        """Return 12 hexadecimal digits that change when the names or the mapping change (not with name or colours)."""
        mapping = json.dumps([self.names, self.raw_ids, self.void_ids, self.ignore_label])
        return hashlib.sha256(mapping.encode()).hexdigest()[:12]


def get(name_or_path: str | Path) -> ClassTable:
    """Return one of our tables by name, or the one in a JSON file.

    Raises:
      ValueError: no such table and no such file (known names are listed), or the file is not a class table.
    """
    name = str(name_or_path)
    if name in NAMES:
        text = resources.files("psp_jax").joinpath("class_tables", f"{name}.json").read_text("utf-8")
        return ClassTable.from_dict(json.loads(text), name)
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"No class table {name}: give one of {', '.join(NAMES)}, or the path of a classes.json file.")
    try:
        table = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}.") from None
    if not isinstance(table, dict):
        raise ValueError(f'{path} must hold a JSON object such as {{"names": ["road", "tree"], "ignore": 255}}.')
    try:
        return ClassTable.from_dict(table, path.parent.resolve().name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def default_palette(count: int) -> np.ndarray:
    """Return u8[count, 3]: the PASCAL VOC colour map from its entry 1 on (entry 0 is black, which we keep for void).

    The three lowest bits of the entry give the highest bits of red, green and blue, the next three the next bits.
    """
    bits = np.arange(1, count + 1)[:, None] >> np.arange(9) & 1  # [count, 9]
    weights = np.array([128, 64, 32])
    return (bits.reshape(count, 3, 3) * weights[:, None]).sum(axis=1).astype(np.uint8)


def _translate(values: np.ndarray, table: bytes) -> np.ndarray:
    """Map u8 values through 256 bytes; `translate` takes a quarter of the time of indexing with an array."""
    return np.frombuffer(bytearray(values.tobytes()).translate(table), np.uint8).reshape(values.shape)


def _ranges(ids: tuple[int, ...]) -> str:
    """Return ids as text, runs as first-last: (0, 1, 2, 7) -> "0-2, 7"."""
    runs: list[list[int]] = []
    for value in sorted(ids):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _check(table: ClassTable) -> None:
    """Raise ValueError in words where a table contradicts itself; make its palette u8."""
    where, count, ids = f"Class table {table.name}", len(table.names), table.raw_ids + table.void_ids
    if not 1 <= count <= MAX_CLASSES:
        raise ValueError(f"{where} has {count} classes; between 1 and {MAX_CLASSES} are possible.")
    if not all(isinstance(name, str) and name for name in table.names) or len(set(table.names)) != count:
        raise ValueError(f"{where}: names must be texts that differ from each other.")
    if np.shape(table.palette) != (count, 3) or np.min(table.palette) < 0 or np.max(table.palette) > 255:
        raise ValueError(f"{where}: palette must hold {count} colours [red, green, blue] with values 0-255.")
    if len(table.raw_ids) != count:
        raise ValueError(f"{where}: raw_ids has {len(table.raw_ids)} values for {count} names.")
    if not table.void_ids or not all(isinstance(i, int) and 0 <= i <= 255 for i in ids) or len(set(ids)) != len(ids):
        raise ValueError(f"{where}: raw_ids and ignore must be different whole numbers 0-255, and ignore not empty.")
    object.__setattr__(table, "palette", np.asarray(table.palette, np.uint8))
