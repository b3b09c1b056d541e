"""Colours are the palette's, text says what is there, and pictures of any size come out readable."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_jax import visualize

PALETTE = np.array([[200, 0, 0], [0, 150, 0], [30, 60, 220]], np.uint8)
NAMES = ("roof", "grass", "sky")
CAMVID = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def count(picture: np.ndarray, color) -> int:
    return int((picture == np.asarray(color, np.uint8)).all(axis=-1).sum())


def quarters(height: int, width: int) -> np.ndarray:
    """Half sky, a quarter roof, a quarter void; no grass."""
    label = np.full((height, width), 2, np.uint8)
    label[height // 2 :, : width // 2] = 0
    label[height // 2 :, width // 2 :] = 255
    return label


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_colorize_maps_classes_and_paints_everything_else_black(dtype):
    label = np.array([[0, 1, 2], [3, 200, 2]], dtype)
    expected = [[[200, 0, 0], [0, 150, 0], [30, 60, 220]], [[0, 0, 0], [0, 0, 0], [30, 60, 220]]]
    picture = visualize.colorize(label, PALETTE)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, expected)


def test_colorize_takes_a_full_palette_and_negative_labels():
    palette = np.arange(255 * 3, dtype=np.int64).reshape(255, 3).astype(np.uint8)
    picture = visualize.colorize(np.array([[254, 255, -1]], np.int32), palette)
    np.testing.assert_array_equal(picture, [[palette[254], [0, 0, 0], [0, 0, 0]]])


def test_overlay_blends_by_alpha():
    image = np.full((1, 2, 3), 100, np.uint8)
    label = np.array([[0, 255]], np.uint8)
    np.testing.assert_array_equal(visualize.overlay(image, label, PALETTE, 0.0), image)
    np.testing.assert_array_equal(visualize.overlay(image, label, PALETTE, 1.0), [[[200, 0, 0], [0, 0, 0]]])
    np.testing.assert_array_equal(visualize.overlay(image, label, PALETTE, 0.25), [[[125, 75, 75], [75, 75, 75]]])


def test_sizes_that_differ_are_refused():
    image = np.zeros((4, 5, 3), np.uint8)
    with pytest.raises(ValueError, match="label map is 5x4 but its image is 4x5"):
        visualize.overlay(image, np.zeros((5, 4), np.uint8), PALETTE)
    good, bad = np.zeros((4, 5), np.uint8), np.zeros((4, 6), np.uint8)
    with pytest.raises(ValueError, match="prediction is 4x6"):
        visualize.side_by_side(image, bad, good, NAMES, PALETTE)
    with pytest.raises(ValueError, match="ground truth is 4x6"):
        visualize.side_by_side(image, good, bad, NAMES, PALETTE)


def test_legend_holds_the_present_classes_largest_first():
    panel = visualize.legend_panel({"": quarters(40, 40)}, NAMES, PALETTE, 400)
    assert panel.shape[0] == 400
    rows = {name: np.flatnonzero((panel == color).all(-1).any(1)) for name, color in zip(NAMES, PALETTE, strict=True)}
    assert rows["grass"].size == 0
    assert 0 < rows["sky"].max() < rows["roof"].min()
    black = np.flatnonzero((panel == 0).all(-1).any(1))
    assert black.min() > rows["roof"].max()  # void last: equal shares keep the order of the ids
    swatch = rows["sky"].max() - rows["sky"].min() + 1
    assert 12 <= swatch <= 24


def test_legend_text_follows_name_and_share():
    def panel(label, names=NAMES):
        return visualize.legend_panel({"": label}, names, PALETTE, 400)

    label = quarters(40, 40)
    np.testing.assert_array_equal(panel(label), panel(label, ("roof", "absent", "sky")))
    assert not np.array_equal(panel(label), panel(label, ("roof", "grass", "sea")))
    other = label.copy()
    other[0] = 255  # another share of the same classes
    assert not np.array_equal(panel(label), panel(other))


def test_legend_wraps_into_columns_where_it_is_too_long():
    palette = np.random.default_rng(0).integers(60, 250, (150, 3)).astype(np.uint8)
    names = [f"class {k}" for k in range(150)]
    label = np.repeat(np.arange(150, dtype=np.uint8), 4).reshape(20, 30)
    panel = visualize.legend_panel({"": label}, names, palette, 384)
    assert panel.shape[0] == 384
    for k in range(150):
        assert count(panel, palette[k]) > 50, f"class {k} has no swatch"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0 %"), (1e-5, "<0.1 %"), (0.25, "25.0 %"), (0.99999, ">99.9 %"), (1.0, "100.0 %")],
)
def test_shares_never_round_to_none_or_all(share, text):
    assert visualize._percent(share) == text


@pytest.mark.parametrize(
    ("size", "factor"), [((128, 128), 3), ((97, 1031), 1), ((16, 16), 24), ((360, 480), 1), ((1500, 2000), 1)]
)
def test_overlay_with_legend_enlarges_small_pictures_by_whole_factors(size, factor):
    height, width = size
    label = quarters(height, width)
    picture = visualize.overlay_with_legend(np.full((*size, 3), 90, np.uint8), label, NAMES, PALETTE, alpha=1.0)
    assert picture.dtype == np.uint8 and picture.shape[0] >= factor * height and picture.shape[1] > factor * width
    sky = count(picture, PALETTE[2])
    area = factor * factor * height * width / 2
    assert 0.9 * area < sky < area + 80 * 80  # less the outline, plus the swatch


def test_regions_are_outlined_and_nothing_else():
    label = np.zeros((400, 400), np.uint8)
    label[:, 200:] = 1
    image = np.full((400, 400, 3), 90, np.uint8)
    picture = visualize.overlay_with_legend(image, label, NAMES, PALETTE, alpha=0.0)
    top, left = np.argwhere((picture == 90).all(-1)).min(axis=0)
    shown = picture[top : top + 400, left : left + 400]
    np.testing.assert_array_equal(np.flatnonzero((shown != 90).any(-1).any(0)), [200])


def test_side_by_side_has_every_panel_and_the_right_share():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (128, 96, 3)).astype(np.uint8)
    truth = quarters(128, 96)
    prediction = np.where(truth == 255, 1, truth).astype(np.uint8)
    with_truth = visualize.side_by_side(image, prediction, truth, NAMES, PALETTE)
    without = visualize.side_by_side(image, prediction, None, NAMES, PALETTE)
    panel = 9 * 128 * 96
    assert abs(count(with_truth, PALETTE[2]) - panel) < 600  # half of two panels, and the swatch
    assert abs(count(without, PALETTE[2]) - panel / 2) < 600
    assert with_truth.shape[1] - without.shape[1] > 3 * 96
    worse = prediction.copy()
    worse[0, 0], worse[0, 1] = 0, 0
    # Only the caption ("100.0 % right" or not) and the pixels differ; void pixels of the truth never count.
    caption = slice(0, 30)
    assert not np.array_equal(with_truth[caption], visualize.side_by_side(image, worse, truth, NAMES, PALETTE)[caption])
    elsewhere = prediction.copy()
    elsewhere[truth == 255] = 0
    np.testing.assert_array_equal(
        with_truth[caption], visualize.side_by_side(image, elsewhere, truth, NAMES, PALETTE)[caption]
    )


def test_side_by_side_of_nothing_but_void_tells_no_share():
    image = np.zeros((128, 128, 3), np.uint8)
    void, prediction = np.full((128, 128), 255, np.uint8), np.ones((128, 128), np.uint8)
    picture = visualize.side_by_side(image, prediction, void, NAMES, PALETTE)
    assert count(picture, PALETTE[1]) >= 9 * 128 * 128


def test_contact_sheet_keeps_every_picture_whole():
    pictures = [
        np.full((height, width, 3), value, np.uint8)
        for height, width, value in [(20, 30, 10), (40, 10, 20), (5, 90, 30)]
    ]
    sheet = visualize.contact_sheet([pictures[:2], pictures[2:]])
    corners = []
    for picture in pictures:
        spots = np.argwhere((sheet == picture[0, 0]).all(-1))
        assert tuple(spots.max(0) - spots.min(0) + 1) == picture.shape[:2] and len(spots) == picture[..., 0].size
        corners.append(spots.min(0))
    gap = corners[0][0]
    assert gap > 0
    np.testing.assert_array_equal(corners, [[gap, gap], [gap, gap + 30 + gap], [gap + 40 + gap, gap]])
    assert (sheet[0] == 255).all() and (sheet[:, 0] == 255).all()
    assert (sheet[-1] == 255).all() and (sheet[:, -1] == 255).all()
    with pytest.raises(ValueError, match="at least one picture"):
        visualize.contact_sheet([[]])


def matrix(size: int, columns: int) -> np.ndarray:
    """Every label with 80 % right, 20 % in the next column, and nothing elsewhere."""
    counts = np.eye(size, columns, dtype=np.int64) * 80
    counts[np.arange(size), (np.arange(size) + 1) % columns] += 20
    return counts


@pytest.mark.parametrize(("size", "columns"), [(2, 2), (3, 4), (19, 19), (150, 151)])
def test_confusion_picture_is_blue_where_right_and_red_where_wrong(size, columns):
    names = [f"class {k}" for k in range(size)]
    picture = visualize.confusion_picture(matrix(size, columns), names)
    assert picture.dtype == np.uint8 and max(picture.shape) < 2400
    cell = min(96, max(12, 760 // size))
    right, wrong = (
        tuple(visualize._strength(np.array(share), ink))
        for share, ink in ((0.8, visualize.RIGHT_INK), (0.2, visualize.WRONG_INK))
    )
    for color in (right, wrong):
        area = count(picture, color) / (size * cell**2)
        assert 0.7 < area <= 1.1, "a square for each label, less numbers and lines, more a swatch of the scale"
    line = picture[np.argwhere((picture == right).all(-1))[0, 0] + 2]  # of the first label
    assert np.flatnonzero((line == right).all(-1))[-1] < np.flatnonzero((line == wrong).all(-1))[0]
    assert right[2] > right[0] and wrong[0] > wrong[2]


def test_confusion_picture_follows_names_counts_and_empty_rows():
    counts = matrix(3, 3)
    picture = visualize.confusion_picture(counts, NAMES)
    np.testing.assert_array_equal(picture, visualize.confusion_picture(counts * 10**12, NAMES))
    assert not np.array_equal(picture, visualize.confusion_picture(counts, ("roof", "grass", "sea")))
    counts[1] = 0
    empty = visualize.confusion_picture(counts, NAMES)
    assert count(empty, visualize.NO_PIXELS) - count(picture, visualize.NO_PIXELS) > 0.9 * 3 * 96 * 96


@pytest.mark.skipif(not CAMVID.exists(), reason="needs the shared data folder beside the repository")
def test_camvid_image_shows_its_classes():
    table = json.loads((CAMVID / "classes" / "camvid.json").read_text())
    path = sorted((CAMVID / "camvid" / "images" / "val").glob("*.jpg"))[0]
    image = np.asarray(Image.open(path).convert("RGB"))
    label = np.asarray(Image.open(CAMVID / "camvid" / "annotations" / "val" / f"{path.stem}.png"))
    palette = np.array(table["palette"], np.uint8)
    picture = visualize.overlay_with_legend(image, label, table["names"], palette)
    legend = picture[:, image.shape[1] + 20 :]
    for k in range(11):
        assert (count(legend, palette[k]) > 50) == bool((label == k).any()), table["names"][k]
