"""Checks the one-warp augmentation against semseg's step-by-step chain, and the law of what is drawn."""

import cv2
import numpy as np
import pytest

from psp_jax.data.transforms import (
    DEFAULT_SETTINGS,
    LABEL_FILL,
    PIXEL_FILL,
    Augmentation,
    AugmentSettings,
    apply,
    draw,
    fit,
    fitted_size,
    scaled_size,
)

SIZE = (96, 131)


def chain(image, label, drawn, crop_size):
    """semseg's util/transform.py, step by step on the whole image, in float32 as there."""
    image = cv2.resize(image.astype(np.float32), None, fx=drawn.scale, fy=drawn.scale, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=drawn.scale, fy=drawn.scale, interpolation=cv2.INTER_NEAREST)
    height, width = label.shape
    if drawn.angle:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), drawn.angle, 1)
        where = {"dsize": (width, height), "borderMode": cv2.BORDER_CONSTANT}
        image = cv2.warpAffine(image, matrix, flags=cv2.INTER_LINEAR, borderValue=PIXEL_FILL, **where)
        label = cv2.warpAffine(label, matrix, flags=cv2.INTER_NEAREST, borderValue=LABEL_FILL, **where)
    if drawn.blur:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if drawn.flip:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    pad_height, pad_width = max(crop_size[0] - height, 0), max(crop_size[1] - width, 0)
    top, left = pad_height // 2, pad_width // 2
    borders = (top, pad_height - top, left, pad_width - left, cv2.BORDER_CONSTANT)
    image = cv2.copyMakeBorder(image, *borders, value=PIXEL_FILL)
    label = cv2.copyMakeBorder(label, *borders, value=LABEL_FILL)
    top, left = drawn.top + top, drawn.left + left
    window = np.s_[top : top + crop_size[0], left : left + crop_size[1]]
    return image[window], label[window]


