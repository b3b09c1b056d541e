"""Confusion matrix and what is derived from it, against values worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.metrics import (
    _count_by_product,
    _count_by_scatter,
    confusion_csv,
    confusion_matrix,
    per_image_scores,
    summarize,
)


def test_confusion_matrix_by_hand() -> None:
    label = jnp.array([[0, 0, 1], [255, 2, 1]])
    prediction = jnp.array([[0, 1, 1], [2, 2, 0]])
    expected = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    np.testing.assert_array_equal(confusion_matrix(label, prediction, 3), expected)


def test_confusion_matrix_counts_like_numpy() -> None:
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 150, (2, 300, 200))
    label[rng.random(label.shape) < 0.1] = 255
    valid = label != 255
    expected = np.bincount(label[valid] * 150 + prediction[valid], minlength=150**2).reshape(150, 150)
    for count in (
        confusion_matrix,
        _count_by_product,
        _count_by_scatter,
    ):  # the first is one of the others, by platform
        np.testing.assert_array_equal(count(jnp.asarray(label), jnp.asarray(prediction), 150), expected)


def test_confusion_matrix_refuses_what_it_cannot_count_exactly() -> None:
    pixels = jnp.zeros((1 << 24,), jnp.uint8)
    with pytest.raises(ValueError, match="counts at most 16777215 pixels"):
        confusion_matrix(pixels, pixels, 2)


def test_scores_by_hand() -> None:
    # Class 3 occurs nowhere; class 2 only in predictions.
    confusion = np.array([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    confusion[0, 2] = 1
    scores = summarize(confusion, ("a", "b", "c", "d"))
    assert scores["per_class_iou"] == {"a": 6 / 10, "b": 3 / 6, "c": 0.0, "d": None}
    assert scores["mean_iou"] == pytest.approx((0.6 + 0.5 + 0.0) / 3)
    assert scores["mean_iou_absent_as_zero"] == pytest.approx((0.6 + 0.5) / 4)
    assert scores["pixel_accuracy"] == pytest.approx(9 / 13)
    assert scores["mean_accuracy"] == pytest.approx((6 / 9 + 3 / 4) / 2)
    assert scores["pixels"] == 13
    assert scores["frequency_weighted_iou"] == pytest.approx((9 * 0.6 + 4 * 0.5) / 13)
    assert scores["per_class_pixel_share"] == {"a": 9 / 13, "b": 4 / 13, "c": 0.0, "d": 0.0}


def test_nothing_labelled_has_no_score() -> None:
    scores = summarize(np.zeros((2, 2), np.int64), ("a", "b"))
    assert scores["mean_iou"] is None
    assert scores["pixel_accuracy"] is None
    assert scores["per_class_iou"] == {"a": None, "b": None}


def test_counts_beyond_32_bits_stay_exact() -> None:
    huge = 3 * 2**33
    scores = summarize(np.array([[huge, 1], [0, huge]]), ("a", "b"))
    assert scores["pixels"] == 2 * huge + 1


def test_per_image_scores_by_hand_and_as_of_one_matrix() -> None:
    confusion = np.array([[6, 2, 1, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    images = [confusion, np.zeros_like(confusion), np.diag([0, 0, 5, 0])]
    scores = per_image_scores(
        np.array([np.diag(c) for c in images]),
        np.array([c.sum(1) for c in images]),
        np.array([c.sum(0) for c in images]),
    )
    assert scores[0] == {"mean_iou": (0.6 + 0.5 + 0.0) / 3, "pixel_accuracy": 9 / 13}
    assert scores[1] == {"mean_iou": None, "pixel_accuracy": None}
    assert scores[2] == {"mean_iou": 1.0, "pixel_accuracy": 1.0}
    for image, matrix in zip(scores, images, strict=True):
        whole = summarize(matrix, ("a", "b", "c", "d"))
        assert image == {name: whole[name] for name in image}


def test_confusion_csv_quotes_names_and_keeps_every_digit() -> None:
    text = confusion_csv(np.array([[2**53 + 1, 0], [3, 4]]), ("road, paved", 'a "b"'))
    assert text == ('label \\ prediction,"road, paved","a ""b"""\n"road, paved",9007199254740993,0\n"a ""b""",3,4\n')
    assert confusion_csv(np.array([[1, 0, 7], [3, 4, 0]]), ("a", "b")).splitlines()[:2] == [
        "label \\ prediction,a,b,unlabelled",
        "a,1,0,7",
    ]
