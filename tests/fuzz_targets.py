"""What the fuzzer damages of data, classes and weights, and how the package reads it."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import data_sets
import numpy as np
import weight_files
from conftest import write_stripes
from fuzz import Target, Told, files_of, folder_name
from fuzz_runs import RUNS

TENSORS = {f"layer{index}.weight": np.arange(64, dtype=np.float32).reshape(4, 16) + index for index in range(3)}
IMAGES = ("a.png", "a.jpg", "a.tiff", "a.bmp", "a.webp")


def make_image(folder: Path) -> list[Path]:
    for name in IMAGES:
        cv2.imwrite(str(folder / name), np.tile(np.arange(48, dtype=np.uint8)[:, None, None], (1, 40, 3)))
    cv2.imwrite(str(folder / "deep.png"), np.full((20, 30, 4), 40_000, np.uint16))
    return files_of(folder, "*.*")


def read_image(folder: Path) -> Any:
    from psp_jax.data.decode import decode_image

    files = files_of(folder, "*.*")
    return [decode_image(file.read_bytes(), str(file), upright=upright) for file in files for upright in (False, True)]


def make_label(folder: Path) -> list[Path]:
    from PIL import Image

    numbers = np.arange(1200, dtype=np.uint8).reshape(30, 40) % 3
    palette = Image.fromarray(numbers)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(folder / "palette.png")
    Image.fromarray(numbers).save(folder / "grey.png")
    Image.fromarray(np.repeat(numbers[..., None], 3, 2)).save(folder / "colours.png")
    return files_of(folder, "*.png")


def read_label(folder: Path) -> Any:
    from psp_jax.data import decode, masks

    files = [folder / name for name in ("palette.png", "grey.png")]
    found = [decode.decode_annotation(file.read_bytes(), str(file)) for file in files]
    found.append(masks.packed_colours((folder / "colours.png").read_bytes(), str(folder / "colours.png")))
    for name in ("palette.png", "grey.png", "colours.png"):
        if problem := masks.inspect(folder / "grey.png", folder / name, None).problem:
            raise Told(problem)
    return found


def make_records(folder: Path) -> list[Path]:
    from psp_jax.data.prepared import ensure_prepared

    if not (folder / "prepared").exists():
        write_stripes(folder / "stripes", {"train": 3, "val": 1})
        ensure_prepared("image_folder", folder / "stripes", prepared_dir=folder / "prepared", say=lambda _: None)
        shutil.rmtree(folder / "stripes")
    return files_of(folder, "*.array_record*")


def make_metadata(folder: Path) -> list[Path]:
    make_records(folder)
    return files_of(folder, "*.json")


def read_records(folder: Path) -> Any:
    from psp_jax.data.prepared import describe
    from psp_jax.data.source import Source

    (directory,) = {file.parent for file in files_of(folder, "*.array_record*")}
    describe(directory)
    sources = [Source(directory, split) for split in ("train", "val")]
    return [[source[index] for index in range(len(source))] + source.sizes() for source in sources]


def make_archive(folder: Path) -> list[Path]:
    members = data_sets.ade20k_members({"training": 2, "validation": 1})
    data_sets.write_zip(folder / "a.zip", members)
    data_sets.write_tar(folder / "a.tar", members)
    data_sets.write_tar(folder / "a.tgz", members)
    return files_of(folder, "a.*")


def read_archive(folder: Path) -> Any:
    from psp_jax.data.builders.ade20k import Archive
    from psp_jax.data.builders.files import Files

    archive = Archive(folder / "a.zip")
    pairs = [(split, name) for split, names in archive.names.items() for name in names]
    found = [[archive.read(kind, *pair)[0] for kind in ("images", "annotations")] for pair in pairs]
    others = [Files(folder / name, "ADEChallengeData2016") for name in ("a.tar", "a.tgz")]
    return pairs, found, [{member: files.read(member) for member in files.names} for files in others]


def make_classes(folder: Path) -> list[Path]:
    table = {"names": ["road", "tree", "sky"], "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "ignore": [0, 255]}
    (folder / "classes.json").write_text(json.dumps(table | {"raw_ids": [1, 2, 3]}))
    (folder / "colours.csv").write_text("name,r,g,b\nroad,1,2,3\ntree,4,5,6\nvoid,0,0,0\n")
    return files_of(folder, "*.json", "*.csv")


def read_classes(folder: Path) -> Any:
    from psp_jax import classes
    from psp_jax.data.mask_classes import read_colours

    table = classes.get(folder / "classes.json")
    raw = np.array([[*table.raw_ids, *table.void_ids]], np.uint8)
    return table.digest(), table.to_raw(table.to_train(raw, str(folder))), read_colours(folder / "colours.csv")


def make_weights(folder: Path) -> list[Path]:
    from psp_jax.weights.formats import write_tensors

    write_tensors(folder / "a.npz", TENSORS)
    write_tensors(folder / "a.safetensors", TENSORS)
    weight_files.write_zip(folder / "a.pth", weight_files.state_dict(TENSORS))
    weight_files.write_legacy(folder / "b.pth", weight_files.state_dict(TENSORS))
    return files_of(folder, "*.*")


def read_weights(folder: Path) -> Any:
    from psp_jax.weights.formats import read_tensors

    return {file.name: read_tensors(file) for file in files_of(folder, "*.*")}


TARGETS = {
    "image": Target(make_image, read_image, 4),
    "label": Target(make_label, read_label, 2),
    "records": Target(make_records, read_records, 2, exact=("*",), names=folder_name),
    "metadata": Target(make_metadata, read_records, 2, names=folder_name),
    "archive": Target(make_archive, read_archive, 3, exact=("a.zip", "a.tgz")),  # a .tar has checksums of headers alone
    "classes": Target(make_classes, read_classes, 2),
    "weights": Target(make_weights, read_weights, 3, exact=("a.npz", "a.pth")),  # the other formats have none
    **RUNS,
}
