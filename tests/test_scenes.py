"""context_scenes: the same pictures everywhere, and context that only the whole of them gives."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from psp_jax import classes
from psp_jax.data import scenes
from psp_jax.data.builders import context_scenes
from psp_jax.data.source import Source

# Lightness of what the patches lie on: 0.299 R + 0.587 G + 0.114 B.
GROUNDS = {"sky": 172, "water": 112, "road": 112, "wall": 184, "bed": 112, "sofa": 112}
PAIRS = {"shore": ("water", "road"), "street": ("house", "skyscraper"), "bedroom": ("bed", "sofa")}


def _of(kind: str, side: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw `count` scenes of one kind and side."""
    first = list(PAIRS).index(kind) + 3 * side
    return [scenes.scene(1, first + 6 * i) for i in range(count)]


def _names(label: np.ndarray) -> set[str]:
    return {scenes.CLASSES[i] for i in np.unique(label)}


def _is(label: np.ndarray, *names: str) -> np.ndarray:
    return np.isin(label, [scenes.CLASSES.index(name) for name in names])


def test_same_pixels_on_every_machine() -> None:
    digest = hashlib.sha256()
    for index in range(12):
        image, label = scenes.scene(0, index)
        assert image.shape == (128, 128, 3) and label.shape == (128, 128)
        assert image.dtype == label.dtype == np.uint8
        digest.update(image.tobytes() + label.tobytes())
    assert digest.hexdigest()[:16] == "c738c46d591c2dd0"


@pytest.mark.parametrize("other", [{"seed": 1}, {"index": 6}, {"split": "validation"}])
def test_seed_split_and_index_each_change_the_scene(other: dict[str, int | str]) -> None:
    where = {"seed": 0, "index": 0, "split": "train"}
    image, label = scenes.scene(**where)  # type: ignore[arg-type]
    changed_image, changed_label = scenes.scene(**(where | other))  # type: ignore[arg-type]
    assert (label != changed_label).mean() > 0.01
    assert (image != changed_image).mean() > 0.5


def test_six_scenes_in_a_row_hold_every_class_and_no_scene_both_of_a_pair() -> None:
    seen = [_names(scenes.scene(0, index)[1]) for index in range(30)]
    for i in range(0, 30, 6):
        assert set().union(*seen[i : i + 6]) == set(scenes.CLASSES)
    opposites = [("water", "road"), ("boat", "car"), ("house", "skyscraper"), ("bed", "sofa"), ("pillow", "cushion")]
    for names in seen:
        assert all(not {first, second} <= names for first, second in opposites)


def test_failure_cases_name_known_classes_once() -> None:
    decided = [name for case in scenes.FAILURE_CASES.values() for name in case]
    assert len(decided) == len(set(decided)) and set(decided) < set(scenes.CLASSES)


def test_class_table_names_the_same_classes() -> None:
    table = classes.get("context_scenes")
    assert table.names == scenes.CLASSES
    assert len(np.unique(table.palette, axis=0)) == len(scenes.CLASSES)


@pytest.mark.parametrize("kind", ["shore", "bedroom"])
def test_share_of_light_patches_is_exact_in_the_scene_and_says_little_in_a_part(kind: str) -> None:
    whole: list[list[float]] = [[], []]
    part: list[list[float]] = [[], []]
    for side, name in enumerate(PAIRS[kind]):
        for image, label in _of(kind, side, 60):
            lightness = image.astype(int) @ [299, 587, 114] // 1000
            light, region = np.zeros(label.shape, bool), np.zeros(label.shape, bool)
            for ground in (name, "sky" if kind == "shore" else "wall"):
                mask = _is(label, ground) & (lightness > GROUNDS[ground] - 20)  # neither wood nor shadow
                light |= mask & (lightness > GROUNDS[ground] + scenes._LIGHT // 2)
                region |= mask
            whole[side].append(light.sum() / region.sum())
            window = np.s_[72:112, 44:84]
            part[side].append(light[window].sum() / region[window].sum())
    assert _best_accuracy(*whole) > 0.97
    assert _best_accuracy(*part) < 0.8


def test_extent_of_the_facade_is_exact_in_the_scene_and_says_little_in_a_part() -> None:
    whole: list[list[float]] = [[], []]
    part: list[list[float]] = [[], []]
    for side, name in enumerate(PAIRS["street"]):
        for _, label in _of("street", side, 60):
            facade = _is(label, name)
            columns = np.flatnonzero(facade.any(0))
            tops = facade.argmax(0)[columns]
            ground = np.flatnonzero(_is(label, "grass").any(1))[0]
            whole[side].append((ground - tops).mean())
            part[side].append((ground - tops)[48:80].mean())
    assert _best_accuracy(*whole) > 0.97
    assert _best_accuracy(*part) < 0.8


def _best_accuracy(first: list[float], second: list[float]) -> float:
    """Return the share that the best threshold between two samples gets right, `second` being the larger."""
    thresholds = np.unique(first + second)[:, None]
    right = (np.array(first) < thresholds).sum(1) + (np.array(second) >= thresholds).sum(1)
    return float(right.max()) / (len(first) + len(second))


@pytest.mark.parametrize("size", [64, 96, 200])
def test_other_sizes(size: int) -> None:
    for index in range(6):
        image, label = scenes.scene(3, index, size=size)
        assert image.shape == (size, size, 3) and label.shape == (size, size)
        assert len(_names(label)) >= 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, validation"):
        scenes.scene(0, 0, split="test")
    with pytest.raises(ValueError, match=r"32 pixels.*64"):
        scenes.scene(0, 0, size=32)


def test_builder_stores_the_scenes_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_scenes, "COUNTS", {"train": 12, "validation": 6})
    builder = context_scenes.ContextScenes(data_dir=tmp_path)  # its writer also checks every pair
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    builder.download_and_prepare(
        download_dir=tmp_path / "unused", download_config=config, file_format=tfds.core.FileFormat.ARRAY_RECORD
    )
    source = Source(builder.data_path, "validation")
    assert len(source) == 6 and source.max_size == (128, 128)
    for index in range(6):
        image, label = scenes.scene(context_scenes.SEED, index, split="validation")
        np.testing.assert_array_equal(source[index]["image"], image)
        np.testing.assert_array_equal(source[index]["label"], label)
