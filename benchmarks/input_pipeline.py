"""Images per second and core of the training pipeline, beside the step-by-step chain of the official code.

    python benchmarks/input_pipeline.py --archive ADEChallengeData2016.zip --output benchmarks/results/input_cpu.json

Both sides take turns in one thread of this process, from the same images, as a worker process of each computes its
batches: ours from prepared records (ArrayRecord), by what training's workers call; the chain from files, as
util/dataset.py and util/transform.py of hszhao/semseg do it with OpenCV and float32: resize the whole image, rotate it,
blur, mirror, pad, crop, normalise, stack. The way from the worker to the main process is left out on both sides. Images
per second and core are per second of processor time, so that other programs of the machine count little. Without an
archive the images are made up, of ADE20K's usual size. Then the pipeline whole, with worker processes: images per
second of wall time, and the memory that each worker has for itself.
"""

import argparse
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.record import header, publish
from psp_jax.data.decode import decode_annotation, decode_image
from psp_jax.data.pipeline import train_batches, train_rows
from psp_jax.data.prepared import ensure_prepared
from psp_jax.data.source import Source
from psp_jax.data.transforms import DEFAULT_SETTINGS, augment

CROP = (473, 473)
MEAN = np.array([123.675, 116.28, 103.53], np.float32)  # of ImageNet, RGB
STD = np.array([58.395, 57.12, 57.375], np.float32)
SIZES = ((512, 683), (683, 512), (512, 768))  # the official archive's images have a short side of 512 mostly


def write_images(root: Path, archive: Path | None, count: int) -> str:
    """Write an image_folder of `count` images, those of `archive` over and over, and say what they are."""
    if archive:
        with zipfile.ZipFile(archive) as file:
            names = [n for n in file.namelist() if "/images/validation/" in n and n.endswith(".jpg")][:count]
            labels = [n.replace("/images/", "/annotations/").replace(".jpg", ".png") for n in names]
            pairs = [(file.read(image), file.read(label)) for image, label in zip(names, labels, strict=True)]
        what = f"{len(pairs)} images of {archive.name}"
    else:
        pairs, what = [made_up(i) for i in range(len(SIZES))], f"{len(SIZES)} images made up"
    for i in range(count):
        for folder, suffix, data in zip(("images", "annotations"), ("jpg", "png"), pairs[i % len(pairs)], strict=True):
            path = root / folder / "train" / f"{i:05}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return what


