"""Cost of the semseg protocol beyond the network, and images per second beside a loop with host accumulation.

    python benchmarks/evaluate.py --scales multi --output benchmarks/results/evaluate_multi.json
    python benchmarks/evaluate.py --depth 18 --width 24 --head_channels 128 --classes 11 --window 217 289 \
        --image 360 480 --base_size 480    # configs/camvid.py:small

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

from benchmarks.record import header
from psp_jax import parallel
from psp_jax.config import defaults
from psp_jax.inference import TILE, make_forward
from psp_jax.interpolation import resize
from psp_jax.models import build_model
from psp_jax.protocols import SCALES, Protocol, layout, origins, semseg
from psp_jax.sliding import SlidingScorer, make_sliding_step
from psp_jax.train_step import IMAGENET_MEAN, IMAGENET_STD
from psp_jax.workdir import write_json


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
    sums = []
    window = protocol.window
    for scale, _ in protocol.views:
        new, canvas = protocol.resized((height, width), scale), protocol.canvas((height, width), scale)
        scaled = cv2.resize(image.astype(np.float32), new[::-1], interpolation=cv2.INTER_LINEAR)
        top, left = ((c - n) // 2 for c, n in zip(canvas, new, strict=True))
        bottom, right = canvas[0] - new[0] - top, canvas[1] - new[1] - left
        padded = cv2.copyMakeBorder(scaled, top, bottom, left, right, cv2.BORDER_CONSTANT, value=IMAGENET_MEAN)
        found, counts = None, np.zeros((*canvas, 1))
        for y in origins(canvas[0], window[0], protocol.stride[0]):
            for x in origins(canvas[1], window[1], protocol.stride[1]):
                place = np.s_[y : y + window[0], x : x + window[1]]
                probabilities = score(padded[place])
                if found is None:
                    found = np.zeros((*canvas, probabilities.shape[-1]))
                found[place] += probabilities
                counts[place] += 1
        mean = (found / counts)[top : top + new[0], left : left + new[1]]
        parts = np.array_split(mean, -(-mean.shape[-1] // 100), axis=-1)  # OpenCV 5 takes at most 128 channels
        resized = [cv2.resize(np.ascontiguousarray(part), (width, height)) for part in parts]
        sums.append(np.concatenate(resized, axis=-1))
    return np.sum(sums, axis=0).argmax(-1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the three sides on one image and one device."""
    settings = defaults().model
    settings.update(depth=args.depth, dtype=args.dtype, width=args.width, head_channels=args.head_channels)
    model = build_model(settings, args.classes)
    variables: Any = jax.jit(lambda k: model.init(k, jnp.zeros((1, 65, 65, 3)), train=True))(jax.random.key(0))
    forward = make_forward(model, IMAGENET_MEAN, IMAGENET_STD)
    noise = np.random.default_rng(0).integers(0, 256, (16, 21, 3)).astype(np.uint8)
    size = tuple(args.image)
    image = cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC)
    window = (args.window[0], args.window[-1])
    protocol = semseg(SCALES[args.scales], args.base_size, window)
    scorer = SlidingScorer(
        forward=forward,
        protocol=protocol,
        shapes=layout(protocol, [size]),
        mean=IMAGENET_MEAN,
        num_classes=args.classes,
        align_corners=True,
        output_stride=8,
        batch=args.batch,
    )
    step = jax.jit(make_sliding_step(scorer, parallel.make_mesh()))
    room = [-(-side // TILE) * TILE for side in args.room or size]
    padded = np.pad(image, [(0, r - s) for r, s in zip((*room, 3), image.shape, strict=True)])
    plan = scorer.plan(size)
    example = {"image": padded, "label": np.zeros(room, np.uint8), "size": np.array(size, np.int32), **plan}
    data = jax.device_put({name: np.asarray(value)[None] for name, value in (example | {"index": np.int32(0)}).items()})
    chunks = -(-int(plan["count"]) // args.batch)
    windows = jax.device_put(np.zeros((args.batch, *window, 3), np.float32))
    bare = jax.jit(forward)

    def forwards() -> None:
        for _ in range(chunks):
            scores = bare(variables, windows)
        scores.block_until_ready()

    @jax.jit
    def pair(variables: Any, raw: jax.Array) -> jax.Array:
        scores = resize(forward(variables, jnp.stack([raw, raw[:, ::-1]])), window, True)
        found = jax.nn.softmax(scores)
        return (found[0] + found[1, :, ::-1]) / 2

    sides: dict[str, Callable[[], Any]] = {
        "bare forwards": forwards,
        "evaluation step": lambda: jax.block_until_ready(step(variables, data)),
        "host loop": lambda: host_loop(lambda raw: np.asarray(pair(variables, raw)), image, protocol),
    }
    seconds = {name: median_seconds(side, args.repeats) for name, side in sides.items()}
    return {
        "seconds": seconds,
        "windows": int(plan["count"]),
        "overhead": seconds["evaluation step"] / seconds["bare forwards"] - 1,
        "host_loop_over_step": seconds["host loop"] / seconds["evaluation step"],
    }


def main() -> None:
    """Parse the flags, measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=50, choices=(18, 50, 101))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--head_channels", type=int, default=512)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--window", type=int, nargs="+", default=[473], help="height and width")
    parser.add_argument("--image", type=int, nargs=2, default=[512, 683], help="height and width")
    parser.add_argument("--room", type=int, nargs=2, help="largest height and width of the split; those of the image")
    parser.add_argument("--base_size", type=int, default=512)
    parser.add_argument("--scales", default="single", choices=sorted(SCALES))
    parser.add_argument("--batch", type=int, default=4, help="windows per run of the network")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    record = header() | {"device": jax.devices()[0].device_kind}
    found = measure(args)
    for side, seconds in found["seconds"].items():
        print(f"{side:16} {seconds:8.3f} s an image")
    print(f"cost outside the network {100 * found['overhead']:.1f} % of {found['windows']} windows")
    options = {name: value for name, value in vars(args).items() if name != "output"}
    if args.output:
        write_json(args.output, record | options | found)


if __name__ == "__main__":
    main()
