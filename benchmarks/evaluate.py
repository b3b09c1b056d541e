"""Cost of the semseg protocol beyond the network, and images per second beside a loop with host accumulation.

    python benchmarks/evaluate.py --scales multi --output benchmarks/results/evaluate_multi.json

Three sides in one run, for the same image and windows: the bare forward passes; the compiled evaluation step (cutting,
resizing, averaging, labelling and counting included); and the way of the official code, one window and its mirror
image at a time, resized with OpenCV and accumulated in NumPy on the host.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from psp_jax import parallel
from psp_jax.config import defaults
from psp_jax.inference import TILE, make_forward
from psp_jax.interpolation import resize
from psp_jax.models import build_model
from psp_jax.protocols import SCALES, Protocol, layout, origins, semseg
from psp_jax.sliding import SlidingScorer, make_sliding_step
from psp_jax.train_step import IMAGENET_MEAN, IMAGENET_STD
from psp_jax.workdir import versions, write_json

CLASSES = 150


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of `work`, which must wait for its result, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def host_loop(score: Callable[[np.ndarray], np.ndarray], image: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Label one image as tool/test.py does; `score` maps a raw f32 [h, w, 3] to probabilities [h, w, C]."""
    height, width = image.shape[:2]
    total = np.zeros((height, width, CLASSES))
    window = protocol.window
    for scale, _ in protocol.views:
        new, canvas = protocol.resized((height, width), scale), protocol.canvas((height, width), scale)
        scaled = cv2.resize(image.astype(np.float32), new[::-1], interpolation=cv2.INTER_LINEAR)
        top, left = ((c - n) // 2 for c, n in zip(canvas, new, strict=True))
        bottom, right = canvas[0] - new[0] - top, canvas[1] - new[1] - left
        padded = cv2.copyMakeBorder(scaled, top, bottom, left, right, cv2.BORDER_CONSTANT, value=IMAGENET_MEAN)
        found, counts = np.zeros((*canvas, CLASSES)), np.zeros((*canvas, 1))
        for y in origins(canvas[0], window[0], protocol.stride[0]):
            for x in origins(canvas[1], window[1], protocol.stride[1]):
                place = np.s_[y : y + window[0], x : x + window[1]]
                found[place] += score(padded[place])
                counts[place] += 1
        mean = (found / counts)[top : top + new[0], left : left + new[1]]
        for first in range(0, CLASSES, 100):  # OpenCV 5 takes at most 128 channels
            part = np.ascontiguousarray(mean[..., first : first + 100])
            total[..., first : first + 100] += cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)
    return total.argmax(-1)


def measure(depth: int, dtype: str, window: int, protocol: Protocol, batch: int, repeats: int) -> dict[str, Any]:
    """Time the three sides on one 512 x 683 image (the usual size of ADE20K) on one device."""
    settings = defaults().model
    settings.update(depth=depth, dtype=dtype)
    model = build_model(settings, CLASSES)
    variables: Any = jax.jit(lambda k: model.init(k, jnp.zeros((1, 65, 65, 3)), train=True))(jax.random.key(0))
    forward = make_forward(model, IMAGENET_MEAN, IMAGENET_STD)
    noise = np.random.default_rng(0).integers(0, 256, (16, 21, 3)).astype(np.uint8)
    image = cv2.resize(noise, (683, 512), interpolation=cv2.INTER_CUBIC)
    scorer = SlidingScorer(
        forward=forward,
        protocol=protocol,
        shapes=layout(protocol, [image.shape[:2]]),
        mean=IMAGENET_MEAN,
        num_classes=CLASSES,
        align_corners=True,
        output_stride=8,
        batch=batch,
    )
    step = jax.jit(make_sliding_step(scorer, parallel.make_mesh()))
    room = [-(-side // TILE) * TILE for side in image.shape[:2]]
    padded = np.pad(image, [(0, r - s) for r, s in zip((*room, 3), image.shape, strict=True)])
    plan = scorer.plan(image.shape[:2])
    example = {"image": padded, "label": np.zeros(room, np.uint8), "size": np.array(image.shape[:2], np.int32), **plan}
    example["index"] = np.int32(0)
    data = jax.device_put({name: np.asarray(value)[None] for name, value in example.items()})
    chunks = -(-int(plan["count"]) // batch)
    windows = jax.device_put(np.zeros((batch, window, window, 3), np.float32))
    bare = jax.jit(forward)

    def forwards() -> None:
        for _ in range(chunks):
            scores = bare(variables, windows)
        scores.block_until_ready()

    @jax.jit
    def pair(variables: Any, raw: jax.Array) -> jax.Array:
        scores = resize(forward(variables, jnp.stack([raw, raw[:, ::-1]])), (window, window), True)
        found = jax.nn.softmax(scores)
        return (found[0] + found[1, :, ::-1]) / 2

    sides = {
        "bare forwards": median_seconds(forwards, repeats),
        "evaluation step": median_seconds(lambda: jax.block_until_ready(step(variables, data)), repeats),
        "host loop": median_seconds(
            lambda: host_loop(lambda raw: np.asarray(pair(variables, raw)), image, protocol), repeats
        ),
    }
    return {
        "seconds": sides,
        "windows": int(plan["count"]),
        "overhead": sides["evaluation step"] / sides["bare forwards"] - 1,
        "host_loop_over_step": sides["host loop"] / sides["evaluation step"],
    }


def main() -> None:
    """Parse the flags, measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=50, choices=(18, 50, 101))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--window", type=int, default=473)
    parser.add_argument("--base_size", type=int, default=512)
    parser.add_argument("--scales", default="single", choices=sorted(SCALES))
    parser.add_argument("--batch", type=int, default=4, help="windows per run of the network")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    protocol = semseg(SCALES[args.scales], args.base_size, (args.window, args.window))
    found = measure(args.depth, args.dtype, args.window, protocol, args.batch, args.repeats)
    for side, seconds in found["seconds"].items():
        print(f"{side:16} {seconds:8.3f} s an image")
    print(f"cost outside the network {100 * found['overhead']:.1f} % of {found['windows']} windows")
    record = {"device": jax.devices()[0].device_kind, "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    options = {name: value for name, value in vars(args).items() if name != "output"}
    if args.output:
        write_json(args.output, record | options | found)


if __name__ == "__main__":
    main()
