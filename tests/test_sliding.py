"""Windows, scales and mirror images against hszhao/semseg's protocol, written here one window at a time in NumPy."""

import dataclasses
import math
import zipfile
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax import parallel
from psp_jax.inference import join_halves, make_forward
from psp_jax.models import build_model
from psp_jax.protocols import MULTI, SINGLE, WHOLE_VIEW, Layout, grouped, layout, mmseg, semseg
from psp_jax.sliding import SlidingScorer, make_sliding_labeler, make_sliding_step
from psp_jax.train_step import IMAGENET_MEAN, IMAGENET_STD

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
CLASSES = 19
TINY = {
    "depth": 10, "stem": "32-32-64", "width": 8, "output_stride": 8, "first_block_dilation": "full", "head": "psp",
    "basic_dilation": "both", "stride_in": "3x3",
    "head_channels": 16, "bins": (1, 2, 3, 6), "pool": "average", "reduce": True, "aux_head": False, "aux_channels": 8,
    "dropout": 0.0, "align_corners": True, "dtype": "float32", "remat": False,
    "phases": False, "convolutions": "auto",
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


def sampling(variables: jax.Array, image: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """A stand-in for a network: every eighth pixel, mixed into class scores; the same whatever lies beyond it.

    That a network's scores do not depend on what lies beyond `valid` is tested in test_models.py.
    """
    del valid
    return (jnp.asarray(image, jnp.float32)[:, ::8, ::8] - 127) @ variables


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


def make_scorer(forward, protocol, shapes: Layout, batch: int = 4, align_corners: bool = True) -> SlidingScorer:
    return SlidingScorer(
        forward=forward,
        protocol=protocol,
        shapes=shapes,
        mean=IMAGENET_MEAN,
        num_classes=CLASSES,
        align_corners=align_corners,
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
        ours, theirs = probability_map(scorer, variables, image), reference(one, image, scales, base_size, crop)
        assert np.abs(ours - theirs).max() < 1e-5
        assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.999
        assert len(np.unique(theirs.argmax(-1))) > 5  # or nothing was tested


def mmseg_reference(forward, image: np.ndarray, protocol, align_corners: bool) -> np.ndarray:
    """Probabilities [H, W, C] in mmsegmentation's way; `forward` maps a raw [h, w, 3] of any size to [h', w', C]."""
    size, total = image.shape[:2], 0.0
    for scale in protocol.scales:
        height, width = protocol.resized(size, scale)
        scaled = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        for mirror in (False, True) if len(protocol.scales) > 1 else (False,):
            view = scaled[:, ::-1] if mirror else scaled
            found, counts = np.zeros((height, width, CLASSES)), np.zeros((height, width, 1))
            crop, stride = protocol.window, protocol.stride
            for row in range(max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
                for column in range(max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
                    bottom, right = min(row * stride[0] + crop[0], height), min(column * stride[1] + crop[1], width)
                    window = np.s_[max(bottom - crop[0], 0) : bottom, max(right - crop[1], 0) : right]
                    found[window] += torch_resize(forward(view[window]), view[window].shape[:2], align_corners)
                    counts[window] += 1
            mean = torch_resize(found / counts, size, align_corners)
            total = total + softmax(mean[:, ::-1] if mirror else mean)
    return total / total.sum(-1, keepdims=True)


def torch_resize(scores: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    if align_corners:
        return upsample(scores, size)
    return cv2.resize(scores, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)  # the same for up to 128 channels


@pytest.mark.parametrize(
    ("protocol", "align_corners"),
    [
        (mmseg(MULTI, (160, 80), (73, 73)), True),
        (mmseg(MULTI, (160, 80), WHOLE_VIEW), False),
    ],
    ids=["slide", "whole"],
)
def test_mmseg_agrees_with_images_scored_at_their_own_size(protocol, align_corners) -> None:
    rng = np.random.default_rng(1)
    mixing = rng.normal(0, 0.05, (3, CLASSES)).astype(np.float32)
    noise = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    images = [cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC) for size in [(120, 90), (70, 131), (40, 80)]]
    # A resize of 8 bits rounds, and halves may go either way: compared without it, and looked at by itself.
    exact = dataclasses.replace(protocol, round_pixels=False)
    for fixed, members in grouped(exact, [image.shape[:2] for image in images]):
        shapes = layout(fixed, [images[i].shape[:2] for i in members])
        scorer = make_scorer(sampling, fixed, shapes, align_corners=align_corners)
        for i in members:
            theirs = mmseg_reference(lambda x: (x[::8, ::8] - 127) @ mixing, images[i], fixed, align_corners)
            ours = probability_map(scorer, jnp.asarray(mixing), images[i])
            assert np.abs(ours - theirs).max() < 1e-4
            assert len(np.unique(theirs.argmax(-1))) > 3


def test_mmseg_rounds_the_resized_image_to_grey_values() -> None:
    protocol = mmseg((0.7,), (160, 80), (41, 41))
    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    scorer = make_scorer(sampling, protocol, layout(protocol, [(90, 120)]))
    steps = {name: jnp.asarray(value) for name, value in scorer.plan((90, 120)).items()}
    cut = scorer.cut(jnp.asarray(image), jnp.asarray([90, 120]), steps, jnp.asarray(0))
    height, width = protocol.resized((90, 120), 0.7)
    expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)[:41, :41]
    assert np.abs(cut[0] - expected).max() <= 1  # OpenCV's weights have 11 bits
    np.testing.assert_array_equal(cut, np.round(cut))


def test_counting_and_labelling_agree(network) -> None:
    variables, forward = network
    rng = np.random.default_rng(2)
    noise = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    sizes = [(40, 60), (61, 33), (1, 1), (5, 100)]
    images = [cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC) for size in sizes]
    truths = [rng.choice([*range(CLASSES), 255], size).astype(np.uint8) for size in sizes]
    protocol = semseg(MULTI, 60, (41, 57))
    scorer = make_scorer(forward, protocol, layout(protocol, sizes))
    room = (128, 128)
    examples = []
    for index in range(8):  # the last four are padding
        real = index < 4
        image, truth = (images[index], truths[index]) if real else (np.zeros((1, 1, 3), np.uint8), np.full((1, 1), 255))
        steps = scorer.plan(truth.shape if real else None)
        example = {
            "image": np.pad(image, [(0, room[0] - truth.shape[0]), (0, room[1] - truth.shape[1]), (0, 0)]),
            "label": np.full(room, 255, np.uint8),
            "size": np.array(truth.shape, np.int32),
            "index": np.int32(index if real else -1),
        }
        example["label"][: truth.shape[0], : truth.shape[1]] = truth
        examples.append(example | steps)
    mesh = parallel.make_mesh()
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    batch = parallel.to_global(batch, parallel.all_devices_sharding(mesh))
    counts = jax.jit(make_sliding_step(scorer, mesh))(
        jax.device_put(variables, parallel.replicated(mesh)),
        parallel.to_global(batch, parallel.all_devices_sharding(mesh)),
    )
    found = make_sliding_labeler(scorer)(variables, images)
    expected = np.zeros((8, CLASSES, CLASSES), np.int64)
    for i, (truth, (labels, confidence)) in enumerate(zip(truths, found, strict=True)):
        np.testing.assert_array_equal(counts["labels"][i, : truth.shape[0], : truth.shape[1]], labels)
        np.add.at(expected[i], (truth[truth < 255], labels[truth < 255]), 1)
        probabilities = probability_map(scorer, variables, images[i])
        np.testing.assert_allclose(confidence, 255 * probabilities.max(-1), atol=0.51)
    np.testing.assert_array_equal(join_halves(np.asarray(counts["confusion"])), expected.sum(0))
    np.testing.assert_array_equal(counts["images"][:, 1], expected.sum(2))
    assert counts["index"].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
