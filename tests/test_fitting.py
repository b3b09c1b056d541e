"""Checks the shapes that evaluation images are fitted into."""

import cv2
import numpy as np
import pytest
from test_transforms import SIZE, scene

from psp_jax.data.fitting import fit, fitted_size
from psp_jax.data.transforms import LABEL_FILL, PIXEL_FILL


@pytest.mark.parametrize(
    ("size", "canvas", "expected"),
    [
        ((512, 683), (512, 512), (384, 512)),
        ((683, 512), (512, 512), (512, 384)),
        ((40, 30), (512, 512), (512, 384)),  # small images are enlarged
        ((5, 1000), (100, 100), (1, 100)),
        ((1, 1000), (100, 100), (1, 100)),  # never 0
        ((360, 480), (361, 481), (361, 481)),
        ((1024, 2048), (512, 1536), (512, 1024)),
        ((333, 500), (512, 512), (341, 512)),
    ],
)
def test_fitted_size(size, canvas, expected):
    assert fitted_size(size, canvas) == expected


def test_fit_places_content_and_pads():
    image, label = scene(8)
    example = fit(image, label, (64, 80), (112, 144))
    height, width = example["valid"]
    assert (height, width) == (59, 80)
    np.testing.assert_array_equal(example["image"][:height, :width], cv2.resize(image, (80, 59)))
    assert (example["image"][height:] == PIXEL_FILL).all()
    np.testing.assert_array_equal(example["label"][: SIZE[0], : SIZE[1]], label)
    assert (example["label"][SIZE[0] :] == LABEL_FILL).all()
    assert (example["label"][:, SIZE[1] :] == LABEL_FILL).all()
    assert example["label"].shape == (112, 144)
    assert tuple(example["size"]) == SIZE


def test_fit_refuses_a_label_larger_than_announced():
    image, label = scene(9)
    with pytest.raises(ValueError, match="96x131"):
        fit(image, label, (64, 64), (80, 144))
