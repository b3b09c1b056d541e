"""Time 3x3 convolutions with dilation 1, 2 and 4 at the network's sizes: forward, input and weight gradient.

    python benchmarks/convolutions.py --output benchmarks/results/convolutions_h200.json
    python benchmarks/convolutions.py --batch 2 --crop 233 --dtype float32 --repeats 2    # two CPU cores

Four lowerings of the same convolution are compared: XLA's own, nine shifted matrix products, that by rows which
`model.convolutions=rows` means, and the undilated convolution on the d x d interleaved subgrids of the map, as with
`model.phases`. Each is first checked against the first.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.record import header
from psp_jax.models.row_convolution import convolve_rows
from psp_jax.workdir import write_json

Array = jax.Array

# (name, stride of its map, channels in, channels out, dilation); the same layer at dilation 1 is the yardstick.
LAYERS = (
    ("layer1", 4, 64, 64, 1),
    ("layer2", 8, 128, 128, 1),
    ("layer3", 8, 256, 256, 1),
    ("layer3", 8, 256, 256, 2),
    ("layer4", 8, 512, 512, 1),
    ("layer4", 8, 512, 512, 4),
    ("fuse", 8, 4096, 512, 1),
)


def native(x: Array, kernel: Array, dilation: int) -> Array:
    """Convolve [B, H, W, C] with [3, 3, C, D], stride 1, padding = dilation."""
    pad = (dilation, dilation)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), (pad, pad), rhs_dilation=(dilation, dilation), dimension_numbers=numbers
    )


def shifted(x: Array, kernel: Array, dilation: int) -> Array:
    """As `native`: the sum of nine matrix products, one for each tap."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (dilation, dilation), (dilation, dilation), (0, 0)))
    taps = [
        jnp.einsum(
            "bhwc,cd->bhwd",
            padded[:, i * dilation : i * dilation + height, j * dilation : j * dilation + width],
            kernel[i, j],
            preferred_element_type=jnp.float32,
        )
        for i in range(3)
        for j in range(3)
    ]
    return sum(taps[1:], taps[0]).astype(x.dtype)


def phases(x: Array, kernel: Array, dilation: int) -> Array:
    """As `native`: each of the dilation^2 subgrids is convolved without dilation."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // dilation), -(-width // dilation)
    x = jnp.pad(x, ((0, 0), (0, rows * dilation - height), (0, columns * dilation - width), (0, 0)))
    x = x.reshape(batch, rows, dilation, columns, dilation, channels).transpose(0, 2, 4, 1, 3, 5)
    y = native(x.reshape(-1, rows, columns, channels), kernel, 1)
    y = y.reshape(batch, dilation, dilation, rows, columns, -1).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(batch, rows * dilation, columns * dilation, -1)[:, :height, :width]


def rows(x: Array, kernel: Array, dilation: int) -> Array:
    """As `native`: one convolution of rows, with the rows of an image for its batch."""
    return convolve_rows(x, kernel, 1, dilation, dilation)


LOWERINGS = {"native": native, "shifted": shifted, "rows": rows, "phases": phases}


def milliseconds(function: Callable[..., Array], *arguments: Array, repeats: int) -> tuple[float, float]:
    """Median wall and processor time of a call, of `repeats` timed rounds of five calls each, after a warm-up."""
    jax.block_until_ready(function(*arguments))
    rounds = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        results = [function(*arguments) for _ in range(5)]
        jax.block_until_ready(results)
        rounds.append((200 * (time.perf_counter() - wall), 200 * (time.process_time() - cpu)))
    wall, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
    return wall, cpu


def measure(
    layer: tuple[str, int, int, int, int], batch: int, crop: int, dtype: Any, repeats: int
) -> list[dict[str, Any]]:
    """Time every lowering of one layer; relative errors are against `native`."""
    name, stride, channels, features, dilation = layer
    side = -(-crop // stride)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, side, side, channels), dtype)
    kernel = jax.random.normal(keys[1], (3, 3, channels, features), dtype) / (3 * channels**0.5)
    gradient = jax.random.normal(keys[2], (batch, side, side, features), dtype)
    flops = 2 * 9 * batch * side * side * channels * features
    found, reference = [], {}
    for lowering, convolve in LOWERINGS.items():
        if lowering == "phases" and dilation == 1:
            continue  # the same program as native

        def forward(x: Array, kernel: Array, convolve: Any = convolve) -> Array:
            return convolve(x, kernel, dilation)

        passes: dict[str, Any] = {
            "forward": jax.jit(lambda x, kernel, g, f=forward: f(x, kernel)),
            "input_gradient": jax.jit(lambda x, kernel, g, f=forward: jax.vjp(lambda x: f(x, kernel), x)[1](g)[0]),
            "weight_gradient": jax.jit(lambda x, kernel, g, f=forward: jax.vjp(lambda k: f(x, k), kernel)[1](g)[0]),
        }
        for what, function in passes.items():
            value = function(x, kernel, gradient).astype(jnp.float32)
            reference.setdefault(what, value)
            wall, cpu = milliseconds(function, x, kernel, gradient, repeats=repeats)
            row = {"layer": name, "side": side, "channels": [channels, features], "dilation": dilation}
            row |= {"pass": what, "lowering": lowering, "milliseconds": wall, "cpu_milliseconds": cpu}
            row["tflops"] = flops / wall / 1e9
            row["error"] = float(jnp.linalg.norm(value - reference[what]) / jnp.linalg.norm(reference[what]))
            print(
                f"{name:7} d={dilation} {what:16} {lowering:8} {wall:9.3f} ms (processor {cpu:9.3f}) "
                f"{row['tflops']:8.2f} TFLOP/s  error {row['error']:.1e}",
                flush=True,
            )
            found.append(row)
    return found


def main() -> None:
    """Parse the flags, measure, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=473)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", nargs="*", help="names of layers; all by default")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    layers = [layer for layer in LAYERS if not args.layers or layer[0] in args.layers]
    size = args.batch, args.crop, jnp.dtype(args.dtype), args.repeats
    found = [row for layer in layers for row in measure(layer, *size)]
    record = header() | {"device": jax.devices()[0].device_kind}
    record |= {"batch": args.batch, "crop": args.crop, "dtype": args.dtype, "rows": found}
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    main()
