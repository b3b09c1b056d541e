"""Training is the same on one device, on eight, on meshes that spread each image, and on several processes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment, free_address

SCRIPT = ROOT / "tests" / "train_steps.py"
# The rows of 57-pixel crops do not divide: two or four devices take 64 between them.
ODD = {"model.align_corners": True, "train.crop_size": [57]}


def start(devices: int, output: Path, fields: dict, *distributed: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(output), json.dumps(fields), *map(str, distributed)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes: list[subprocess.Popen], output: Path) -> dict[str, np.ndarray]:
    for process in processes:
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 0, text
    with np.load(output) as file:
        return dict(file)


def run(devices: int, output: Path, **fields: object) -> dict[str, np.ndarray]:
    return finish([start(devices, output, fields)], output)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return run(1, tmp_path_factory.mktemp("devices") / "one.npz")


@pytest.fixture(scope="module")
def one_device_odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return run(1, tmp_path_factory.mktemp("devices") / "odd.npz", **ODD)


def compare(ours: dict[str, np.ndarray], one: dict[str, np.ndarray], update_error: float = 1e-4) -> None:
    assert one["devices"] == 1
    assert ours["devices"] == 8
    assert ours["compiles"] == one["compiles"] == 1
    assert set(ours) == set(one) >= {"averaged/head/classifier/conv/kernel"}
    for step, bound in enumerate((1e-5, 1e-3, 1e-3)):
        np.testing.assert_allclose(ours[f"loss{step}"], one[f"loss{step}"], rtol=bound)
    for name in one:
        if name.startswith(("batch_stats/", "params/", "averaged/")):
            error = np.linalg.norm(ours[name] - one[name]) / np.linalg.norm(one[name])
            assert error < (1e-5 if name.startswith("batch_stats/") else update_error), name


def test_eight_devices(one_device: dict[str, np.ndarray], tmp_path: Path) -> None:
    compare(run(8, tmp_path / "eight.npz"), one_device)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"mesh.spatial": 2},
        {"mesh.spatial": 4, "model.convolutions": "rows", "model.remat": True},
        {"mesh.spatial": 4, "model.phases": True},
    ],
    ids=["rows over two", "rows over four, recomputed, convolutions by rows", "phases over four"],
)
def test_rows_that_do_not_divide(fields: dict, one_device_odd: dict[str, np.ndarray], tmp_path: Path) -> None:
    """One ReLU that rounding switches moves a bias near zero by a thousandth; a lost row moves it by its own size."""
    compare(run(8, tmp_path / "eight.npz", **ODD, **fields), one_device_odd, update_error=0.02)


@pytest.mark.slow
def test_statistics_by_groups_of_images(one_device: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Of four images each, whatever the devices, whose number is neither that of the groups nor of their images."""
    fields = {"model.bn_group_size": 4}
    one = run(1, tmp_path / "one.npz", **fields)
    compare(run(8, tmp_path / "eight.npz", **fields), one)
    assert abs(one["loss0"] - one_device["loss0"]) > 1e-4


@pytest.mark.slow
def test_four_processes_two_to_an_image(one_device: dict[str, np.ndarray], tmp_path: Path) -> None:
    coordinator, output = free_address(), tmp_path / "many.npz"
    fields = {"mesh.spatial": 4}
    compare(finish([start(2, output, fields, coordinator, 4, rank) for rank in range(4)], output), one_device)


@pytest.mark.slow
def test_encnet_on_eight_devices(tmp_path: Path) -> None:
    """The classes present and the statistics over codewords are those of the global batch, rows split or not."""
    one = run(1, tmp_path / "one.npz", **{"model.head": "enc", "model.lateral": True})
    assert "batch_stats/head/encoding_bn/mean" in one
    eight = run(8, tmp_path / "eight.npz", **{"model.head": "enc", "model.lateral": True, "mesh.spatial": 2})
    compare(eight, one)
