"""Small data sets on disk, in the layouts that users have, for the tests of builders and of preparation."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

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


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar archive of the members, compressed where the name ends so."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def unpack(root: Path, members: dict[str, bytes]) -> Path:
    """Write the members as files below `root`."""
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def palette_png(label: np.ndarray) -> bytes:
    """Encode a label map as VOC does: indices into a palette."""
    buffer = io.BytesIO()
    picture = Image.fromarray(label)
    picture.putpalette(bytes(range(255, -1, -1)) * 3)
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def matrix(variable: str, value: object) -> bytes:
    """Return a .mat file."""
    buffer = io.BytesIO()
    savemat(buffer, {variable: value}, do_compression=True)
    return buffer.getvalue()


def lines(*ids: str) -> bytes:
    """Return a list as VOC's are."""
    return "".join(f"{id}\n" for id in ids).encode()


# Images 0-2 are VOC train, 3-4 VOC val; SBD has 1-3 in its train.txt and 4-6 in its val.txt.
VOC_IDS = [f"200{index}_00000{index}" for index in range(7)]


def voc_label(index: int) -> np.ndarray:
    """Return the annotation of VOC: 21 classes and a void edge."""
    label = annotation(index, 21)
    label[0] = 255
    return label


def sbd_label(index: int) -> np.ndarray:
    """Return the annotation of SBD: all 20."""
    return np.full(SIZES[index % 3], 20, np.uint8)


def voc_members() -> dict[str, bytes]:
    """Return {member name: bytes} in the layout of VOCtrainval_11-May-2012.tar."""
    root = "VOCdevkit/VOC2012"
    members = {f"{root}/JPEGImages/{id}.jpg": encode(image(index), "JPEG") for index, id in enumerate(VOC_IDS)}
    for index, id in enumerate(VOC_IDS[:5]):
        members[f"{root}/SegmentationClass/{id}.png"] = palette_png(voc_label(index))
    for name, ids in (("train", VOC_IDS[:3]), ("val", VOC_IDS[3:5]), ("trainval", VOC_IDS[:5])):
        members[f"{root}/ImageSets/Segmentation/{name}.txt"] = lines(*ids)
    return members


def sbd_members() -> dict[str, bytes]:
    """Return {member name: bytes} in the layout of SBD's benchmark.tgz."""
    root = "benchmark_RELEASE/dataset"
    members = {"benchmark_RELEASE/README": b"", f"{root}/train.txt": lines(*VOC_IDS[1:4])}
    members[f"{root}/val.txt"] = lines(*VOC_IDS[4:])
    for index in range(1, 7):
        members[f"{root}/img/{VOC_IDS[index]}.jpg"] = encode(image(index), "JPEG")
        truth = {"Boundaries": np.zeros((2, 2)), "Segmentation": sbd_label(index), "CategoriesPresent": 20}
        members[f"{root}/cls/{VOC_IDS[index]}.mat"] = matrix("GTcls", truth)
    return members


def context_members() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return members in the layouts of VOCtrainval_03-May-2010.tar and of PASCAL-Context's trainval.tar.gz."""
    root, ids = "VOCdevkit/VOC2010", [f"2010_00000{index}" for index in range(5)]
    images = {f"{root}/JPEGImages/{id}.jpg": encode(image(index), "JPEG") for index, id in enumerate(ids)}
    images[f"{root}/ImageSets/Main/train.txt"] = lines(*ids[:3])
    images[f"{root}/ImageSets/Main/val.txt"] = lines(*ids[3:])
    labels = {f"trainval/{id}.mat": matrix("LabelMap", objects(index)) for index, id in enumerate(ids)}
    return images, labels


def objects(index: int) -> np.ndarray:
    """Return u16[H, W] with all the object numbers 1-459 of PASCAL-Context."""
    height, width = SIZES[index % 3]
    return (np.arange(height * width) % 459 + 1).astype(np.uint16).reshape(height, width)


def cityscapes_members(kind: str, **counts: int) -> dict[str, bytes]:
    """Return members in the layout of an archive of Cityscapes: leftImg8bit, gtFine or gtCoarse, with some splits."""
    members = {"README": b"", "license.txt": b""}
    for split, count in counts.items():
        for index in range(count):
            city = ("aachen", "bad-honnef")[index % 2]
            stem = f"{kind}/{split}/{city}/{city}_00000{index}_000019_{kind}"
            if kind == "leftImg8bit":
                members[f"{stem}.png"] = encode(image(index))
            else:
                members[f"{stem}_labelIds.png"] = encode(annotation(index, 34))
                members[f"{stem}_polygons.json"] = b"{}"
    return members
