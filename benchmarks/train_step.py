"""Images per second of the training step, beside the same network and step in PyTorch, on one device.

    python benchmarks/train_step.py --output benchmarks/results/train_step_h200.json
    python benchmarks/train_step.py --batch 2 --crop 233 --dtypes float32 --matmul 1024    # two CPU cores

All sides run in this one process and take turns, round by round: random crops already on the device, forward, backward,
optimizer and batch-norm statistics. MFU is the compiler's count of the JAX step's operations against the rate of a
large bfloat16 matrix product measured here. On a CPU that others use too, the processor time of a step says more than
its wall time. PyTorch is left out, in words, where it is not installed.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before jax is imported: a GPU is shared with PyTorch

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import header
from psp_jax import build, parallel
from psp_jax.config import defaults
from psp_jax.losses import PLAIN
from psp_jax.models import build_model
from psp_jax.models.resnet import BLOCKS
from psp_jax.train_step import create_state
from psp_jax.workdir import write_json

CLASSES = 150
STEPS = 3  # of a round


@dataclass
class Side:
    """One of those compared: `step` takes a step and returns what `wait` waits for; `facts` are kept in the record."""

    name: str
    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    facts: Callable[[], dict[str, Any]]


def take_turns(sides: list[Side], batch: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each side: medians over `repeats` rounds, in each of which every side takes `STEPS` steps."""
    rounds: list[list[tuple[float, float]]] = [[] for _ in sides]
    for turn in range(repeats + 1):  # the first one warms up
        for side, times in zip(sides, rounds, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(STEPS if turn else 1):
                last = side.step()
            side.wait(last)
            if turn:
                times.append(((time.perf_counter() - wall) / STEPS, (time.process_time() - cpu) / STEPS))
    rows = []
    for side, times in zip(sides, rounds, strict=True):
        wall, cpu = (statistics.median(values) for values in zip(*times, strict=True))
        row: dict[str, Any] = {"side": side.name, "images_per_second": batch / wall, "milliseconds": 1e3 * wall}
        row |= {"cpu_milliseconds": 1e3 * cpu, "rounds_milliseconds": [1e3 * seconds for seconds, _ in times]}
        rows.append(row | side.facts())
    return rows


def matmul_rate(repeats: int, size: int) -> float:
    """Measured operations per second of a bfloat16 product of two size x size matrices."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    side = Side("matmul", lambda: product(a, b), jax.block_until_ready, dict)
    return 2e3 * size**3 / float(take_turns([side], 1, repeats)[0]["milliseconds"])


def jax_side(depth: int, batch: int, crop: int, dtype: str) -> Side:
    """This project's step; it is compiled once, for the device that JAX takes by itself."""
    config = defaults()
    config.model.update(depth=depth, dtype=dtype)
    config.train.update(batch_size=batch, crop_size=(crop,))
    model = build_model(config.model, CLASSES)
    _, optimizer = build.build_optimizer(config, 1_000_000)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    step_fn = build.build_step(config, 255, model, optimizer, mesh, PLAIN)
    state = create_state(model, optimizer, 0, mesh)
    image, label = random_batch(batch, crop)
    data = parallel.to_global({"image": image, "label": label}, parallel.batch_axis_sharding(mesh))
    begin = time.perf_counter()
    compiled = step_fn.lower(state, data).compile()
    compile_seconds = time.perf_counter() - begin
    costs: Any = compiled.cost_analysis()

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, data)
        return metrics

    def facts() -> dict[str, Any]:
        memory = jax.devices()[0].memory_stats() or {}
        peak = memory.get("peak_bytes_in_use", 0) / 1e9 or None
        return {"flops_per_step": costs["flops"], "compile_seconds": compile_seconds, "peak_gigabytes": peak}

    return Side(f"psp_jax {dtype}", step, jax.block_until_ready, facts)


def torch_side(depth: int, batch: int, crop: int, bfloat16: bool, compiled: bool) -> Side:
    """The peer's step on its GPU, or on the CPU where there is none, with as many threads as JAX has."""
    import torch
    from torch_pspnet import make_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    step = make_step(CLASSES, BLOCKS[depth], device, bfloat16, compiled)
    image, label = random_batch(batch, crop)
    pixels = torch.from_numpy(image).to(device).permute(0, 3, 1, 2).float() / 64 - 2
    target = torch.from_numpy(label).to(device).long()

    def facts() -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "peak_gigabytes": peak}

    name = f"torch {'bfloat16' if bfloat16 else 'float32'} {'compiled' if compiled else 'eager'}"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return Side(name, lambda: step(pixels, target), lambda _: wait(), facts)


def random_batch(batch: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Images u8 [B, H, W, 3] and labels u8 [B, H, W] of random values, a twentieth of them void."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, (batch, crop, crop)).astype(np.uint8)
    label[rng.random(label.shape) < 0.05] = 255
    return rng.integers(0, 256, (batch, crop, crop, 3)).astype(np.uint8), label


def main() -> None:
    """Parse the flags, measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=50, choices=(50, 101, 152))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=473)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matmul", type=int, default=8192, help="side of the matrices that give the yardstick")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rate = matmul_rate(args.repeats, args.matmul)
    sides = [jax_side(args.depth, args.batch, args.crop, dtype) for dtype in args.dtypes]
    if importlib.util.find_spec("torch"):
        for bfloat16 in (dtype == "bfloat16" for dtype in args.dtypes):
            sides.append(torch_side(args.depth, args.batch, args.crop, bfloat16, bfloat16))
    else:
        print("PyTorch is not installed; its side is left out.")
    record = header() | {"device": jax.devices()[0].device_kind}
    rows = take_turns(sides, args.batch, args.repeats)
    for row in rows:
        if "flops_per_step" in row:
            row["mfu"] = row["flops_per_step"] / (row["milliseconds"] / 1e3) / rate
        mfu = f"  MFU {100 * row['mfu']:.1f} %" if "mfu" in row else ""
        print(
            f"{row['side']:24} {row['images_per_second']:9.2f} images/s  {row['milliseconds']:9.1f} ms  "
            f"{row['cpu_milliseconds']:9.1f} ms of processor time{mfu}"
        )
    record |= {"depth": args.depth, "batch": args.batch, "crop": args.crop, "matmul_tflops": rate / 1e12, "rows": rows}
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    main()
