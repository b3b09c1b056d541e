"""Label images with a trained model.

    python -m psp_jax.predict --workdir runs/camvid a.jpg folder/ 'more/**/*.png' --output predictions/

For every image NAME the output folder holds

    NAME.png             the class values as the data set writes them (ADE20K 1-150, Cityscapes labelIds)
    NAME_color.png       the classes in their colours: a palette PNG, whose pixels are training ids
    NAME_overlay.png     the classes over the image, with a legend; shrunk where a side is longer than 4096 pixels
    NAME_confidence.png  with --confidence: how sure the network is, 8-bit grey, 255 = certain
    NAME.json            with --shares: the classes with the most pixels, at most five

Every file is there whole or not at all. An image that cannot be read is left out, and told at the end.
"""

import argparse
import glob
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from psp_jax import api, compile_cache
from psp_jax.classes import ClassTable
from psp_jax.command import one_line, run_command
from psp_jax.data.decode import check_files, decode_image
from psp_jax.progress import track
from psp_jax.protocols import SCALES
from psp_jax.visualize import overlay_with_legend
from psp_jax.workdir import write_json, write_png

COLOR, OVERLAY, CONFIDENCE = "_color", "_overlay", "_confidence"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
OVERLAY_SIDE = 4096  # pixels; a longer side is of no use to a viewer
TOP_CLASSES = 5
LARGE = 1 << 24  # pixels; of images that hold more together, none is read ahead or kept beside
TILES_FROM = 16  # times the canvas: a photo of one scene is better whole, a map or a scan in tiles
AUTO = ("whole", "tiles")  # protocols of images up to that length, and of longer ones

Example = tuple[Path, np.ndarray]  # output stem, image u8 [H, W, 3]


