"""Examines the devices and the cache of compiled programs, in a process of its own: a device may hang.

    python -m psp_jax.health.devices [COMPILE_CACHE]

prints each finding as a line of JSON as soon as it is there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from psp_jax import compile_cache
from psp_jax.health.findings import FAIL, OK, WARN, Finding, guarded
from psp_jax.health.machine import GIB

# A convolution as the networks have it: 3x3, dilation 2, odd sides.
IMAGE, KERNEL, DILATION = (4, 33, 33, 32), (3, 3, 32, 64), 2
# Largest difference allowed, over the largest value: what rounding does to results and to sums of 4 * 33 * 33 products.
TOLERANCES = {jnp.float32: 1e-4, jnp.bfloat16: 1e-2}
LEAST_FREE = 0.8  # of a device's memory; less than that is held by somebody else
SMI = "nvidia-smi"


def examine() -> Iterator[Finding]:
    """Tell the devices, then of each whether it computes rightly, and its memory's limit."""
    devices = jax.local_devices()
    kinds = sorted({f"{device.platform} {device.device_kind}" for device in devices})
    yield Finding(OK, "devices", f"{len(devices)} x {' and '.join(kinds)}")
    if all(device.platform == "cpu" for device in devices):
        for path, kind, extra in (("/dev/nvidia0", "an NVIDIA GPU", "cuda12"), ("/dev/accel0", "a TPU", "tpu")):
            if Path(path).exists():
                yield Finding(WARN, "devices", f"{path} says {kind}, which JAX does not use", _install(extra))
    for device in devices:
        name = f"device {device.id} ({device.device_kind})"
        yield from guarded(name, lambda device=device, name=name: _numbers(device, name))  # type: ignore[misc]
        yield from guarded(name, lambda device=device, name=name: _memory(device, name))  # type: ignore[misc]
    if devices[0].platform == "gpu" and shutil.which(SMI):
        yield from guarded(SMI, _gpu_holders)


def cache(directory: str) -> Iterator[Finding]:
    """Tell where compiled programs are kept, whether a program comes back from there, and how much there is."""
    name = "compile cache"
    compile_cache.enable(directory)  # what is wrong with it goes to stderr too
    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if directory == compile_cache.OFF:
        yield Finding(WARN, name, "is off", "leave --compile_cache out, for starts that need not compile again")
        return
    if not kept:
        text = f"{directory} cannot be written, so every start compiles anew"
        yield Finding(FAIL, name, text, "name another folder by JAX_COMPILATION_CACHE_DIR or --compile_cache")
        return
    log = compile_cache.CompileLog()
    for _ in range(2):
        jax.clear_caches()
        jax.jit(lambda x: jnp.cos(x) @ x)(np.ones((8, 8), np.float32)).block_until_ready()
    # The folder of a bucket cannot be listed by these means.
    files = [] if "://" in kept else [file.stat().st_size for file in Path(kept).glob("*-cache")]
    text = f"{kept} holds {len(files):,} programs, {sum(files) / GIB:.2f} GiB; one just kept is"
    if log.hits:
        yield Finding(OK, name, f"{text} found again")
    else:
        yield Finding(WARN, name, f"{text} not found again", "empty the folder")


