"""Checks the one-warp augmentation against step-by-step chains, and the law of what is drawn."""

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
    augment,
    draw,
    limited_size,
    redraw_crop,
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale_min": 2, "scale_max": 1}, "scale_min"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"base_size": (2048, 1024, 512)}, r"base_size=\(2048, 1024, 512\) must be \(long side,\) or"),
        ({"base_size": (0,)}, "base_size"),
        ({"max_class_share": 0.0}, "max_class_share=0.0 must be above 0"),
        ({"max_class_share": 75}, "max_class_share"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        AugmentSettings(**wrong)


def test_what_is_off_draws_nothing():
    """The numbers that a generator gives do not change, so neither does a run of semseg's recipe."""
    drawn = draw(np.random.default_rng(0), SIZE, (71, 83), DEFAULT_SETTINGS)
    assert drawn == Augmentation(1.4554425309821815, -9.180529521276107, True, False, 45, 99)


@pytest.mark.parametrize(
    ("size", "base_size", "scale", "expected"),
    [
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((512, 683), (2048, 512), 0.5, (256, 342)),  # 341.5, halves up
        ((300, 400), (2048, 512), 1.5, (768, 1024)),
        ((100, 800), (2048, 512), 1.0, (256, 2048)),  # the long limit holds
        ((800, 100), (512, 2048), 1.0, (2048, 256)),  # either way round
        ((375, 500), (520, 520), 1.0, (390, 520)),
        ((375, 500), (520,), 1.0, (390, 520)),
        ((500, 333), (520,), 0.7, (364, 242)),  # 242.424
        ((500, 333), (521,), 0.7, (364, 242)),  # 364.7 is cut
        ((1, 900), (100,), 0.5, (1, 50)),  # never 0
    ],
)
def test_limited_size(size, base_size, scale, expected):
    assert limited_size(size, base_size, scale) == expected


@pytest.mark.parametrize("base_size", [(150,), (400, 110)])
def test_a_base_size_equals_cv2_resize_to_that_size(base_size):
    settings = AugmentSettings(rotate_probability=0, blur_probability=0, flip_probability=0, base_size=base_size)
    rng = np.random.default_rng(1)
    for seed in range(30):
        image, label = scene(seed)
        drawn = draw(rng, SIZE, (61, 73), settings)
        height, width = limited_size(SIZE, base_size, drawn.scale)
        resized = cv2.resize(image.astype(np.float32), (width, height))
        nearest = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)
        crop_image, crop_label = apply(image, label, drawn, (61, 73))
        window = np.s_[max(drawn.top, 0) : drawn.top + 61, max(drawn.left, 0) : drawn.left + 73]
        inside = np.s_[max(-drawn.top, 0) : height - drawn.top, max(-drawn.left, 0) : width - drawn.left]
        assert np.abs(crop_image[inside] - resized[window]).max() <= 2
        np.testing.assert_array_equal(crop_label[inside], nearest[window])
        assert (crop_label == LABEL_FILL).sum() == crop_label.size - nearest[window].size


def test_crops_are_drawn_anew_until_no_class_has_the_share():
    """Class 1 is a stripe of 20 columns on the right: a crop of 40 has at most half of it, and often nothing."""
    label = np.zeros((40, 200), np.uint8)
    label[:, 180:] = 1
    settings = AugmentSettings(1, 1, 0, 0, 0, 0)
    rng = np.random.default_rng(0)
    accepted = exhausted = 0
    for _ in range(200):
        first = draw(rng, label.shape, (40, 40), settings)
        drawn = redraw_crop(rng, label, first, (40, 40), 0.75)
        shares = [(label[:, d.left : d.left + 40] == 0).mean() for d in (first, drawn)]
        if shares[0] < 0.75:
            assert drawn == first  # what is good stays
        accepted += shares[1] < 0.75
        exhausted += shares[1] >= 0.75
    # Good corners are 151 to 160 of 0 to 160: one try fails with 151/161, eleven with 0.49.
    assert exhausted / 200 == pytest.approx(0.49, abs=0.11)
    assert accepted + exhausted == 200


@pytest.mark.parametrize(("second", "moved"), [(0, True), (LABEL_FILL, True), (1, False)])
def test_a_crop_of_one_class_is_drawn_anew(second, moved):
    """The left half is class 0, the right half another value: void does not count as a class."""
    label = np.zeros((8, 64), np.uint8)
    label[:, 32:] = second
    first = Augmentation(1.0, 0.0, False, False, 0, 24)
    drawn = redraw_crop(np.random.default_rng(3), label, first, (8, 16), 0.75)
    assert (drawn != first) == moved


def test_void_does_not_count_for_the_share():
    label = np.full((8, 16), LABEL_FILL, np.uint8)
    label[0, :2], label[1, :2] = 0, 1
    first = Augmentation(1.0, 0.0, False, False, 0, 0)
    assert redraw_crop(np.random.default_rng(0), label, first, (8, 12), 0.75) == first
    assert redraw_crop(np.random.default_rng(0), label, first, (8, 12), 0.5) != first  # each has exactly half


def test_colours_change_within_the_padding_only():
    image, label = scene(3)
    settings = {"scale_max": 0.6, "blur_probability": 0, "rotate_probability": 0}
    changed = 0
    for seed in range(8):
        plain = augment(np.random.default_rng(seed), image, label, SIZE, AugmentSettings(**settings))
        vivid = augment(np.random.default_rng(seed), image, label, SIZE, AugmentSettings(**settings, photometric=True))
        np.testing.assert_array_equal(vivid[1], plain[1])
        padding = plain[1] == LABEL_FILL
        assert padding.any()
        assert (vivid[0][padding] == PIXEL_FILL).all()
        changed += (vivid[0] != plain[0]).any()
    assert changed >= 6