def find_images(inputs: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Return {output stem: image file} of files, folders with all below them, and patterns (`*`, `?`, `[ab]`, `**`).

    Stems keep the folders below a given folder, or below what comes before a pattern's first wildcard. Hidden files
    and what is in `output` are left out.

    Raises:
      FileNotFoundError: an input does not exist, or there is no image at all.
      ValueError: two images would write the same output.
    """
    found: dict[Path, Path] = {}
    written: dict[Path, Path] = {}
    for path, stem in _walk(inputs, output):
        if found.get(stem) == path:
            continue
        for name in (stem, *(stem.with_name(stem.name + ending) for ending in (COLOR, OVERLAY, CONFIDENCE))):
            if name in written:
                raise ValueError(
                    f"{written[name]} and {path} would both write {name}.png; label them into different folders."
                )
            written[name] = path
        found[stem] = path
    if not found:
        raise FileNotFoundError(f"No image ({', '.join(SUFFIXES)}) in {', '.join(str(path) for path in inputs)}.")
    return found


def _walk(inputs: Sequence[Path], output: Path) -> Iterator[tuple[Path, Path]]:
    for given in inputs:
        if given.is_file():
            yield given, Path(given.stem)
            continue
        matches, root = [given], given
        if not given.exists():
            matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True))]
            root = next(parent for parent in given.parents if not glob.has_magic(str(parent)))
            if not matches:
                raise FileNotFoundError(f"{given} does not exist.")
        elif not given.is_dir():
            raise ValueError(f"{given} is neither a file nor a folder; name images, or folders of images.")
        for match in matches:
            for path in sorted(match.rglob("*")) if match.is_dir() else [match]:
                image = path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()
                if image and output.resolve() not in path.resolve().parents:
                    yield path, path.relative_to(root).with_suffix("")


def predict(
    model: api.Model,
    images: dict[Path, Path],
    output: Path,
    *,
    protocol: str = "auto",
    scales: str = "single",
    batch: int = 8,
    confidence: bool = False,
    shares: bool = False,
) -> tuple[Counter[str], list[str]]:
    """Label every image and write its files, reading ahead and writing behind the device.

    Args:
      model: a trained model.
      images: what `find_images` returns.
      output: folder to write into.
      protocol, scales: "auto", or those of `Model.labeler`; "auto" takes "tiles" for images whose longer side is more
        than `TILES_FROM` times that of the network's canvas, "whole" for the others.
      batch: images, or windows, that run at a time.
      confidence, shares: whether to write NAME_confidence.png and NAME.json.

    Returns how many images each protocol labelled, and a sentence for each image that could not be read.
    """
    labelers = {
        name: model.labeler(name, min(batch, len(images)) if name == "whole" else batch, scales)
        for name in (AUTO if protocol == "auto" else (protocol,))
    }
    limit = TILES_FROM * max(model.card.size)
    done: Counter[str] = Counter()
    failures: list[str] = []
    writing: list[Future[None]] = []
    with track(len(images), "predict") as advance, ThreadPoolExecutor() as pool:

        def readable() -> Iterator[Example]:
            for stem, image in _read_ahead(images, batch):
                if isinstance(image, Exception):
                    failures.append(str(image))
                    advance(1)
                else:
                    yield stem, image

        def choose(image: np.ndarray) -> str:
            return protocol if protocol != "auto" else AUTO[max(image.shape) > limit]

        for name, group in _groups(readable(), choose, batch):
            results = labelers[name]([image for _, image in group])
            for future in writing:  # of the group before: what waits to be written is never more than one group
                future.result()
            writing = [
                pool.submit(_write, output / stem, image, *result, model.card.classes, confidence, shares)
                for (stem, image), result in zip(group, results, strict=True)
            ]
            done[name] += len(group)
            advance(len(group))
        for future in writing:
            future.result()
    return done, failures


def _read_ahead(images: dict[Path, Path], count: int) -> Iterator[tuple[Path, np.ndarray | Exception]]:
    """Decode images in a thread of their own, at most `count` ahead; a large one waits until those are taken.

    An image that cannot be read comes as the error that says so.
    """
    ready: queue.Queue[tuple[Path, np.ndarray | Exception]] = queue.Queue(count)

    def read() -> None:
        for stem, path in images.items():
            try:
                check_files([path])
                image: np.ndarray | Exception = decode_image(path.read_bytes(), str(path), upright=True)
            except Exception as error:
                image = error
            ready.put((stem, image))
            if isinstance(image, np.ndarray) and _pixels(image) > LARGE:
                ready.join()

    threading.Thread(target=read, daemon=True).start()
    for _ in images:
        stem, image = ready.get()
        if isinstance(image, Exception) and not isinstance(image, ValueError | OSError):
            raise image
        yield stem, image
        ready.task_done()


def _groups(
    examples: Iterator[Example], choose: Callable[[np.ndarray], str], batch: int
) -> Iterator[tuple[str, list[Example]]]:
    """Gather up to `batch` images of the same protocol, fewer where they are large."""
    pending: dict[str, list[Example]] = {}
    for stem, image in examples:
        name = choose(image)
        group = pending.setdefault(name, [])
        group.append((stem, image))
        if len(group) == batch or sum(_pixels(image) for _, image in group) > LARGE:
            yield name, pending.pop(name)
    yield from pending.items()


def _pixels(image: np.ndarray) -> int:
    return image.shape[0] * image.shape[1]


def _write(
    target: Path,
    image: np.ndarray,
    labels: np.ndarray,
    certainty: np.ndarray,
    classes: ClassTable,
    confidence: bool,
    shares: bool,
) -> None:
    def save(picture: Image.Image, ending: str = "") -> None:
        write_png(target.with_name(f"{target.name}{ending}.png"), picture)

    save(Image.fromarray(classes.to_raw(labels)))
    color = Image.fromarray(labels)
    color.putpalette(classes.palette.tobytes().ljust(768, b"\0"))  # void is black
    save(color, COLOR)
    save(Image.fromarray(_overlay(image, labels, classes)), OVERLAY)
    if confidence:
        save(Image.fromarray(certainty), CONFIDENCE)
    if shares:
        # Row by row: NumPy counts in copies of eight bytes a pixel.
        counts = np.zeros(classes.num_classes, np.int64)
        for row in labels:
            counts += np.bincount(row, minlength=classes.num_classes)
        largest = [int(k) for k in np.argsort(-counts, kind="stable")[:TOP_CLASSES] if counts[k]]
        record = [
            {"name": classes.names[k], "value": classes.raw_ids[k], "share": counts[k] / labels.size} for k in largest
        ]
        height, width = labels.shape
        write_json(target.with_name(f"{target.name}.json"), {"height": height, "width": width, "classes": record})


def _overlay(image: np.ndarray, labels: np.ndarray, classes: ClassTable) -> np.ndarray:
    height, width = labels.shape
    scale = OVERLAY_SIDE / max(height, width)
    if scale < 1:
        size = max(round(scale * width), 1), max(round(scale * height), 1)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT).astype(np.uint8, copy=False)
    return overlay_with_legend(image, labels, classes.names, classes.palette)


def main() -> None:
    """Parse the flags and label."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.predict", description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path, nargs="+", help="images, folders of images, and quoted patterns")
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run, or an export")
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    parser.add_argument(
        "--protocol",
        choices=("auto", *api.PROTOCOLS),
        default="auto",
        help=f"auto: whole, and tiles where the longer side is more than {TILES_FROM} times the network's canvas",
    )
    parser.add_argument("--scales", choices=tuple(SCALES), default="single", help="of the protocol semseg")
    parser.add_argument("--batch", type=int, default=8, help="images, or windows, that run at a time")
    parser.add_argument("--confidence", action="store_true", help="write NAME_confidence.png")
    parser.add_argument("--shares", action="store_true", help="write NAME.json")
    args = parser.parse_args()
    if args.batch < 1:
        raise ValueError(f"--batch={args.batch} must be at least 1.")
    images = find_images(args.inputs, args.output)
    compile_cache.enable(compile_cache.default_directory(args.workdir, 1))
    done, failures = predict(
        api.load(args.workdir, args.checkpoint),
        images,
        args.output,
        protocol=args.protocol,
        scales=args.scales,
        batch=args.batch,
        confidence=args.confidence,
        shares=args.shares,
    )
    tiles = f", {done['tiles']} of {len(images)} images by tiles" if done["tiles"] else ""
    print(f"labelled {done.total()} of {len(images)} images into {args.output}{tiles}")
    for failure in failures:
        print(one_line(failure), file=sys.stderr)
    if failures:
        raise ValueError(f"{len(failures)} of {len(images)} images were skipped, for the reasons above.")


if __name__ == "__main__":
    run_command(main)