def made_up(number: int) -> tuple[bytes, bytes]:
    """Return a JPEG of about 100 KB and the PNG of its classes: coarse and fine noise, and blobs."""
    rng, (height, width) = np.random.default_rng(number), SIZES[number]
    coarse = cv2.resize(rng.uniform(0, 255, (12, 16, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    fine = cv2.resize(rng.normal(0, 40, (height // 3, width // 3, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(coarse + fine, 0, 255).astype(np.uint8)
    label = cv2.resize(rng.integers(0, 151, (8, 10)).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return cv2.imencode(".jpg", image)[1].tobytes(), cv2.imencode(".png", label)[1].tobytes()


def chain(rng: np.random.Generator, image_path: str, label_path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return one training example of the official code: f32[3, h, w] and i64[h, w]."""
    image = np.float32(cv2.cvtColor(cv2.imread(image_path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))
    label = cv2.imread(label_path, cv2.IMREAD_GRAYSCALE)
    scale = 0.5 + 1.5 * rng.random()
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    height, width = label.shape
    fill: Any = MEAN.tolist()
    if rng.random() < 0.5:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), -10 + 20 * rng.random(), 1)
        border: dict[str, Any] = {"borderMode": cv2.BORDER_CONSTANT}
        image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, **border, borderValue=fill)
        label = cv2.warpAffine(label, matrix, (width, height), flags=cv2.INTER_NEAREST, **border, borderValue=255)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if rng.random() < 0.5:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    down, right = max(CROP[0] - height, 0), max(CROP[1] - width, 0)
    if down or right:
        sides = down // 2, down - down // 2, right // 2, right - right // 2
        image = cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=fill)
        label = cv2.copyMakeBorder(label, *sides, cv2.BORDER_CONSTANT, value=255)
    top, left = (int(rng.integers(0, side - crop + 1)) for side, crop in zip(label.shape, CROP, strict=True))
    place = np.s_[top : top + CROP[0], left : left + CROP[1]]
    tensor = np.ascontiguousarray(image[place].transpose(2, 0, 1))  # torch's view of it; float already
    tensor -= MEAN[:, None, None]
    tensor /= STD[:, None, None]
    return tensor, label[place].astype(np.int64)


def chain_batch(rng: np.random.Generator, files: list[tuple[str, str]], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch of the official code: f32[B, 3, h, w] and i64[B, h, w]."""
    chosen = rng.integers(0, len(files), batch)
    images, labels = zip(*(chain(rng, *files[i]) for i in chosen), strict=True)
    return np.stack(images), np.stack(labels)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Processor time of this process, over all its threads, for a call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure_sides(source: Source, files: list[tuple[str, str]], batch: int, rounds: int) -> dict[str, Any]:
    """Return the images per second of processor time of both sides, medians over rounds of four batches each."""
    rng, times = np.random.default_rng(0), {"psp_jax": [], "semseg chain": []}  # type: dict[str, list[float]]
    steps = 4

    batches = train_rows(source, CROP, batch, seed=0)

    def ours(turn: int) -> None:
        for step in range(turn * steps, (turn + 1) * steps):
            batches[step]

    def theirs(turn: int) -> None:
        for _ in range(steps):
            chain_batch(rng, files, batch)

    for turn in range(rounds + 1):  # the first one warms up
        for side, work in (("psp_jax", ours), ("semseg chain", theirs)):
            seconds = cpu_seconds(lambda work=work, turn=turn: work(turn))
            if turn:
                times[side].append(steps * batch / seconds)
    found: dict[str, Any] = {side: statistics.median(rates) for side, rates in times.items()}
    return {"images_per_core_second": found, "rounds": times, "ratio": found["psp_jax"] / found["semseg chain"]}


def measure_parts(source: Source, batch: int, repeats: int) -> dict[str, float]:
    """Return the milliseconds of a core an image that each part of ours takes, in one thread: medians of five turns."""
    rng = np.random.default_rng(0)
    count = len(source)
    pairs = [source.pair(i) for i in range(count)]
    labels = [decode_annotation(pair.annotation, "") for pair in pairs]
    examples = [source[i] for i in range(min(count, 8))]
    crops = [
        augment(rng, *(examples[i % len(examples)][k] for k in ("image", "label")), CROP, DEFAULT_SETTINGS)
        for i in range(batch)
    ]
    parts: dict[str, Callable[[int], Any]] = {
        "read the record": lambda i: source.pair(i % count),
        "decode the JPEG": lambda i: decode_image(pairs[i % count].image, ""),
        "decode the PNG": lambda i: decode_annotation(pairs[i % count].annotation, ""),
        "classes of the label": lambda i: source.classes.to_train(labels[i % count], ""),
        "augment the crop": lambda i: augment(
            rng, examples[i % len(examples)]["image"], examples[i % len(examples)]["label"], CROP, DEFAULT_SETTINGS
        ),
        "stack the batch": lambda i: None if i % batch else [np.stack(arrays) for arrays in zip(*crops, strict=True)],
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(5):
        for name, part in parts.items():
            seconds = cpu_seconds(lambda part=part: [part(i) for i in range(repeats)])
            times[name].append(1e3 * seconds / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_workers(source: Source, batch: int, workers: int, steps: int) -> dict[str, Any]:
    """Return images per second of wall time with `workers` processes, and the megabytes that each has for itself."""
    batches = train_batches(source, crop_size=CROP, batch_size=batch, seed=0, num_workers=workers)
    for _ in range(2 * max(workers, 1)):
        next(batches)
    begin = time.perf_counter()
    for _ in range(steps):
        next(batches)
    seconds = time.perf_counter() - begin
    memory = [private_megabytes(process) for process in children()] if workers else []
    batches.close()
    return {"workers": workers, "images_per_second": steps * batch / seconds, "megabytes_per_worker": memory}


def children() -> list[int]:
    """Return the ids of this process's children."""
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(process) for task in tasks for process in task.read_text("ascii").split()]


def private_megabytes(process: int) -> float:
    """Return the memory that no other process shares with this one."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text("ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def as_markdown(record: dict[str, Any]) -> str:
    """Return the record as tables."""
    rates = record["images_per_core_second"]
    lines = ["| side | images a second of one core |", "|---|---|"]
    lines += [f"| {side} | {rate:.1f} |" for side, rate in rates.items()]
    lines += ["", f"Ratio {record['ratio']:.1f}, medians; {record['images']}, crop {CROP[0]} x {CROP[1]}.", ""]
    lines += ["| part of ours | ms of a core an image |", "|---|---|"]
    lines += [f"| {part} | {milliseconds:.2f} |" for part, milliseconds in record["parts"].items()]
    whole = 1e3 / rates["psp_jax"]
    lines.append(f"| sum; of the whole above | {sum(record['parts'].values()):.2f}; {whole:.2f} |")
    lines += ["", "| workers | images a second (wall time) | MB of its own, each worker |", "|---|---|---|"]
    for row in record["workers"]:
        memory = ", ".join(f"{size:.0f}" for size in row["megabytes_per_worker"]) or "threads of the main process"
        lines.append(f"| {row['workers']} | {row['images_per_second']:.1f} | {memory} |")
    machine = record["machine"]
    lines += ["", f"{machine['cores']} cores, load {machine['load']:.1f} when it began, {record['date']}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Parse the flags, measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archive", type=Path, help="ADEChallengeData2016.zip, or one of a few of its images")
    parser.add_argument("--images", type=int, default=1000, help="records; few images are repeated")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="JSON file to write, and a Markdown table beside it")
    args = parser.parse_args()
    cv2.setNumThreads(1)  # as in the workers of both
    record = header() | {"batch": args.batch, "crop": list(CROP)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "folder"
        record["images"] = write_images(root, args.archive, args.images)
        directory = ensure_prepared(
            "image_folder", root, prepared_dir=Path(folder) / "records", classes="ade20k", say=lambda _: None
        )
        source = Source(directory, "train")
        pairs = zip(*(sorted((root / part / "train").iterdir()) for part in ("images", "annotations")), strict=True)
        files = [(str(image), str(label)) for image, label in pairs]
        record |= measure_sides(source, files, args.batch, args.rounds)
        record["parts"] = measure_parts(source, args.batch, args.images)
        record["workers"] = [measure_workers(source, args.batch, n, 2 * args.rounds) for n in args.workers]
    publish(record, as_markdown(record), args.output)


if __name__ == "__main__":
    main()
