"""Windows, scales and mirror images against hszhao/semseg's protocol, written here one window at a time in NumPy."""

import math
import zipfile
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.inference import make_forward
from psp_jax.models import build_model
from psp_jax.protocols import MULTI, SINGLE, Layout, layout, semseg
from psp_jax.sliding import SlidingScorer
from psp_jax.train_step import IMAGENET_MEAN, IMAGENET_STD

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
CLASSES = 19
TINY = {
    "depth": 10, "stem": "32-32-64", "width": 8, "output_stride": 8, "first_block_dilation": "full", "head": "psp",
    "head_channels": 16, "bins": (1, 2, 3, 6), "pool": "average", "reduce": True, "aux_head": False, "aux_channels": 8,
    "dropout": 0.0, "align_corners": True, "dtype": "float32", "remat": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> tuple[dict, object]:
    """A small network whose batch norm knows its inputs, so that its classes change all over an image."""
    model = build_model(TINY, CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3)).astype(np.float32)
    images = (jax.image.resize(images, (8, 97, 97, 3), "cubic") - 120) / 60
    variables = jax.jit(lambda key: model.init(key, images, train=True))(jax.random.key(0))
    settle = jax.jit(lambda v: v | model.apply(v, images, train=True, mutable=["batch_stats"])[1])
    for _ in range(40):
        variables = settle(variables)
    classifier = variables["params"]["head"]["classifier"]["conv"]
    classifier["kernel"] = 8 * classifier["kernel"]
    return variables, make_forward(model, IMAGENET_MEAN, IMAGENET_STD)


def upsample(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Align-corners bilinear resize of [h, w, C], an axis at a time."""
    for axis, length in enumerate(size):
        position = np.linspace(0, scores.shape[axis] - 1, length)
        low = np.minimum(position.astype(int), scores.shape[axis] - 2)
        share = (position - low).reshape(-1, *[1] * (2 - axis))
        scores = scores.take(low, axis) * (1 - share) + scores.take(low + 1, axis) * share
    return scores


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def reference(forward, image: np.ndarray, scales, base_size: int, crop: tuple[int, int]) -> np.ndarray:
    """Probabilities [H, W, C] as tool/test.py computes them; `forward` maps a raw window to scores [h', w', C]."""
    height, width = image.shape[:2]
    total = np.zeros((height, width, CLASSES))
    for scale in scales:
        long = round(scale * base_size)
        new = (long, round(long / height * width)) if height > width else (round(long / width * height), long)
        scaled = cv2.resize(image.astype(np.float32), (new[1], new[0]), interpolation=cv2.INTER_LINEAR)
        missing = [max(c - n, 0) for c, n in zip(crop, new, strict=True)]
        before = [m // 2 for m in missing]
        after = [m - b for m, b in zip(missing, before, strict=True)]
        padded = cv2.copyMakeBorder(
            scaled, before[0], after[0], before[1], after[1], cv2.BORDER_CONSTANT, value=IMAGENET_MEAN
        )
        found, counts = np.zeros((*padded.shape[:2], CLASSES)), np.zeros((*padded.shape[:2], 1))
        strides = [math.ceil(c * 2 / 3) for c in crop]
        grid = [math.ceil((n - c) / s) + 1 for n, c, s in zip(padded.shape[:2], crop, strides, strict=True)]
        for row in range(grid[0]):
            for column in range(grid[1]):
                bottom = min(row * strides[0] + crop[0], padded.shape[0])
                right = min(column * strides[1] + crop[1], padded.shape[1])
                window = np.s_[bottom - crop[0] : bottom, right - crop[1] : right]
                plain = softmax(upsample(forward(padded[window]), crop))
                mirrored = softmax(upsample(forward(padded[window][:, ::-1]), crop))[:, ::-1]
                found[window] += (plain + mirrored) / 2
                counts[window] += 1
        mean = (found / counts)[before[0] : before[0] + new[0], before[1] : before[1] + new[1]]
        total += cv2.resize(mean, (width, height), interpolation=cv2.INTER_LINEAR)
    return total / len(scales)


def make_scorer(forward, protocol, shapes: Layout, batch: int = 4) -> SlidingScorer:
    return SlidingScorer(
        forward=forward,
        protocol=protocol,
        shapes=shapes,
        mean=IMAGENET_MEAN,
        num_classes=CLASSES,
        align_corners=True,
        output_stride=8,
        batch=batch,
    )


def probability_map(scorer: SlidingScorer, variables: dict, image: np.ndarray) -> np.ndarray:
    """All probabilities [H, W, C] of an image, tile after tile."""
    height, width = image.shape[:2]
    steps, size = scorer.plan((height, width)), jnp.asarray([height, width])
    canvases = jax.jit(scorer.score)(variables, image, size, steps)
    read = jax.jit(scorer.probabilities)
    found = np.zeros((height, width, CLASSES), np.float32)
    for y in range(0, height, scorer.tile):
        for x in range(0, width, scorer.tile):
            part = found[y : y + scorer.tile, x : x + scorer.tile]
            part[:] = read(canvases, size, steps, (y, x))[: part.shape[0], : part.shape[1]]
    return found


def photographs() -> list[np.ndarray]:
    """The three photographs of ADE20K and one frame of CamVid."""
    if not SHARED.exists():
        pytest.skip("the photographs are not part of the repository")
    with zipfile.ZipFile(SHARED / "data" / "ADEChallengeData2016_mini.zip") as archive:
        names = sorted(n for n in archive.namelist() if "/images/validation/" in n and n.endswith(".jpg"))
        encoded = [archive.read(name) for name in names]
    encoded.append(next(iter(sorted((SHARED / "data/camvid/images/val").glob("*.jpg")))).read_bytes())
    return [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) for data in encoded]


@pytest.mark.parametrize(("scales", "base_size", "crop"), [(SINGLE, 512, (473, 473)), (MULTI, 200, (97, 121))])
def test_agrees_with_the_protocol_window_by_window(network, scales, base_size, crop) -> None:
    variables, forward = network
    images = photographs()
    protocol = semseg(scales, base_size, crop)
    scorer = make_scorer(forward, protocol, layout(protocol, [image.shape[:2] for image in images]))
    compiled = jax.jit(forward)

    def one(window: np.ndarray) -> np.ndarray:
        return np.asarray(compiled(variables, jnp.asarray(window[None])), np.float64)[0]

    for image in images:
        ours, theirs = (probability_map(scorer, variables, image), reference(one, image, scales, base_size, crop))
        print(
            np.abs(ours - theirs).max(),
            (ours.argmax(-1) == theirs.argmax(-1)).mean(),
            len(np.unique(theirs.argmax(-1))),
        )
        assert np.abs(ours - theirs).max() < 1e-4
        assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.999
        assert len(np.unique(theirs.argmax(-1))) > 3
        print(theirs.max(-1).mean())
