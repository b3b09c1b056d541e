"""What the fuzzer damages, and how the package reads it."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import data_sets
import numpy as np
import weight_files
from conftest import write_stripes
from fuzz import Target

TENSORS = {f"layer{index}.weight": np.arange(64, dtype=np.float32).reshape(4, 16) + index for index in range(3)}
IMAGES = ("a.png", "a.jpg", "a.tiff", "a.bmp", "a.webp")


def files_of(folder: Path, *patterns: str) -> list[Path]:
    """Return the files in a folder whose names match, in order."""
    return sorted({file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()})


def make_image(folder: Path) -> list[Path]:
    for name in IMAGES:
        cv2.imwrite(str(folder / name), np.tile(np.arange(48, dtype=np.uint8)[:, None, None], (1, 40, 3)))
    cv2.imwrite(str(folder / "deep.png"), np.full((20, 30, 4), 40_000, np.uint16))
    return files_of(folder, "*.*")


def read_image(folder: Path) -> None:
    from psp_jax.data.decode import decode_image

    for file in files_of(folder, "*.*"):
        for upright in (False, True):
            decode_image(file.read_bytes(), str(file), upright=upright)


def make_label(folder: Path) -> list[Path]:
    from PIL import Image

    numbers = np.arange(1200, dtype=np.uint8).reshape(30, 40) % 3
    palette = Image.fromarray(numbers)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(folder / "palette.png")
    Image.fromarray(numbers).save(folder / "grey.png")
    Image.fromarray(np.repeat(numbers[..., None], 3, 2)).save(folder / "colours.png")
    return files_of(folder, "*.png")


def read_label(folder: Path) -> None:
    from psp_jax.data import decode, masks

    for name in ("palette.png", "grey.png"):
        decode.decode_annotation((folder / name).read_bytes(), str(folder / name))
    masks.packed_colours((folder / "colours.png").read_bytes(), str(folder / "colours.png"))
    for name in ("palette.png", "grey.png", "colours.png"):
        if problem := masks.inspect(folder / "grey.png", folder / name, None).problem:
            raise ValueError(problem)


def make_records(folder: Path) -> list[Path]:
    from psp_jax.data.prepared import ensure_prepared

    if not (folder / "prepared").exists():
        write_stripes(folder / "stripes", {"train": 3, "val": 1})
        ensure_prepared("image_folder", folder / "stripes", prepared_dir=folder / "prepared", say=lambda _: None)
        shutil.rmtree(folder / "stripes")
    return files_of(folder, "*.array_record*", "*.json")


def read_records(folder: Path) -> None:
    from psp_jax.data.source import Source

    (directory,) = {file.parent for file in files_of(folder, "*.array_record*")}
    for split in ("train", "val"):
        source = Source(directory, split)
        for index in range(len(source)):
            source[index]


def make_archive(folder: Path) -> list[Path]:
    members = data_sets.ade20k_members({"training": 2, "validation": 1})
    data_sets.write_zip(folder / "a.zip", members)
    data_sets.write_tar(folder / "a.tar", members)
    data_sets.write_tar(folder / "a.tgz", members)
    return files_of(folder, "a.*")


def read_archive(folder: Path) -> None:
    from psp_jax.data.builders.ade20k import Archive
    from psp_jax.data.builders.files import Files

    archive = Archive(folder / "a.zip")
    for split, names in archive.names.items():
        for name in names:
            archive.read("images", split, name)
    for name in ("a.tar", "a.tgz"):
        files = Files(folder / name, "ADEChallengeData2016")
        for member in files.names:
            files.read(member)


def make_classes(folder: Path) -> list[Path]:
    table = {"names": ["road", "tree", "sky"], "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "ignore": [0, 255]}
    (folder / "classes.json").write_text(json.dumps(table | {"raw_ids": [1, 2, 3]}))
    (folder / "colours.csv").write_text("name,r,g,b\nroad,1,2,3\ntree,4,5,6\nvoid,0,0,0\n")
    return files_of(folder, "*.json", "*.csv")


def read_classes(folder: Path) -> None:
    from psp_jax import classes
    from psp_jax.data.mask_classes import read_colours

    table = classes.get(folder / "classes.json")
    table.digest()
    table.to_raw(table.to_train(np.array([[1, 2, 3, 255]], np.uint8), str(folder)))
    read_colours(folder / "colours.csv")


def make_weights(folder: Path) -> list[Path]:
    from psp_jax.weights.formats import write_tensors

    write_tensors(folder / "a.npz", TENSORS)
    write_tensors(folder / "a.safetensors", TENSORS)
    weight_files.write_zip(folder / "a.pth", weight_files.state_dict(TENSORS))
    weight_files.write_legacy(folder / "b.pth", weight_files.state_dict(TENSORS))
    return files_of(folder, "*.*")


def read_weights(folder: Path) -> None:
    from psp_jax.weights.formats import read_tensors

    for file in files_of(folder, "*.*"):
        read_tensors(file)


def _tiny_config() -> dict[str, Any]:
    from psp_jax.config import defaults, plain

    config = plain(defaults())
    config["model"] |= {"depth": 10, "width": 8, "stem": "32-32-64", "head_channels": 16, "aux_channels": 8}
    return config


def make_workdir(folder: Path) -> list[Path]:
    from psp_jax import classes
    from psp_jax.workdir import ModelCard

    config, table = _tiny_config(), classes.get("camvid")
    ModelCard(config["model"], table, (1.0, 2.0, 3.0), (1.0, 1.0, 1.0), (41, 41), (41, 41), 512).write(folder)
    record = {"config": config, "resolved": {"train_images": 3}, "classes_digest": table.digest()}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "something").touch()
    return files_of(folder, "*.json")


def read_workdir(folder: Path) -> None:
    from psp_jax import api, classes
    from psp_jax.workdir import check_owner

    check_owner(folder, _tiny_config(), classes.get("camvid"), 3, False)
    with contextlib.suppress(FileNotFoundError):  # it holds no checkpoint
        api.load(folder)


def make_config(folder: Path) -> list[Path]:
    (folder / "a.py").write_text(
        "from psp_jax.config import defaults\n\n\ndef get_config():\n    config = defaults()\n"
        '    config.data.update(name="image_folder", dir="photos")\n    config.train.update(steps=40, batch_size=4)\n'
        "    config.model.update(depth=18, head_channels=128)\n    return config\n"
    )
    (folder / "overrides.json").write_text(json.dumps(["train.steps", "3"]))
    return files_of(folder, "*.py", "*.json")


def read_config(folder: Path) -> None:
    from psp_jax import config_file
    from psp_jax.train import check_run

    try:
        given = json.loads((folder / "overrides.json").read_text("utf-8"))
    except (ValueError, RecursionError):
        given = [(folder / "overrides.json").read_text("utf-8", "replace")]
    parts = given if isinstance(given, list) and given else [given]
    words = [value if isinstance(value, str) else json.dumps(value) for value in parts[:2]]
    override = f"--config.{words[0]}={words[-1]}"
    try:
        check_run(config_file.read_config(str(folder / "a.py"), [override]))
    except ValueError as error:  # a refusal names the field, or the file
        raise ValueError(f"a.py overrides.json {error}") from error


def _state(step: int) -> Any:
    import jax.numpy as jnp

    from psp_jax.train_step import TrainState

    params, statistics = {"kernel": jnp.full((3, 4), step + 0.1)}, {"mean": jnp.full((4,), 0.2)}
    return TrainState(jnp.asarray(step, jnp.int32), params, statistics, ({"trace": jnp.full((3, 4), 0.3)}, ()), None)


def make_checkpoint(folder: Path) -> list[Path]:
    from psp_jax.checkpoint import Checkpoints

    if not (folder / "checkpoints").exists():
        checkpoints = Checkpoints(folder / "checkpoints", keep_latest=1)
        checkpoints.save(4, _state(4), None, {"interval": []})
        checkpoints.close()
    return files_of(folder / "checkpoints", "*")


def read_checkpoint(folder: Path) -> None:
    from psp_jax.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints", keep_latest=1)
    checkpoints.restore(4, _state(0))
    checkpoints.notes(4)


TARGETS = {
    "image": Target(make_image, read_image, 4),
    "label": Target(make_label, read_label, 2),
    "records": Target(make_records, read_records, 3),
    "archive": Target(make_archive, read_archive, 3),
    "classes": Target(make_classes, read_classes, 2),
    "weights": Target(make_weights, read_weights, 3),
    "workdir": Target(make_workdir, read_workdir, 2),
    "config": Target(make_config, read_config, 2),
    "checkpoint": Target(make_checkpoint, read_checkpoint, 2),
}
