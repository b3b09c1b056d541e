"""Preparation: once, by one process, safe against being killed, with a sentence for everything that can be wrong."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import data_sets
import pytest
from file_server import Server, running_server

from psp_jax import prepare
from psp_jax.data import prepared
from psp_jax.data.builders import voc2012
from psp_jax.data.prepared import describe, ensure_prepared
from psp_jax.data.source import open_source

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return data_sets.write_folder(tmp_path / "photos", {"train": 6, "val": 3})


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return data_sets.write_zip(tmp_path / "ade.zip", data_sets.ade20k_members({"training": 3, "validation": 2}))


def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(directory: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name[0] != "."
    }


def test_ade20k_twice(tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "ade20k", "--data_dir", str(tmp_path / "data"), "--archive", str(archive)]
    prepare.main(flags)
    first = capsys.readouterr().out.splitlines()
    assert first[0].startswith("Preparing ade20k in")
    assert (
        "train 3 (up to 32x40 pixels), validation 2 (up to 32x40 pixels); 150 classes. Not the full ADE20K" in first[1]
    )
    written = files(tmp_path / "data")
    archive.unlink()  # a prepared data set does not need it any more
    prepare.main(flags)
    assert capsys.readouterr().out.splitlines() == first[1:]
    assert files(tmp_path / "data") == written


def test_context_scenes_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psp_jax.data.builders.context_scenes.COUNTS", {"train": 7, "validation": 2})
    prepare.main(["--dataset", "context_scenes", "--data_dir", str(tmp_path)])
    source = open_source("context_scenes", tmp_path, "train")
    assert (len(source), source[0]["image"].shape, source.classes.name) == (7, (128, 128, 3), "context_scenes")


def test_image_folder_by_command(tmp_path: Path, photos: Path) -> None:
    (photos / "classes.json").rename(tmp_path / "table.json")
    flags = ["--dataset", "image_folder", "--source", str(photos), "--data_dir", str(tmp_path / "data")]
    with pytest.raises(FileNotFoundError, match=r"classes\.json; write one such as"):
        prepare.main(flags)
    prepare.main([*flags, "--classes", str(tmp_path / "table.json")])
    places = {"prepared_dir": tmp_path / "data", "classes": tmp_path / "table.json"}
    assert len(open_source("image_folder", photos, "val", **places)) == 3


def test_a_changed_folder_is_prepared_anew(tmp_path: Path, photos: Path) -> None:
    said: list[str] = []
    first = ensure_prepared("image_folder", photos, prepared_dir=tmp_path / "data", say=said.append)
    (photos / "images/val/photo002.jpg").unlink()
    (photos / "annotations/val/photo002.png").unlink()
    with pytest.raises(FileNotFoundError, match="prepare --dataset image_folder --source"):
        open_source("image_folder", photos, "val", prepared_dir=tmp_path / "data")
    second = ensure_prepared("image_folder", photos, prepared_dir=tmp_path / "data", say=said.append)
    assert first != second and str(first.parents[1]) in said[1]
    assert len(open_source("image_folder", photos, "val", prepared_dir=tmp_path / "data")) == 2


def test_a_bad_pair_is_named_and_leaves_nothing(tmp_path: Path, photos: Path) -> None:
    bad = photos / "annotations/val/photo001.png"
    bad.write_bytes(data_sets.encode(data_sets.annotation(1, 3) + 3))
    with pytest.raises(ValueError, match=f"^{bad} holds the value 3, 4, 5, which the class table photos does not know"):
        ensure_prepared("image_folder", photos, prepared_dir=tmp_path / "data")
    assert not files(tmp_path / "data")


DIE = """
import os, signal, sys
from psp_jax.data.builders.image_folder import ImageFolder
from psp_jax.data.prepared import ensure_prepared
read = ImageFolder.pair
def pair(self, split, index):
    if (split, index) == ("val", 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, split, index)
ImageFolder.pair = pair
ensure_prepared("image_folder", sys.argv[1], prepared_dir=sys.argv[2])
"""


def test_a_killed_preparation_is_done_again(tmp_path: Path, photos: Path) -> None:
    process = start(DIE, photos, tmp_path / "data")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = [path.parent for path in (tmp_path / "data").rglob("*train*array_record*")]
    assert len(left) == 1  # the first split was written
    with pytest.raises(FileNotFoundError, match="prepare it"):
        open_source("image_folder", photos, "train", prepared_dir=tmp_path / "data")
    said: list[str] = []
    directory = ensure_prepared("image_folder", photos, prepared_dir=tmp_path / "data", say=said.append)
    assert said[0] == f"Removing {left[0]}, left behind by a preparation that was interrupted."
    assert not left[0].exists()
    assert "train 6 (up to 32x40 pixels), val 3 (up to 32x40 pixels); 3 classes." in describe(directory)


def test_a_missing_shard_is_refused_with_the_remedy(tmp_path: Path, archive: Path) -> None:
    directory = ensure_prepared("ade20k", tmp_path / "data", archive=archive)
    next(directory.glob("*validation*")).unlink()
    for attempt in (
        lambda: ensure_prepared("ade20k", tmp_path / "data", archive=archive),
        lambda: open_source("ade20k", tmp_path / "data", "train"),
    ):
        with pytest.raises(ValueError, match=f"validation.* is missing; delete the folder {directory} and prepare"):
            attempt()


TOGETHER = """
import sys, time
from psp_jax.data.builders.image_folder import ImageFolder
from psp_jax.data.prepared import ensure_prepared
read = ImageFolder.pair
def pair(self, split, index):
    time.sleep(0.2)
    return read(self, split, index)
