"""Training is the same on one device, on eight, on a mesh that splits rows, and on two processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment, free_address

SCRIPT = ROOT / "tests" / "train_steps.py"


def start(devices: int, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes: list[subprocess.Popen], output: Path) -> dict[str, np.ndarray]:
    for process in processes:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
    with np.load(output) as file:
        return dict(file)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    output = tmp_path_factory.mktemp("devices") / "one.npz"
    return finish([start(1, output)], output)


def compare(ours: dict[str, np.ndarray], one: dict[str, np.ndarray]) -> None:
    assert one["devices"] == 1
    assert ours["devices"] == 8
    assert ours["compiles"] == one["compiles"] == 1
    assert set(ours) == set(one) >= {"averaged/head/classifier/conv/kernel"}
    np.testing.assert_allclose(ours["loss0"], one["loss0"], rtol=1e-5)
    for name in one:
        if name.startswith(("batch_stats/", "params/", "averaged/")):
            error = np.linalg.norm(ours[name] - one[name]) / np.linalg.norm(one[name])
            assert error < (1e-5 if name.startswith("batch_stats/") else 1e-4), name


@pytest.mark.parametrize("spatial", [1, 2])
def test_eight_devices(spatial: int, one_device: dict[str, np.ndarray], tmp_path: Path) -> None:
    output = tmp_path / "eight.npz"
    compare(finish([start(8, output, spatial)], output), one_device)


def test_two_processes(one_device: dict[str, np.ndarray], tmp_path: Path) -> None:
    coordinator = free_address()
    output = tmp_path / "two.npz"
    processes = [start(4, output, 1, "psp", coordinator, 2, rank) for rank in range(2)]
    compare(finish(processes, output), one_device)


def test_encnet_on_eight_devices(tmp_path: Path) -> None:
    """The classes present and the statistics over codewords are those of the global batch, rows split or not."""
    one = finish([start(1, tmp_path / "one.npz", 1, "enc")], tmp_path / "one.npz")
    assert "batch_stats/head/encoding_bn/mean" in one
    compare(finish([start(8, tmp_path / "eight.npz", 2, "enc")], tmp_path / "eight.npz"), one)
