"""What the benchmarks compare computes the same, and their tables tell what their records hold."""

import json
import os
import shlex
import zipfile
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import data_wait, input_pipeline, precision, tpu_estimate
from benchmarks.convolutions import LOWERINGS, native
from benchmarks.record import header, without_places
from benchmarks.run import Machine, jobs, speed_table
from benchmarks.train_step import Side, random_batch, take_turns
from psp_jax.data.decode import decode_annotation, decode_image
from tests.conftest import ROOT


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("size", [(12, 8), (13, 7)])
def test_lowerings_of_a_dilated_convolution_agree(dilation: int, size: tuple[int, int]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *size, 5))
    kernel = jax.random.normal(keys[1], (3, 3, 5, 6))
    gradient = jax.random.normal(keys[2], (2, *size, 6))
    expected, pull = jax.vjp(lambda x, k: native(x, k, dilation), x, kernel)
    for name, convolve in LOWERINGS.items():
        value, ours = jax.vjp(lambda x, k, f=convolve: f(x, k, dilation), x, kernel)
        np.testing.assert_allclose(value, expected, atol=1e-4, err_msg=name)
        for a, b in zip(ours(gradient), pull(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3, err_msg=name)


def test_the_peer_is_the_same_network() -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.torch_pspnet import PSPNet

    network = PSPNet(150, (3, 4, 6, 3))
    assert sum(p.numel() for p in network.parameters()) == 49_180_908


def test_random_batches_hold_void() -> None:
    image, label = random_batch(2, 33)
    assert image.shape == (2, 33, 33, 3)
    assert 0.02 < (label == 255).mean() < 0.09
    assert jnp.asarray(image).dtype == jnp.uint8


class Draws:
    """A generator whose draws are given; offsets of crops are 0."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)

    def integers(self, low: int, high: int) -> int:
        return low


def test_the_official_chain_normalises_and_crops(tmp_path: Path) -> None:
    input_pipeline.write_images(tmp_path, None, 1)
    image, label = (
        tmp_path / f"{part}/train/00000.{kind}" for part, kind in (("images", "jpg"), ("annotations", "png"))
    )
    pixels, classes = decode_image(image.read_bytes(), ""), decode_annotation(label.read_bytes(), "")
    assert pixels.shape == (512, 683, 3)
    # scale 1, not rotated, not blurred, mirrored
    found, target = input_pipeline.chain(Draws(1 / 3, 0.9, 0.9, 0.1), str(image), str(label))
    expected = (pixels[:, ::-1][:473, :473] - np.array([123.675, 116.28, 103.53])) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-4)
    np.testing.assert_array_equal(target, classes[:, ::-1][:473, :473])
    # scale 0.5, rotated by 9 degrees, blurred: padded to the crop
    found, target = input_pipeline.chain(Draws(0, 0.1, 0.95, 0.1, 0.9), str(image), str(label))
    assert found.shape == (3, 473, 473) and found.dtype == np.float32
    assert (target[:108] == 255).all() and (target[200, 100:300] != 255).all()
    np.testing.assert_allclose(found[:, :108], 0, atol=1e-4)


def test_images_of_an_archive_are_repeated(tmp_path: Path) -> None:
    pair = input_pipeline.made_up(0)
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for folder, suffix, data in zip(("images", "annotations"), ("jpg", "png"), pair, strict=True):
            archive.writestr(f"ADE/{folder}/validation/one.{suffix}", data)
    assert input_pipeline.write_images(tmp_path / "out", tmp_path / "some.zip", 3) == "1 images of some.zip"
    written = sorted((tmp_path / "out/images/train").iterdir())
    assert [path.read_bytes() for path in written] == [pair[0]] * 3
    assert cv2.imread(str(written[0])).shape == (512, 683, 3)


class Counting:
    """A source of plain images that counts how many are taken."""

    max_size, taken = (8, 8), 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, object]:
        self.taken += 1
        return {"image": np.zeros((8, 8, 3), np.uint8), "label": np.zeros((8, 8), np.uint8), "id": str(index)}


def test_nothing_of_ours_is_read_ahead_in_the_turn_of_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = Counting(), []
    monkeypatch.setattr(input_pipeline, "CROP", (8, 8))
    monkeypatch.setattr(input_pipeline, "chain_batch", lambda *_: seen.append(source.taken))
    found = input_pipeline.measure_sides(source, [], batch=2, rounds=2)
    assert seen == [8] * 4 + [16] * 4 + [24] * 4  # a turn is four batches of two
    assert len(found["rounds"]["psp_jax"]) == 2


def test_sides_take_turns() -> None:
    calls: list[str] = []
    sides = [Side(name, lambda name=name: calls.append(name), lambda _: None, lambda: {"fact": 1}) for name in "ab"]
    rows = take_turns(sides, batch=4, repeats=2)
    assert "".join(calls) == "ab" + 2 * "aaabbb"
    assert [row["side"] for row in rows] == ["a", "b"]
    assert all(len(row["rounds_milliseconds"]) == 2 and row["fact"] == 1 for row in rows)
    assert rows[0]["images_per_second"] == pytest.approx(4e3 / rows[0]["milliseconds"])


def test_the_wait_for_data_is_weighed_by_time(tmp_path: Path) -> None:
    rows = [{"step": 10, "images_per_second": 1.0, "data_wait": 0.1}, {"step": 15, "loss": 1.0}]
    rows.append({"step": 20, "images_per_second": 4.0, "data_wait": 0.5})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = data_wait.summary(tmp_path)
    # an image took 1 s in the first interval and 1/4 s in the second
    assert found["data_wait"] == pytest.approx((0.1 + 0.125) / 1.25)
    assert found["images_per_second"] == pytest.approx(1.6)
    assert (found["steps"], found["intervals"], found["worst"]) == (20, 2, 0.5)
    with pytest.raises(FileNotFoundError, match="train first"):
        data_wait.summary(tmp_path / "none")


def test_a_wait_has_date_and_versions_of_its_run(tmp_path: Path) -> None:
    row = {"step": 10, "images_per_second": 2.0, "data_wait": 0.1}
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/metrics.jsonl").write_text(json.dumps(row))
    (tmp_path / "quickstart/config.json").write_text(
        '{"resolved": {"device_kind": "TPU v9"}, "versions": {"jax": "0"}}'
    )
    os.utime(tmp_path / "quickstart/metrics.jsonl", (10**9, 10**9))
    found = data_wait.provenance(tmp_path / "quickstart")
    assert found == {"date": "2001-09-09", "device": "TPU v9", "versions": {"jax": "0"}}
    rows = [data_wait.summary(tmp_path / "quickstart") | found]
    (tmp_path / "data_wait_cpu.json").write_text(json.dumps({"command": "python", "rows": rows}))
    assert "| waiting for data, quickstart | 10.00 % |  |  | TPU v9 | 2001-09-09 |" in speed_table(tmp_path)
    jobs_here = {job.name: job for job in jobs(Machine("cpu", {"libtpu"}), tmp_path)}
    assert "is there already" in jobs_here["quickstart"].left_out


def test_estimates_of_a_plan_become_a_table() -> None:
    row = {"target": "v5e:2x2", "chips": 4, "batch_size": 16, "cycles": 93_481_581, "step_seconds": 0.062321054}
    row |= {"images_per_second": 256.735, "mfu": 0.33165, "memory_total": 3_754_190_336}
    away = {"target": "v4:1x1x1", "chips": 16, "step_seconds": None, "memory_total": None}
    table = tpu_estimate.as_markdown(header() | {"rows": [row, row | away]}).splitlines()
    assert table[4] == "| v5e:2x2 | 4 | 93.5 | 62.32 | 257 | 33.2 % | 3.50 |"
    assert table[5] == "| v4:1x1x1 | 1 | does not fit |  |  |  | more than it has |"


def test_two_curves() -> None:
    curve = [(10 * i, float(i)) for i in range(1, 21)]
    loss = precision.smoothed(curve)
    assert loss[0] == (10, 1.0) and loss[-1] == (200, 15.5)
    record = {"loss": {"float32": loss, "bfloat16": [(s, v + 1) for s, v in loss]}}
    record["mean_iou"] = {"float32": [(100, 0.5)], "bfloat16": [(100, 0.25)]}
    lines = precision.as_markdown(record).splitlines()
    assert lines[2:] == [
        "| mean IoU at step 100, % | 50.00 | 25.00 |",
        "| loss, mean of the last 10 intervals | 15.5000 | 16.5000 |",
    ]
    drawn = np.asarray(precision.draw({"loss": record["loss"]}))
    blue, red = ((drawn == np.array(ink)).all(-1) for ink in precision.INKS.values())
    assert blue.sum() > 300 and red.sum() > 300
    assert np.nonzero(red)[0].mean() < np.nonzero(blue)[0].mean()  # the greater loss is the higher line


def test_what_a_machine_lacks_is_left_out_in_words(tmp_path: Path) -> None:
    found = {job.name: job for job in jobs(Machine("cpu", {"cv2", "torch"}), tmp_path)}
    assert "psp-jax[plan]" in found["tpu_estimate"].left_out
    assert "--camvid" in found["precision"].left_out
    assert "--crop" in found["train_step"].command
    gpu = {job.name: job for job in jobs(Machine("NVIDIA H200", {"libtpu"}, camvid=tmp_path), tmp_path)}
    assert not any(job.left_out for job in gpu.values())
    assert gpu["train_step"].command == ["train_step.py"]
    for job in gpu.values():
        assert job.command[0] == "-m" or (ROOT / "benchmarks" / job.command[0]).is_file()


def test_the_table_of_all_records(tmp_path: Path) -> None:
    def record(name: str, **values: object) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"date": "2026-01-01", **values}))

    machine = {"cpu": "Some CPU", "cores": 2, "load": 9.4}
    rates = {"psp_jax": 360.0, "semseg chain": 60.0}
    record("input_cpu", machine=machine, images_per_core_second=rates, ratio=6.0)
    sides = [
        {"side": "psp_jax float32", "images_per_second": 3.0},
        {"side": "psp_jax bfloat16", "images_per_second": 5.0},
    ]
    sides.append({"side": "torch float32 eager", "images_per_second": 2.0})
    record("train_step_cpu", machine=machine, device="cpu", rows=sides, batch=2, crop=233)
    record("ablation_cpu", rows=[])
    lines = speed_table(tmp_path).splitlines()
    assert lines[4].endswith("| 360 | 60 | 6.0 times | Some CPU, 2 cores, load 9 | 2026-01-01 |")
    assert "float32, batch 2, crop 233" in lines[5] and "| 3.00 | 2.00 | 1.50 times |" in lines[5]
    assert "| 5.00 | not run |  |" in lines[6]
    assert lines[-1] == "On a GPU or a TPU nothing has been run."
    record("train_step_h200", machine=machine | {"load": 0.1}, device="NVIDIA H200", rows=sides, batch=16, crop=473)
    assert "| NVIDIA H200 | 2026-01-01 |" in speed_table(tmp_path)
    assert "nothing has been run" not in speed_table(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{ROOT}/benchmarks/run.py", "benchmarks/run.py"),
        (str(ROOT), "."),
        ("--log=/scratch/me/log.jsonl", "--log=log.jsonl"),
        ("--config.data.dir=~/data", "--config.data.dir=data"),
        ("/data/configs/mine.py:small", "mine.py:small"),
        ("--xla_dump_to=/tmp/dump --xla_foo=1/2", "--xla_dump_to=dump --xla_foo=1/2"),
        ("/scratch", "scratch"),
        *((same, same) for same in ("runs/mine", "../data", "gs://bucket/data", "--crop=(217, 289)/8", "512/64")),
    ],
)
def test_records_hold_no_place_of_this_machine(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_places(text) == expected
    monkeypatch.setattr("sys.argv", ["a.py", text])
    monkeypatch.setenv("XLA_FLAGS", text)
    assert header()["command"] == shlex.join(["python", "a.py", expected])
    assert header()["environment"]["XLA_FLAGS"] == expected
