"""Make a data set that psp_jax trains on of a folder of images and a folder of masks.

    python -m psp_jax.new_dataset --images DIR --masks DIR --output DIR [--names FILE] [--colours TABLE] [--void V]

Pairs files by name, checks all of them, and writes OUTPUT/images/SPLIT, OUTPUT/annotations/SPLIT, classes.json and a
configuration, config.py. Masks are PNG files of values (grey or palette) or of colours; of colours without a table, the
colours found are listed in a template to fill in. Images are hard links where the file system allows, else copies.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psp_jax.atomic import whole_folder
from psp_jax.classes import ClassTable
from psp_jax.command import run_command
from psp_jax.config import IMAGENET_V1S
from psp_jax.data import mask_classes, masks
from psp_jax.data.masks import COLOURS, VALUES, Colour, MaskFacts
from psp_jax.data.pairing import Pairing, assign_splits, find_pairs
from psp_jax.data.threads import map_ahead
from psp_jax.progress import track

LONG_SIDE = 2048  # pixels; larger photos are made smaller before they are cropped
LEAST_STEPS = 2000
SHOWN, LISTED = 3, 20  # files that are left over, pairs that cannot be used
CONFIG = '''"""PSPNet on the data set in this folder. Written by psp_jax.new_dataset; edit freely."""

from pathlib import Path

from ml_collections import ConfigDict

from psp_jax.config import defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = defaults()
    config.data.update(name="image_folder", dir=str(Path(__file__).resolve().parent), eval_split="{eval_split}")
    # ImageNet's weights help most where images are few; they are downloaded once, about 100 MB:
    # config.init.update(source="timm", path="{weights}")
    # A network that a CPU can train, as configs/camvid.py:small has it:
    # config.model.update(depth=18, stem="32-32-64", width=24, head_channels=128, aux_channels=64)
    config.train.update(epochs={epochs}.0, batch_size={batch_size}, crop_size=({crop},))  # {steps} steps
    config.eval.update(every_steps={every_steps}, base_size=({long_side},)){smaller}
    return config
'''

Files = Mapping[tuple[str, str], tuple[Path, Path]]  # {(split, name): (image, mask)}


def new_dataset(
    images: Path,
    mask_folder: Path,
    output: Path,
    *,
    colours: Path | None = None,
    names: Path | None = None,
    void: int | None = None,
    read_as: str | None = None,
    mask_ending: str | None = None,
    validation: float = 0.1,
    link: bool = False,
) -> Path:
    """Write a data set and return the path of its configuration; the arguments are the flags of the command.

    Raises:
      FileNotFoundError, ValueError: anything is missing, unreadable or ambiguous; nothing is written then, but for the
        template of a table of colours beside `output`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; name another folder.")
    if not 0 < validation < 1:
        raise ValueError(f"--validation={validation} must lie between 0 and 1.")
    table = mask_classes.read_colours(colours) if colours else None
    listed = _read_names(names) if names else None
    if table and (listed or void is not None or read_as == VALUES):
        raise ValueError("--colours names the classes and void; leave out --names, --void and --masks_hold values.")
    whole = output.resolve()
    pairing = find_pairs(images, mask_folder, mask_ending)
    _tell_pairs(pairing)
    files = assign_splits(pairing.pairs, validation)
    facts = _inspect(pairing, COLOURS if table else read_as)
    if table:
        classes, value_of = mask_classes.of_table(table, facts)
    else:
        template = whole.with_name(f"{whole.name}_colours.csv")
        classes, value_of = mask_classes.of_values(facts, void=void, names=listed, read_as=read_as, template=template)
    ClassTable.from_dict(classes, output.name)  # checks itself
    sizes = [facts[mask].size for (split, _), (_, mask) in files.items() if split == "train"]
    eval_split = "val" if any(split == "val" for split, _ in files) else "test"
    with whole_folder(whole) as partial:
        _write(files, value_of, partial, link)
        (partial / "classes.json").write_text(json.dumps(classes, indent=1), "utf-8")
        (partial / "config.py").write_text(config_text(sizes, eval_split), "utf-8")
    config = output / "config.py"
    _tell_result(files, classes, config)
    return config


