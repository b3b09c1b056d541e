"""Images and masks as users have them, of values or of colours, for the tests of new data sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 44, 60
RED, GREEN, BLACK = (200, 0, 0), (0, 160, 0), (0, 0, 0)


def mask(index: int, values: tuple[int, ...] = (0, 1, 2, 255)) -> np.ndarray:
    """Return u8[HEIGHT, WIDTH]: stripes of the values, moved for each index."""
    stripes = np.array(values, np.uint8)[(np.arange(WIDTH) // 15 + index) % len(values)]
    return np.tile(stripes, (HEIGHT, 1))


def save(path: Path, pixels: np.ndarray, palette: list[int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if palette:
        picture.putpalette(palette)
    picture.save(path)
    return path


def write(
    root: Path, masks: list[np.ndarray], name: str = "p{:02}", ending: str = "", **options: Any
) -> dict[str, Path]:
    """Write images i/NAME.jpg and masks m/NAME.png of the same size; returns the arguments of new_dataset."""
    rng = np.random.default_rng(0)
    for index, pixels in enumerate(masks):
        image = rng.integers(0, 256, (*pixels.shape[:2], 3)).astype(np.uint8)
        save(root / "i" / f"{name.format(index)}.jpg", image)
        save(root / "m" / f"{name.format(index)}{ending}.png", pixels, **options)
    return {"images": root / "i", "mask_folder": root / "m", "output": root / "out"}


def classes(output: Path) -> dict[str, Any]:
    return json.loads((output / "classes.json").read_text())


def written(output: Path) -> dict[str, np.ndarray]:
    """Return the values of each annotation by SPLIT/NAME."""
    files = sorted(output.glob("annotations/*/*.png"))
    return {f"{file.parent.name}/{file.stem}": np.array(Image.open(file)) for file in files}


def coloured(index: int) -> np.ndarray:
    return np.array([BLACK, RED, GREEN], np.uint8)[mask(index, (0, 1, 2))]
