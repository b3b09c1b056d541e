"""Images per second of the training step, beside the same network and step in PyTorch, on one device.

    python benchmarks/train_step.py --output benchmarks/results/train_step_h200.json

Both sides run in this one process, one after the other: random crops already on the device, forward, backward,
optimizer and batch-norm statistics. MFU is the compiler's count of the JAX step's operations against the rate of a
large bfloat16 matrix product measured here. PyTorch is left out, in words, where it is not installed.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psp_jax import build, parallel
from psp_jax.config import defaults
from psp_jax.losses import PLAIN
from psp_jax.models import build_model
from psp_jax.models.resnet import BLOCKS
from psp_jax.train_step import create_state
from psp_jax.workdir import versions, write_json

CLASSES = 150


def median_seconds(step: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    """Median time of a step over `repeats` rounds of three, after three to warm up."""
    for _ in range(3):
        wait(step())
    rounds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(3):
            last = step()
        wait(last)
        rounds.append((time.perf_counter() - begin) / 3)
    return statistics.median(rounds)


def matmul_rate(repeats: int, size: int) -> float:
    """Measured operations per second of a bfloat16 product of two size x size matrices."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: product(a, b), jax.block_until_ready, repeats)


def measure_jax(depth: int, batch: int, crop: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Time this project's step; it is compiled once, for the device that JAX takes by itself."""
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

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, data)
        return metrics

    seconds = median_seconds(step, jax.block_until_ready, repeats)
    memory = jax.devices()[0].memory_stats() or {}
    costs: Any = compiled.cost_analysis()
    return {
        "side": f"psp_jax {dtype}",
        "images_per_second": batch / seconds,
        "milliseconds": 1e3 * seconds,
        "flops_per_step": costs["flops"],
        "compile_seconds": compile_seconds,
        "peak_gigabytes": memory.get("peak_bytes_in_use", 0) / 1e9 or None,
    }


def measure_torch(depth: int, batch: int, crop: int, bfloat16: bool, compiled: bool, repeats: int) -> dict[str, Any]:
    """Time the peer's step on its GPU, or on the CPU where there is none."""
    import torch
    from torch_pspnet import make_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = make_step(CLASSES, BLOCKS[depth], device, bfloat16, compiled)
    image, label = random_batch(batch, crop)
    pixels = torch.from_numpy(image).to(device).permute(0, 3, 1, 2).float() / 64 - 2
    target = torch.from_numpy(label).to(device).long()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = median_seconds(lambda: step(pixels, target), lambda _: wait(), repeats)
    return {
        "side": f"torch {'bfloat16' if bfloat16 else 'float32'} {'compiled' if compiled else 'eager'}",
        "images_per_second": batch / seconds,
        "milliseconds": 1e3 * seconds,
        "torch": torch.__version__,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }


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
    rows = [measure_jax(args.depth, args.batch, args.crop, dtype, args.repeats) for dtype in args.dtypes]
    for row in rows:
        row["mfu"] = row["flops_per_step"] / (row["milliseconds"] / 1e3) / rate
    if importlib.util.find_spec("torch"):
        for bfloat16 in (dtype == "bfloat16" for dtype in args.dtypes):
            rows.append(measure_torch(args.depth, args.batch, args.crop, bfloat16, bfloat16, args.repeats))
    else:
        print("PyTorch is not installed; its side is left out.")
    for row in rows:
        mfu = f"  MFU {100 * row['mfu']:.1f} %" if "mfu" in row else ""
        print(f"{row['side']:24} {row['images_per_second']:9.2f} images/s  {row['milliseconds']:9.1f} ms{mfu}")
    record = {"device": jax.devices()[0].device_kind, "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    record |= {"depth": args.depth, "batch": args.batch, "crop": args.crop, "matmul_tflops": rate / 1e12, "rows": rows}
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    main()