def config_text(sizes: Sequence[tuple[int, int]], eval_split: str) -> str:
    """Return a configuration for training images of these sizes (height, width).

    The crop is 473, as on ADE20K, or 713, as on Cityscapes, where the shorter side has 1000 pixels; less where that is
    shorter. A batch has 16 crops, or as many as there are images, a power of two. There are 100 epochs, more where
    they would make fewer than 2000 steps.
    """
    long_side = round(statistics.median(max(size) for size in sizes))
    scale = min(1.0, LONG_SIDE / long_side)
    short_side = round(scale * statistics.median(min(size) for size in sizes))
    # The network aligns corners, so that sides are k * 8 + 1; its finest pyramid level needs six features a side.
    crop = max(41, min(713 if short_side >= 1000 else 473, (short_side - 1) // 8 * 8 + 1))
    batch_size = 2 ** min(4, len(sizes).bit_length() - 1)
    batches = len(sizes) // batch_size
    epochs = max(100, -(-LEAST_STEPS // batches))
    smaller = f"\n    config.augment.base_size = ({LONG_SIDE},)  # long side, before the scale" if scale < 1 else ""
    return CONFIG.format(
        eval_split=eval_split,
        weights=IMAGENET_V1S[50],
        epochs=epochs,
        batch_size=batch_size,
        crop=crop,
        steps=f"{epochs * batches:,}",
        every_steps=epochs * batches // 10,
        long_side=min(long_side, LONG_SIDE),
        smaller=smaller,
    )


def _inspect(pairing: Pairing, read_as: str | None) -> dict[Path, MaskFacts]:
    """Return what each mask holds; raise ValueError, naming the first, where files cannot be used."""
    facts: dict[Path, MaskFacts] = {}
    pairs = list(pairing.pairs.values())
    with track(len(pairs), "check") as advance:
        found = map_ahead(lambda pair: masks.inspect(*pair, read_as), pairs)
        for (_, mask), seen in zip(pairs, found, strict=True):
            facts[mask] = seen
            advance(1)
    problems = [seen.problem for seen in facts.values() if seen.problem]
    for problem in problems[1:LISTED]:
        print(f"  {problem}")
    if problems:
        raise ValueError(f"{problems[0]} ({len(problems):,} of {len(pairs):,} pairs cannot be used.)")
    return facts


def _write(files: Files, value_of: Mapping[Colour, int] | None, output: Path, link: bool) -> None:
    for split in {split for split, _ in files}:
        for part in ("images", "annotations"):
            (output / part / split).mkdir(parents=True)

    def write_pair(item: tuple[tuple[str, str], tuple[Path, Path]]) -> None:
        (split, name), (image, mask) = item
        _place(image, output / "images" / split / f"{name}{image.suffix.lower()}", link)
        target = output / "annotations" / split / f"{name}.png"
        if value_of is None:
            _place(mask, target, link)
        else:
            with target.open("xb") as file:
                file.write(masks.to_values(mask, value_of))

    with track(len(files), "write") as advance:
        for _ in map_ahead(write_pair, files.items()):
            advance(1)


def _place(source: Path, target: Path, link: bool) -> None:
    """Make `target` a symbolic link, or a hard link, or else a copy; FileExistsError where it is there.

    On a file system that takes capitals for small letters two names can be one, and a copy would go into the original
    that the first is a link to.
    """
    if link:
        target.symlink_to(source.resolve())
        return
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _read_names(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of names {path}; write one name a line.")
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except ValueError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8.") from None


def _tell_pairs(pairing: Pairing) -> None:
    print(f"{len(pairing.pairs):,} pairs of image and mask")
    for alone, what in ((pairing.images_alone, "images without mask"), (pairing.masks_alone, "masks without image")):
        if alone:
            more = ", ..." if len(alone) > SHOWN else ""
            print(f"  {len(alone):,} {what}, left out: {', '.join(map(str, alone[:SHOWN]))}{more}")


def _tell_result(files: Files, classes: Mapping[str, Any], config: Path) -> None:
    counts = Counter(split for split, _ in files)
    splits = ", ".join(f"{split} {count:,}" for split, count in sorted(counts.items()))
    shown = ", ".join(classes["names"][:12]) + (", ..." if len(classes["names"]) > 12 else "")
    file = shlex.quote(str(config))
    print(f"{config.parent}: {splits}; {len(classes['names'])} classes: {shown}; void is {classes['ignore']}")
    print("next:")
    print(f"  python -m psp_jax.check_data --config {file}")
    print(f"  on a CPU, first uncomment the smaller network in {file}")
    print(f"  python -m psp_jax.main --config {file} --workdir runs/{shlex.quote(config.parent.resolve().name)}")


def _parse_void(text: str | None) -> int | None:
    """Return the value of the flag --void, -1 for none and None where it was not given."""
    if text is None or text == "none":
        return None if text is None else -1
    if not text.isdecimal() or int(text) > 255:
        raise ValueError(f"--void={text} must be a number 0-255, or none.")
    return int(text)


def main() -> None:
    """Parse the flags and write the data set."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.new_dataset", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images, searched in full depth")
    parser.add_argument("--masks", type=Path, required=True, help="folder of masks (PNG)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--names", type=Path, help="text file of class names, one a line, in the order of the values")
    parser.add_argument("--colours", type=Path, help="masks of colours: CSV or JSON with name, r, g, b")
    parser.add_argument("--void", help="value that means void, or none; by default 255")
    parser.add_argument("--masks_hold", choices=(VALUES, COLOURS), help="how to read masks; by default by their kind")
    parser.add_argument("--mask_ending", help="what the names of masks end with, such as _mask; other files are none")
    parser.add_argument("--validation", type=float, default=0.1, help="share of the pairs, where no folders tell")
    parser.add_argument(
        "--link", action="store_true", help="symbolic links to the files, in place of hard links or copies"
    )
    args = parser.parse_args()
    new_dataset(
        args.images,
        args.masks,
        args.output,
        colours=args.colours,
        names=args.names,
        void=_parse_void(args.void),
        read_as=args.masks_hold,
        mask_ending=args.mask_ending,
        validation=args.validation,
        link=args.link,
    )


if __name__ == "__main__":
    run_command(main)