ImageFolder.pair = pair
ensure_prepared("image_folder", sys.argv[1], prepared_dir=sys.argv[2])
"""


def test_of_two_processes_one_prepares(tmp_path: Path, photos: Path) -> None:
    processes = [start(TOGETHER, photos, tmp_path / "data") for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("Preparing" in text for text in said) == 1
    assert not any("Removing" in text for text in said)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--dataset", "ade21k"], "No data set ade21k; known are ade20k, "),
        (["--dataset", "scene_parse150"], "scene_parse150 holds the instance labels .*; use the data set ade20k"),
        (["--dataset", "scene_parse150:1.0.0"], "use the data set ade20k"),
        (["--dataset", "image_folder"], "image_folder needs --source FOLDER"),
        (["--dataset", "ade20k", "--source", "x"], "image_folder needs --source FOLDER, and no other"),
        (["--dataset", "image_folder", "--source", "nowhere"], "There is no folder nowhere"),
        (
            ["--dataset", "image_folder", "--source", "nowhere", "--archive", "x"],
            "image_folder takes no archive, only ade20k, cityscapes, pascal_context, voc2012 do",
        ),
        (["--dataset", "ade20k", "--archive", "nowhere.zip"], r"There is no archive nowhere\.zip"),
        (
            ["--dataset", "voc2012", "--archive", "nowhere"],
            r"/nowhere is not a folder; for voc2012 name the folder that holds VOCtrainval_11-May-2012\.tar and bench",
        ),
        (["--dataset", "cityscapes", "--archive", __file__], r"test_prepare\.py is not a folder; for cityscapes name"),
        (
            ["--dataset", "cityscapes"],
            r"data/downloads holds neither leftImg8bit_trainvaltest\.zip nor the folder leftImg8bit unpacked from it; "
            r"fetch it from https://www\.cityscapes-dataset\.com/downloads/ \(with a login\) and put it there",
        ),
        (
            ["--dataset", "ade20k", "--classes", "camvid"],
            "has its own classes; leave the class table camvid out",
        ),
    ],
)
def test_wrong_flags(tmp_path: Path, flags: list[str], problem: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        prepare.main([*flags, "--data_dir", str(tmp_path / "data")])


def test_no_place_to_write(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(ValueError, match=r"Cannot write to .*data/ade20k \(.+\); name another folder"):
        ensure_prepared("ade20k", tmp_path / "data", archive=archive)


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


def test_ade20k_is_downloaded_once(
    tmp_path: Path, archive: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = archive.read_bytes()
    monkeypatch.setattr(prepared, "ADE20K_URL", server.url)
    monkeypatch.setattr(prepared, "ADE20K_SHA1", hashlib.sha1(server.content).hexdigest())
    directory = ensure_prepared("ade20k", tmp_path / "data")
    assert "train 3" in describe(directory)
    assert (tmp_path / "data/downloads/a.zip").is_file()
    ensure_prepared("ade20k", tmp_path / "data")
    assert server.requests == [None]


def test_voc_archives_are_downloaded_where_they_are_missing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SBD's alone is fetched, since VOC's is there; and neither where SegmentationClassAug is."""
    sbd = data_sets.write_tar(tmp_path / "a.tgz", data_sets.sbd_members())
    server.content = sbd.read_bytes()
    part = voc2012.SBD._replace(url=server.url, md5=hashlib.md5(server.content).hexdigest())
    monkeypatch.setattr(voc2012.Voc2012, "parts", (voc2012.VOC, part))
    for name in ("one", "two"):
        (tmp_path / name / "downloads").mkdir(parents=True)
        data_sets.write_tar(tmp_path / name / "downloads" / voc2012.VOC.archive, data_sets.voc_members())
    said: list[str] = []
    assert "train_aug 5" in describe(ensure_prepared("voc2012", tmp_path / "one", say=said.append))
    target = tmp_path / "one/downloads/benchmark.tgz"
    assert said[0] == f"Fetching {server.url} to {target} (about 1.4 GB)." and target.is_file()
    label = {f"SegmentationClassAug/{data_sets.VOC_IDS[5]}.png": data_sets.encode(data_sets.sbd_label(5))}
    data_sets.unpack(tmp_path / "two/downloads", label)
    assert "train_aug 4" in describe(ensure_prepared("voc2012", tmp_path / "two", say=said.append))
    assert server.requests == [None]


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "ADE20K_URL", "http://127.0.0.1:9/ADEChallengeData2016.zip")
    with pytest.raises(FileNotFoundError) as caught:
        ensure_prepared("ade20k", tmp_path / "data")
    message = str(caught.value)
    assert "127.0.0.1:9/ADEChallengeData2016.zip" in message and "refused" in message
    assert f"put it at {tmp_path}/data/downloads/ADEChallengeData2016.zip, or run" in message
    assert f"--data_dir {tmp_path}/data --archive PATH" in message
