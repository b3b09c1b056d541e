"""Label images with a trained model.

    python -m psp_jax.predict --workdir runs/camvid a.jpg folder/ --output predictions/

For every image NAME the output holds NAME.png, the class values as the data set writes them, and NAME_overlay.png,
the classes over the image with a legend.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from psp_jax import api
from psp_jax.command import run_command
from psp_jax.data.decode import decode_image
from psp_jax.progress import track
from psp_jax.visualize import overlay_with_legend

OVERLAY = "_overlay"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def find_images(inputs: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Return {output stem: image file} for files and, recursively, folders; what is in `output` is left out.

    Raises:
      FileNotFoundError: an input does not exist, or there is no image at all.
      ValueError: two images would write the same output.
    """
    found: dict[Path, Path] = {}
    written: dict[Path, Path] = {}
    for path, stem in _walk(inputs, output):
        for name in (stem, stem.with_name(f"{stem.name}{OVERLAY}")):
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
        if given.is_dir():
            for path in sorted(given.rglob("*")):
                image = path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
                if image and output.resolve() not in path.resolve().parents:
                    yield path, path.relative_to(given).with_suffix("")
        elif given.exists():
            yield given, Path(given.stem)
        else:
            raise FileNotFoundError(f"{given} does not exist.")


def predict(model: api.Model, images: dict[Path, Path], output: Path) -> list[str]:
    """Label every image and write its files; return a sentence for each image that could not be read."""
    failures = []
    with track(len(images), "predict") as advance:
        for stem, path in images.items():
            try:
                image = decode_image(path.read_bytes(), str(path), upright=True)
            except (ValueError, OSError) as error:
                failures.append(str(error))
            else:
                _write(model, image, output / stem)
            advance(1)
    return failures


def _write(model: api.Model, image: np.ndarray, target: Path) -> None:
    labels = model.predict(image)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(model.card.classes.to_raw(labels)).save(target.with_name(f"{target.name}.png"))
    picture = overlay_with_legend(image, labels, model.class_names, model.palette)
    Image.fromarray(picture).save(target.with_name(f"{target.name}{OVERLAY}.png"))


def main() -> None:
    """Parse the flags and label."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.predict", description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path, nargs="+", help="images and folders of images")
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run, or an export")
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    args = parser.parse_args()
    images = find_images(args.inputs, args.output)
    failures = predict(api.load(args.workdir, args.checkpoint), images, args.output)
    print(f"labelled {len(images) - len(failures)} of {len(images)} images into {args.output}")
    if failures:
        raise ValueError(f"{len(failures)} of {len(images)} images were skipped: {' '.join(failures)}")


if __name__ == "__main__":
    run_command(main)