def reference(x: np.ndarray, kernel: np.ndarray, slope: np.ndarray) -> list[np.ndarray]:
    """Return the dilated convolution of x by the kernel, and the gradients of its product with `slope`; in float64."""
    x, kernel, slope = (array.astype(np.float64) for array in (x, kernel, slope))
    rows, columns = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (DILATION, DILATION), (DILATION, DILATION), (0, 0)))
    y, dx, dkernel = np.zeros(slope.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i in range(3):
        for j in range(3):
            at = (slice(None), slice(i * DILATION, i * DILATION + rows), slice(j * DILATION, j * DILATION + columns))
            y += padded[at] @ kernel[i, j]
            dx[at] += slope @ kernel[i, j].T
            dkernel[i, j] = np.tensordot(padded[at], slope, ((0, 1, 2), (0, 1, 2)))
    return [y, dx[:, DILATION:-DILATION, DILATION:-DILATION], dkernel]


def _numbers(device: jax.Device, name: str) -> Iterator[Finding]:
    """Compare a convolution and its gradients, in float32 and bfloat16, with the reference."""
    worst: dict[str, float] = {}
    for dtype, tolerance in TOLERANCES.items():
        rng = np.random.default_rng(0)
        shapes = (IMAGE, KERNEL, (*IMAGE[:3], KERNEL[3]))
        x, kernel, slope = (rng.standard_normal(shape).astype(dtype) for shape in shapes)

        def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(
                *(x, kernel, (1, 1), [(DILATION, DILATION)] * 2),
                rhs_dilation=(DILATION, DILATION),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )

        def both(x: jax.Array, kernel: jax.Array, slope: jax.Array) -> tuple[jax.Array, ...]:
            y, pull = jax.vjp(convolved, x, kernel)
            return (y, *pull(slope))

        found = jax.jit(both)(*(jax.device_put(array, device) for array in (x, kernel, slope)))
        for ours, theirs in zip(found, reference(x, kernel, slope), strict=True):
            error = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
            if not error <= tolerance:  # nor a nan
                text = f"a convolution in {np.dtype(dtype)} is {error:.2g} off (at most {tolerance} is rounding)"
                yield Finding(FAIL, name, text, "do not train on it; update driver and jaxlib, or replace the device")
                return
            worst[str(np.dtype(dtype))] = max(error, worst.get(str(np.dtype(dtype)), 0.0))
    text = ", ".join(f"{error:.1e} in {dtype}" for dtype, error in worst.items())
    yield Finding(OK, name, f"convolution forward and backward agree with NumPy to {text}")


def _memory(device: jax.Device, name: str) -> Iterator[Finding]:
    """Tell the limit of JAX's memory on the device, and its use by this process; CPUs have none of their own.

    What other processes hold is not in these figures: _gpu_holders tells it where the driver does.
    """
    if not (stats := device.memory_stats()):
        return
    used, limit = stats.get("bytes_in_use", 0), stats.get("bytes_limit", 0)
    yield Finding(OK, name, f"this process may use {limit / GIB:.1f} GiB, and uses {used / GIB:.1f}")


def _gpu_holders() -> Iterator[Finding]:
    """Tell the free memory of all GPUs of the machine, and which processes hold the rest, as the driver sees it."""
    rows = _query("--query-gpu=index,memory.free,memory.total")
    holders = _query("--query-compute-apps=pid,process_name,used_memory")
    held = ", ".join(f"process {pid} ({name}) {used} MiB" for pid, name, used in holders) or "by none that it may name"
    for index, free, total in rows:
        if not (free.isdecimal() and total.isdecimal()):
            yield Finding(OK, SMI, f"GPU {index} does not tell its memory")
            continue
        text = f"GPU {index} has {int(free) / 1024:.1f} of {int(total) / 1024:.1f} GiB free"
        if int(free) < LEAST_FREE * int(total):
            yield Finding(WARN, SMI, f"{text}; held: {held}", "end them, or choose other GPUs by CUDA_VISIBLE_DEVICES")
        else:
            yield Finding(OK, SMI, text)


def _query(question: str) -> list[list[str]]:
    command = [SMI, question, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _install(extra: str) -> str:
    return f"run `pip install '.[{extra}]'`, or unset JAX_PLATFORMS"


def main() -> None:
    """Print the findings, and send what drivers print by themselves to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for finding in guarded("devices", examine):
            print(finding.encoded(), file=answers, flush=True)
        if len(sys.argv) > 1:
            for finding in guarded("compile cache", lambda: cache(sys.argv[1])):
                print(finding.encoded(), file=answers, flush=True)


if __name__ == "__main__":
    main()
