"""Masks find their images by name, and pairs keep their split."""

from pathlib import Path

import pytest

from psp_jax.data.pairing import assign_splits, find_pairs


def test_the_same_pair_is_in_the_same_split_when_others_are_added() -> None:
    first = {f"photo{i}": (Path("a"), Path("b")) for i in range(300)}
    more = first | {f"other{i}": (Path("a"), Path("b")) for i in range(300)}
    split_of = {name: split for split, name in assign_splits(more, 0.2)}
    assert all(split_of[name] == split for split, name in assign_splits(first, 0.2))
    assert 0.14 < sum(split == "val" for split in split_of.values()) / 600 < 0.26  # 3.6 standard deviations


def test_each_split_gets_what_it_needs() -> None:
    for count in (3, 4, 5):
        for share in (1e-9, 1 - 1e-9):
            splits = [
                split for split, _ in assign_splits({str(i): (Path("a"), Path("b")) for i in range(count)}, share)
            ]
            assert splits.count("val") >= 1 and splits.count("train") >= 2
    with pytest.raises(ValueError, match="There are 2 pairs; at least two to train and one to validate"):
        assign_splits({"a": (Path("a"), Path("b")), "b": (Path("c"), Path("d"))}, 0.1)


def test_folders_of_splits_beside_others_are_refused() -> None:
    names = ("train/a", "train/b", "val/c", "extra/d", "e")
    pairs = {name: (Path(f"i/{name}.jpg"), Path("m")) for name in names}
    assert set(assign_splits({name: pairs[name] for name in names[:3]}, 0.5)) == {
        ("train", "a"),
        ("train", "b"),
        ("val", "c"),
    }
    for stray in ("extra/d", "e"):
        few = {name: pair for name, pair in pairs.items() if name in (*names[:3], stray)}
        with pytest.raises(ValueError, match=rf"i/{stray}\.jpg lies in no folder train, val or test, .*; move it into"):
            assign_splits(few, 0.5)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("a/x.jpg", "a/x.png"),
        ("x.JPG", "x_mask.png"),
        ("x_leftImg8bit.png", "x_gtFine_labelIds.png"),
        ("x.jpeg", "x_L.png"),
        ("deep/x.jpg", "elsewhere/x.png"),  # no path agrees, the names do
    ],
)
def test_names_that_belong_together(tmp_path: Path, image: str, label: str) -> None:
    for part, name in (("i", image), ("m", label), ("m", "y_color.png"), ("i", ".hidden.jpg")):
        (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part / name).touch()
    found = find_pairs(tmp_path / "i", tmp_path / "m")
    assert list(found.pairs.values()) == [(tmp_path / "i" / image, tmp_path / "m" / label)]
    assert (found.images_alone, found.masks_alone) == ([], [tmp_path / "m" / "y_color.png"])


def test_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png", "a_mask.png", "b_mask.png", "c_mask.png"):
        (tmp_path / name).touch()
    found = find_pairs(tmp_path, tmp_path)
    assert {name: pair[1].name for name, pair in found.pairs.items()} == {"a": "a_mask.png", "b": "b_mask.png"}
    for name in ("a_mask.png", "b_mask.png", "c_mask.png"):
        (tmp_path / name).unlink()
    (tmp_path / "a.png").touch()
    assert list(find_pairs(tmp_path, tmp_path).pairs.values()) == [(tmp_path / "a.jpg", tmp_path / "a.png")]
    with pytest.raises(ValueError, match=r"holds no masks \(\*_gt\.png\)"):
        find_pairs(tmp_path, tmp_path, "_gt")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"^Nothing tells images from masks in .* all are PNG: .* a folder of their"):
        find_pairs(tmp_path, tmp_path)


def test_one_folder_in_the_other(tmp_path: Path) -> None:
    for name in ("a.jpg", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pair = (tmp_path / "a.jpg", tmp_path / "masks" / "a.png")
    assert list(find_pairs(tmp_path, tmp_path / "masks").pairs.values()) == [pair]
    (tmp_path / "masks" / "a.png").rename(tmp_path / "a.png")
    (tmp_path / "a.jpg").rename(tmp_path / "masks" / "a.jpg")  # now the images are inside
    pair = (tmp_path / "masks" / "a.jpg", tmp_path / "a.png")
    assert list(find_pairs(tmp_path / "masks", tmp_path).pairs.values()) == [pair]


def test_ambiguous_names_are_refused_until_an_ending_decides(tmp_path: Path) -> None:
    for name in ("i/x.jpg", "m/x_labelIds.png", "m/x_labelTrainIds.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folders = tmp_path / "i", tmp_path / "m"
    with pytest.raises(
        ValueError, match=r"x_labelIds\.png and .*x_labelTrainIds\.png both fit the image .*--mask_ending"
    ):
        find_pairs(*folders)
    assert find_pairs(*folders, "_labelTrainIds").pairs["x"][1].name == "x_labelTrainIds.png"
    (tmp_path / "i" / "x.png").touch()
    with pytest.raises(ValueError, match=r"x\.jpg and .*x\.png both fit the mask"):
        find_pairs(*folders, "_labelIds")