def scene(seed, size=SIZE):
    """An image with smooth and sharp structure, and labels in regions of some pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    regions = rng.integers(0, 9, (size[0] // 5 + 1, size[1] // 5 + 1), dtype=np.uint8)
    return image, cv2.resize(regions, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("top", "left", "crop"), [(0, 0, SIZE), (7, 20, (61, 73)), (-3, -10, (103, 152))])
@pytest.mark.parametrize("blur", [False, True])
def test_identity_flip_crop_and_blur_equal_the_chain_to_the_pixel(flip, top, left, crop, blur):
    image, label = scene(0)
    image[::7, ::5] = 255  # noise, where a shift by a fraction of a pixel would show
    drawn = Augmentation(1.0, 0.0, blur, flip, top, left)
    expected_image, expected_label = chain(image, label, drawn, crop)
    crop_image, crop_label = apply(image, label, drawn, crop)
    # cv2 rounds an exact half of the u8 blur up, so round the float chain in the same way.
    np.testing.assert_array_equal(crop_image, np.floor(expected_image + 0.5))
    np.testing.assert_array_equal(crop_label, expected_label)
    assert crop_image.dtype == crop_label.dtype == np.uint8
    assert crop_image.flags.c_contiguous
    assert crop_label.flags.c_contiguous


def test_scaling_equals_cv2_resize():
    settings = AugmentSettings(rotate_probability=0)
    rng = np.random.default_rng(1)
    for seed in range(60):
        image, label = scene(seed)
        drawn = draw(rng, SIZE, (71, 83), settings)
        expected_image, expected_label = chain(image, label, drawn, (71, 83))
        crop_image, crop_label = apply(image, label, drawn, (71, 83))
        assert np.abs(crop_image - expected_image).max() <= 2
        np.testing.assert_array_equal(crop_label, expected_label)


def test_labels_scale_by_the_floor_law():
    label = np.arange(SIZE[1], dtype=np.uint8)[None].repeat(SIZE[0], axis=0)
    image = np.zeros((*SIZE, 3), np.uint8)
    for scale in np.random.default_rng(2).uniform(0.5, 2, 20):
        _, crop = apply(image, label, Augmentation(scale, 0.0, False, False, 0, 0), scaled_size(SIZE, scale))
        assert crop.shape == scaled_size(SIZE, scale)
        np.testing.assert_array_equal(crop[0], np.minimum(np.floor(np.arange(crop.shape[1]) / scale), SIZE[1] - 1))


def test_rotated_crops_follow_the_chain():
    """Interpolating once is sharper than twice, and the border's ramp differs by a pixel; nothing else may differ.

    That much is 0.57 grey levels; a shift by a tenth of a pixel would give 1.4, a centre half a pixel off 0.86.
    """
    settings = AugmentSettings(rotate_probability=1)
    rng = np.random.default_rng(3)
    inside_differences, differences, agreement = [], [], []
    for seed in range(120):
        image, label = scene(seed)
        drawn = draw(rng, SIZE, (71, 83), settings)
        expected_image, expected_label = chain(image, label, drawn, (71, 83))
        crop_image, crop_label = apply(image, label, drawn, (71, 83))
        inside = cv2.erode((expected_label != LABEL_FILL).astype(np.uint8), np.ones((7, 7))).astype(bool)
        difference = crop_image - expected_image
        differences.append(np.abs(difference).mean())
        agreement.append((crop_label == expected_label).mean())
        if inside.any():
            inside_differences.append(np.abs(difference)[inside].mean())
            assert abs(difference[inside].mean()) < 0.1
    assert np.mean(inside_differences) < 0.7
    assert np.mean(differences) < 0.7
    assert min(agreement) > 0.998


def test_a_small_crop_may_see_only_fill():
    image, label = scene(4)
    crop_image, crop_label = apply(image, label, Augmentation(2.0, 10.0, True, False, 0, 0), (5, 5))
    assert (crop_label == LABEL_FILL).all()
    assert (crop_image == PIXEL_FILL).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (200, 3)])
def test_tiny_images(size):
    rng = np.random.default_rng(5)
    image, label = np.full((*size, 3), 200, np.uint8), np.full(size, 7, np.uint8)
    for _ in range(30):
        drawn = draw(rng, size, (33, 17), DEFAULT_SETTINGS)
        crop_image, crop_label = apply(image, label, drawn, (33, 17))
        assert crop_image.shape == (33, 17, 3)
        assert set(np.unique(crop_label)) <= {7, LABEL_FILL}


def test_drawn_parameters_follow_the_law():
    rng = np.random.default_rng(6)
    count, crop = 20_000, (90, 120)
    drawn = [draw(rng, SIZE, crop, DEFAULT_SETTINGS) for _ in range(count)]
    scale = np.array([d.scale for d in drawn])
    assert 0.5 <= scale.min() < 0.51
    assert 1.99 < scale.max() < 2
    assert scale.mean() == pytest.approx(1.25, abs=0.012)  # 4 standard errors; log-uniform would give 1.08
    assert scale.var() == pytest.approx(1.5**2 / 12, rel=0.03)
    angle = np.array([d.angle for d in drawn])
    tolerance = 4 * 0.5 / count**0.5
    for happened in (angle != 0, [d.blur for d in drawn], [d.flip for d in drawn]):
        assert np.mean(happened) == pytest.approx(0.5, abs=tolerance)
    rotated = angle[angle != 0]
    assert -10 <= rotated.min() < -9.9
    assert 9.9 < rotated.max() < 10
    assert rotated.var() == pytest.approx(20**2 / 12, rel=0.04)
    flags = np.array([angle != 0, [d.blur for d in drawn], [d.flip for d in drawn], scale > 1.25], float)
    assert np.abs(np.corrcoef(flags) - np.eye(4)).max() < 4 / count**0.5


def test_crop_offsets_are_uniform_and_inclusive_and_padding_is_halved():
    rng = np.random.default_rng(7)
    settings = AugmentSettings(scale_min=1, scale_max=1)
    drawn = [draw(rng, (20, 9), (16, 14), settings) for _ in range(5000)]
    tops = np.bincount([d.top for d in drawn], minlength=5)
    assert len(tops) == 5
    assert (np.abs(tops - 1000) < 4 * (5000 * 0.2 * 0.8) ** 0.5).all()
    assert {d.left for d in drawn} == {-2}  # floor(5 / 2) before


def test_scaled_size_rounds_half_to_even():
    assert scaled_size((5, 7), 0.5) == (2, 4)
    image = np.zeros((5, 7), np.uint8)
    assert cv2.resize(image, None, fx=0.5, fy=0.5).shape == (2, 4)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="scale_min"):
        AugmentSettings(scale_min=2, scale_max=1)
    with pytest.raises(ValueError, match="flip_probability"):
        AugmentSettings(flip_probability=1.5)


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
