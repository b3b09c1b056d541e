"""What every test shares: virtual devices, and one finished run of the real command on a small data set."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Before anything imports jax: eight virtual devices, so that sharded code is what runs here too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Most of the suite's time is compilation, which takes half as long without optimisations, here and in subprocesses.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# A network and a schedule that two cores finish in seconds.
TINY = (
    "--config.model.depth=10",
    "--config.model.width=8",
    "--config.model.stem=32-32-64",
    "--config.model.head_channels=16",
    "--config.model.aux_channels=8",
    "--config.train.crop_size=(41,)",
    "--config.train.batch_size=4",
    "--config.eval.batch_size=4",
    "--config.train.log_every_steps=2",
    "--config.checkpoint.every_steps=4",
    "--config.log.tensorboard=False",
    "--config.train.steps=12",
)


def run_module(module: str, *arguments: object, devices: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `python -m module arguments` as a user does, on `devices` virtual devices."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment(devices: int = 1) -> dict[str, str]:
    """Environment of a process that sees `devices` virtual CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def free_address() -> str:
    """Return a host:port of this machine that nobody listens on, for the coordinator of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def write_stripes(root: Path, counts: dict[str, int]) -> Path:
    """Write an image_folder whose three classes are told apart by colour, in images of several sizes."""
    colours = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]])
    for split, count in counts.items():
        rng = np.random.default_rng(len(split))
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            height, width = 40 + 3 * (i % 3), 48 + 5 * (i % 4)
            cuts = np.sort(rng.integers(4, width - 4, 2))
            label = np.searchsorted(cuts, np.arange(width), side="right").astype(np.uint8)[None].repeat(height, 0)
            image = np.clip(colours[label] + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
            label[:3] = 255
            Image.fromarray(image).save(root / "images" / split / f"scene{i:03}.png")
            Image.fromarray(label).save(root / "annotations" / split / f"scene{i:03}.png")
    (root / "classes.json").write_text(json.dumps({"names": ["red", "green", "blue"], "ignore": 255}))
    return root


@dataclass(frozen=True)
class Run:
    """A run of psp_jax.main: the flags that make it again, its workdir, and what it printed."""

    flags: tuple[str, ...]
    workdir: Path
    output: str

    def start(self, workdir: Path, *more: object, **options: int) -> subprocess.CompletedProcess:
        """Run the same configuration in another workdir, or with more flags."""
        return run_module("psp_jax.main", *self.flags, "--workdir", workdir, *more, **options)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the commands share what they compile, and keep it out of the home directory."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve steps of a tiny PSPNet on 21 images, validated on 10, by the real command."""
    base = tmp_path_factory.mktemp("run")
    folder = write_stripes(base / "stripes", {"train": 21, "val": 10})
    flags = (
        "--config=configs/folder.py",
        f"--config.data.dir={folder}",
        f"--config.data.prepared_dir={base / 'prepared'}",
        "--config.data.num_workers=1",
        *TINY,
    )
    done = run_module("psp_jax.main", *flags, "--workdir", base / "w", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(flags, base / "w", done.stdout)
