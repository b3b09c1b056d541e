"""Which mask belongs to which image, and which pair to which split, told by their names, in folders of any depth."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from psp_jax.data.builders.image_folder import IMAGE_SUFFIXES
from psp_jax.data.decode import check_files

# What names end with beside the extension; the longest that fits is taken off.
MASK_ENDINGS = (
    *("_mask", "_masks", "-mask", "_label", "_labels", "_seg", "_segmentation", "_gt", "_annotation", "_L"),
    *("_gtFine_labelIds", "_gtFine_labelTrainIds", "_labelIds", "_labelTrainIds", "_train_id"),
)
IMAGE_ENDINGS = ("_leftImg8bit", "_image", "-image", "_img", "_rgb")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".gif", ".tif", ".tiff", ".webp")  # all but PNG are refused when read
# Folders that are kept as splits, in small letters.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Pairing(NamedTuple):
    """The pairs {name: (image, mask)}, the name being the image's path below its folder without extension.

    The other files of both folders are in `images_alone` and `masks_alone`.
    """

    pairs: dict[str, tuple[Path, Path]]
    images_alone: list[Path]
    masks_alone: list[Path]


def find_pairs(images: Path, masks: Path, mask_ending: str | None = None) -> Pairing:
    """Pair the images with the masks of the same relative path, or, where no path agrees, of the same file name.

    Names agree up to the extension and the endings above. Images and masks may share a folder: then masks are the files
    with such an ending, or else all PNG files.

    Args:
      images, masks: folders, searched in full depth; hidden files are left out.
      mask_ending: how the names of masks end, without extension; others are no masks then.

    Raises:
      FileNotFoundError, ValueError: no such folder, no images, no masks, no pairs, or one file that fits two.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")
    images, masks = images.resolve(), masks.resolve()
    endings = MASK_ENDINGS if mask_ending is None else (mask_ending,)
    image_files, mask_files = _files(images, IMAGE_SUFFIXES), _files(masks, MASK_SUFFIXES)
    ending = [file for file in mask_files if _ends(file, endings)]
    if mask_ending is not None:
        mask_files = ending
    elif images == masks:
        mask_files = ending or [file for file in mask_files if file.suffix.lower() == ".png"]
    elif masks.is_relative_to(images):  # one folder in the other
        image_files = [file for file in image_files if not file.is_relative_to(masks)]
    elif images.is_relative_to(masks):
        mask_files = [file for file in mask_files if not file.is_relative_to(images)]
    taken = set(mask_files)
    image_files = [file for file in image_files if file not in taken]
    if taken and images == masks and not image_files:
        raise ValueError(
            f"Nothing tells images from masks in {images}, all are PNG: give the masks an ending, such as a_mask.png "
            "for a.png (--mask_ending names another), or a folder of their own."
        )
    if not image_files:
        raise ValueError(f"{images} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    if not mask_files:
        raise ValueError(f"{masks} holds no masks ({f'*{mask_ending}.png' if mask_ending else '.png'}).")
    exact = mask_ending is None
    for deep in (True, False):
        keys = _by_key(mask_files, masks, endings, exact, deep)
        pairs = _match(image_files, images, keys, deep)
        if pairs:
            break
    else:
        raise ValueError(
            f"No image below {images} ({len(image_files):,}, such as {image_files[0].name}) has a mask of its name "
            f"below {masks} ({len(mask_files):,}, such as {mask_files[0].name}); names must agree up to the extension "
            "and an ending such as _mask; --mask_ending names another."
        )
    paired = {file for pair in pairs.values() for file in pair}
    alone = [[file for file in files if file not in paired] for files in (image_files, mask_files)]
    return Pairing(pairs, *alone)


def assign_splits(
    pairs: Mapping[str, tuple[Path, Path]], validation: float
) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Return {(split, flat name): (image, mask)}.

    Folders train and val (or test, and their usual other names) at the top are kept as splits. Else the SHA-256 of a
    name decides, so that a pair keeps its split when others are added; each split gets at least one pair.

    Raises:
      ValueError: fewer than three pairs, some of them in folders of splits and others not, or two names that become the
        same without folders.
    """
    tops = [SPLITS.get(name.split("/")[0].lower()) if "/" in name else None for name in pairs]
    if any(tops) and not all(tops):
        image, _ = list(pairs.values())[tops.index(None)]
        raise ValueError(
            f"{image} lies in no folder train, val or test, but other images do; move it into train or val, or away."
        )
    split_of: dict[str, str] = {}
    if all(tops) and "train" in tops and len(set(tops)) > 1:
        split_of = {name: str(top) for name, top in zip(pairs, tops, strict=True)}
        short = {name: name.split("/", 1)[1] for name in pairs}
    else:
        if len(pairs) < 3:
            raise ValueError(f"There are {len(pairs)} pairs; at least two to train and one to validate are needed.")
        rank = {name: int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13 for name in pairs}
        ordered = sorted(pairs, key=lambda name: rank[name])
        chosen = sum(rank[name] < validation for name in ordered)
        chosen = min(max(chosen, 1), len(ordered) - 2)
        split_of = {name: "val" if place < chosen else "train" for place, name in enumerate(ordered)}
        short = {name: name for name in pairs}
    files: dict[tuple[str, str], tuple[Path, Path]] = {}
    for name, pair in pairs.items():
        key = split_of[name], short[name].replace("/", "_")
        if key in files:
            raise ValueError(f"{files[key][0]} and {pair[0]} would both be named {key[1]}; rename one of them.")
        files[key] = pair
    if sum(split == "train" for split, _ in files) < 2:
        raise ValueError("The folder train holds one pair; at least two are needed.")
    return files


def _match(
    images: Iterable[Path], root: Path, masks: dict[PurePosixPath, list[Path]], deep: bool
) -> dict[str, tuple[Path, Path]]:
    pairs: dict[str, tuple[Path, Path]] = {}
    owner: dict[Path, Path] = {}
    for image in images:
        fitting = {mask for key in _keys(image, root, IMAGE_ENDINGS, True, deep) for mask in masks.get(key, ())}
        if len(fitting) > 1:
            first, second, *_ = sorted(fitting)
            raise ValueError(
                f"{first} and {second} both fit the image {image}; name the ending of the right masks, such as "
                "--mask_ending _mask, or move the others away."
            )
        for mask in fitting:
            if mask in owner:
                raise ValueError(f"{owner[mask]} and {image} both fit the mask {mask}; rename or move one of them.")
            owner[mask] = image
            pairs[image.relative_to(root).with_suffix("").as_posix()] = (image, mask)
    return pairs


def _by_key(
    masks: Iterable[Path], root: Path, endings: tuple[str, ...], exact: bool, deep: bool
) -> dict[PurePosixPath, list[Path]]:
    found = defaultdict(list)
    for mask in masks:
        for key in _keys(mask, root, endings, exact, deep):
            found[key].append(mask)
    return found


def _keys(file: Path, root: Path, endings: tuple[str, ...], exact: bool, deep: bool) -> set[PurePosixPath]:
    """Return what a file may be called by: its path below `root`, or its name, with (if `exact`) and without ending."""
    folder = PurePosixPath(file.relative_to(root).parent.as_posix() if deep else ".")
    fitting = [ending for ending in endings if _ends(file, (ending,))]
    stripped = {folder / file.stem.removesuffix(max(fitting, key=len))} if fitting else set()
    return stripped | ({folder / file.stem} if exact else set())


def _ends(file: Path, endings: tuple[str, ...]) -> bool:
    return any(file.stem.endswith(ending) and file.stem != ending for ending in endings)


def _files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files below `root` with such an extension, sorted, hidden files and folders left out."""
    found = sorted(
        file
        for file in root.rglob("*")
        if file.suffix.lower() in suffixes
        and not file.is_dir()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    check_files(found)
    return found
