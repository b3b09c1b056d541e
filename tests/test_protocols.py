"""Geometry of the evaluation protocols against values worked by hand."""

import numpy as np
import pytest

from psp_jax.protocols import MULTI, SINGLE, WHOLE_VIEW, choose, grouped, layout, mmseg, origins, plan, semseg

CROP = (473, 473)


def test_semseg_sizes_are_those_of_the_published_protocol() -> None:
    protocol = semseg(MULTI, 512, CROP)
    assert protocol.stride == (316, 316)  # ceil(473 * 2 / 3)
    assert semseg(SINGLE, 2048, (713, 713)).stride == (476, 476)
    assert protocol.resized((512, 683), 1.0) == (384, 512)  # round(512 / 683 * 512) = round(383.8)
    assert protocol.resized((683, 512), 1.75) == (896, 672)
    assert protocol.resized((100, 100), 0.5) == (256, 256)
    assert protocol.resized((7, 4000), 1.0) == (1, 512)
    assert protocol.canvas((512, 683), 1.0) == (473, 512)


def test_windows_cover_the_canvas_and_the_last_is_shifted_back() -> None:
    assert origins(473, 473, 316) == [0]
    assert origins(512, 473, 316) == [0, 39]
    assert origins(896, 473, 316) == [0, 316, 423]
    assert origins(200, 473, 316) == [0]
    # Cityscapes at one scale: two rows of four windows, and their mirror images.
    protocol = semseg(SINGLE, 2048, (713, 713))
    shapes = layout(protocol, [(1024, 2048)])
    assert shapes.windows == 16
    tops, lefts = origins(1024, 713, 476), origins(2048, 713, 476)
    assert (tops, lefts) == ([0, 311], [0, 476, 952, 1335])


def test_padding_is_symmetric_with_the_odd_row_after() -> None:
    protocol = semseg(SINGLE, 512, CROP)
    steps = plan(protocol, layout(protocol, [(512, 683)]), (512, 683))
    assert steps["views"].tolist() == [[384, 512, 44, 0]]  # 473 - 384 = 89 rows are missing, 44 before
    assert steps["count"] == 4
    assert steps["windows"].tolist() == [[0, 0, 0, 0], [0, 0, 39, 0], [0, 0, 0, 1], [0, 0, 39, 1]]


def test_mmseg_sizes() -> None:
    protocol = mmseg(SINGLE, (2048, 512), WHOLE_VIEW)
    assert protocol.resized((512, 683), 1.0) == (512, 683)
    assert protocol.resized((1000, 3000), 1.0) == (512, 1536)
    assert protocol.resized((500, 4000), 1.0) == (256, 2048)
    assert protocol.resized((256, 341), 1.25) == (640, 853)  # limits 2560 and 640; 341 * 2.5 = 852.5, half up
    assert mmseg(SINGLE, (2048, 1024), (769, 769)).stride == (513, 513)
    assert mmseg(SINGLE, (520, 520), (480, 480)).stride == (320, 320)
    assert not protocol.mirrored
    assert len(mmseg(MULTI, (2048, 512), WHOLE_VIEW).views) == 12


@pytest.mark.parametrize("protocol", [semseg(MULTI, 90, (41, 49)), mmseg(MULTI, (160, 90), (41, 49))], ids=str)
@pytest.mark.parametrize("size", [(60, 90), (90, 31), (200, 210), (1, 1), (3, 80)])
def test_shares_of_all_windows_add_up_to_one_everywhere(protocol, size) -> None:
    shapes = layout(protocol, [size, (50, 50)])
    steps = plan(protocol, shapes, size)
    assert steps["windows"].shape == (shapes.windows, 4)
    assert steps["row_shares"].shape == (len(protocol.views), shapes.shape[0])
    height, width = protocol.window
    for view, (scale, _) in enumerate(protocol.views):
        total = np.zeros(shapes.shape)
        for which, top, left, _ in steps["windows"][: steps["count"]]:
            if which == view:
                rows = steps["row_shares"][view, top : top + height]
                columns = steps["column_shares"][view, left : left + width]
                total[top : top + height, left : left + width] += rows[:, None] * columns
        canvas = protocol.canvas(size, scale)
        np.testing.assert_allclose(total[: canvas[0], : canvas[1]], 1, atol=1e-6)
        assert total.sum() == pytest.approx(canvas[0] * canvas[1], rel=1e-6)


def test_whole_views_of_similar_shape_share_a_window() -> None:
    sizes = [(512, 683), (683, 512), (500, 700), (512, 2000), (512, 690)]
    groups = grouped(mmseg(SINGLE, (2048, 512), WHOLE_VIEW), sizes)
    assert len(groups) == 3
    assert sorted(i for _, members in groups for i in members) == [0, 1, 2, 3, 4]
    for protocol, members in groups:
        for i in members:
            assert all(n <= w for n, w in zip(protocol.resized(sizes[i], 1.0), protocol.window, strict=True))
    assert {frozenset(members) for _, members in groups} == {frozenset({0, 2, 4}), frozenset({1}), frozenset({3})}
    slide = mmseg(SINGLE, (2048, 512), (480, 480))
    assert grouped(slide, sizes) == [(slide, [0, 1, 2, 3, 4])]
    many = [(512, 512 + 3 * i) for i in range(300)]
    assert len(grouped(mmseg(MULTI, (2048, 512), WHOLE_VIEW), many)) == 3


def test_names_and_numbers_are_checked() -> None:
    assert choose("whole", "single", (), None, (), CROP) is None
    assert choose("semseg", "multi", (), None, (), CROP) == semseg(MULTI, 512, CROP)
    assert choose("mmseg", "single", (2048, 1024), (769, 769), (513,), CROP) == mmseg(SINGLE, (2048, 1024), (769, 769))
    for wrong, words in [
        (("pspnet", "single", (), None, ()), "choose one of: semseg, mmseg, whole"),
        (("semseg", "both", (), None, ()), "choose one of: single, multi"),
        (("whole", "multi", (), None, ()), "has no scales"),
        (("semseg", "single", (2048, 512), None, ()), r"takes \(long side,\)"),
        (("mmseg", "single", (512,), None, ()), r"takes \(long, short\)"),
        (("semseg", "single", (), None, (0,)), "in pixels"),
        (("semseg", "single", (), None, (500,)), "larger than the window"),
    ]:
        with pytest.raises(ValueError, match=words):
            choose(*wrong, CROP)
