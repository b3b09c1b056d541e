"""Small data sets on disk, in the layouts that users have, for the tests of builders and of preparation."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((24, 32), (40, 20), (30, 30))  # (height, width) of example i is SIZES[i % 3]


def encode(array: np.ndarray, kind: str = "PNG") -> bytes:
    """Encode an image or an annotation with Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def image(index: int) -> np.ndarray:
    """Return u8[H, W, 3]: a colour of its own for each index, smooth, so that JPEG keeps it."""
    return np.full((*SIZES[index % 3], 3), (10 * index % 256, 100, 200), np.uint8)


def annotation(index: int, num_classes: int) -> np.ndarray:
    """Return u8[H, W] with values 0 .. num_classes - 1, another arrangement for each index."""
    height, width = SIZES[index % 3]
    return ((np.arange(height * width) + index) % num_classes).astype(np.uint8).reshape(height, width)


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    """Write an image_folder with three classes and 255 as void."""
    for split, count in counts.items():
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for index in range(count):
            (root / "images" / split / f"photo{index:03}.jpg").write_bytes(encode(image(index), "JPEG"))
            (root / "annotations" / split / f"photo{index:03}.png").write_bytes(encode(annotation(index, 3)))
    (root / "classes.json").write_text(json.dumps({"names": ["road", "tree", "sky"], "ignore": 255}))
    return root


def ade20k_members(counts: dict[str, int]) -> dict[str, bytes]:
    """Return {member name: bytes} in the layout of ADEChallengeData2016.zip; counts by training and validation."""
    members = {"ADEChallengeData2016/objectInfo150.txt": b"Idx Ratio"}
    for folder, count in counts.items():
        for index in range(count):
            name = f"ADE_{folder[:5]}_{index + 1:08}"
            members[f"ADEChallengeData2016/images/{folder}/{name}.jpg"] = encode(image(index), "JPEG")
            members[f"ADEChallengeData2016/annotations/{folder}/{name}.png"] = encode(annotation(index, 151))
    return members


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    """Write a zip file of the members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path
