"""Numbers of labelled pixels against the files, and class weights from them by hand."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_stripes
from PIL import Image

from psp_jax.classes import ClassTable
from psp_jax.data.frequencies import count_pixels, inverse_log_frequency
from psp_jax.data.prepared import ensure_prepared
from psp_jax.data.source import open_source


def test_pixels_of_joined_splits_are_counted(tmp_path: Path) -> None:
    folder = write_stripes(tmp_path / "stripes", {"train": 3, "val": 2})
    where = {"prepared_dir": str(tmp_path), "classes": None}
    ensure_prepared("image_folder", str(folder), archive=None, **where)
    source = open_source("image_folder", str(folder), "train+val", **where)
    labels = [np.asarray(Image.open(file)).ravel() for file in (folder / "annotations").rglob("*.png")]
    expected = np.bincount(np.concatenate(labels), minlength=256)[:3]
    told: list[int] = []
    np.testing.assert_array_equal(count_pixels(source, told.append), expected)
    assert sum(told) == 5
    source.classes = ClassTable.from_dict({"name": "two", "names": ["red", "green"]})
    with pytest.raises(ValueError, match=r"train\+val example 0 \(train\.scene0\d\d\) holds the value 2"):
        count_pixels(source, told.append)


def test_weights_are_enets() -> None:
    weights = inverse_log_frequency(np.array([0, 50, 150]))
    np.testing.assert_allclose(weights, [50.498, 4.1838, 1.7514], rtol=1e-4)  # 1 / ln 1.02, 1 / ln 1.27, 1 / ln 1.77


def test_nothing_labelled_weighs_all_alike() -> None:
    assert len(set(inverse_log_frequency(np.zeros(3, np.int64)))) == 1
