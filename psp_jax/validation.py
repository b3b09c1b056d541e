"""Evaluation of a model on a whole split: counts, scores, pictures, and the files that tell them."""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from psp_jax import parallel, processes, results
from psp_jax.data.pipeline import eval_batches
from psp_jax.data.source import Source
from psp_jax.inference import TILE, Variables, counted, join_halves, make_eval_step, make_forward
from psp_jax.metrics import summarize
from psp_jax.preemption import Preempted
from psp_jax.progress import Progress, track
from psp_jax.protocols import Protocol, grouped
from psp_jax.sliding import SlidingScorer, make_scorer, make_sliding_step
from psp_jax.tally import Tally
from psp_jax.visualize import overlay_with_legend, side_by_side
from psp_jax.workdir import ModelCard, write_png

Item = TypeVar("Item")
Batch = dict[str, Any]

_SAVE_SECONDS = 30.0  # an evaluation that is interrupted loses at most this much

WHOLE = {
    "name": "whole",
    "description": "each image resized, ratio kept, into the canvas; one forward pass, no flip; scores interpolated to "
    "the label's original size",
    "scales": [1.0],
    "flip": False,
}


@dataclass(frozen=True)
class _Way:
    """How some images are counted: the compiled step, their indices, and what plans their windows, if there are any."""

    step: Callable[[Variables, Batch], Batch]
    members: set[int]
    scorer: SlidingScorer | None


class Validation:
    """Scores variables on every image of a split at its original size, asking `between` batches whether to go on.

    Writes eval/ (see `results`) and predictions/*.png into the run's directory. Built once: it compiles at its first
    use only. Without a protocol each image is resized into the card's canvas and runs once (`WHOLE`).
    """

    def __init__(
        self,
        config: ConfigDict,
        card: ModelCard,
        model: nn.Module,
        mesh: Mesh,
        source: Source,
        directory: Path,
        progress: Progress | None = None,
        protocol: Protocol | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        if not len(source):
            raise ValueError(f"The split {config.data.eval_split} holds no image; choose another split.")
        self._card, self._mesh, self._source, self._directory = card, mesh, source, directory
        self._protocol, self._options = protocol, config.eval
        own_track = functools.partial(track, primary=processes.is_primary(), between=between)
        self._track = progress.track if progress else own_track
        self._workers, self._split = config.data.num_workers, config.data.eval_split
        self._statistics = {
            "precise_bn_batches": config.eval.precise_bn_batches,
            "precise_bn_batch_size": config.train.batch_size,
            "precise_bn_crop_size": list(card.window),
        }
        self._pictures = min(config.log.images, len(source))
        self._work = np.ones(len(source), np.int64)  # of each image, for the progress display
        forward = make_forward(model, card.mean, card.std)
        if protocol is None:
            self._batch_size = config.eval.batch_size
            self._sharding = parallel.image_sharding(mesh, self._batch_size)
            step = make_eval_step(
                forward,
                num_classes=card.classes.num_classes,
                canvas=card.size,
                align_corners=card.model["align_corners"],
            )
            self._ways = [_Way(counted(step, mesh, self._sharding), set(range(len(source))), None)]
        else:
            # An image a device and call: the largest first, so that those of a call take about the same time.
            self._sharding, self._batch_size = parallel.all_devices_sharding(mesh), mesh.size
            self._ways = self._sliding_ways(protocol, forward)
        self._share = jax.jit(lambda *x: x, out_shardings=parallel.replicated(mesh))

    def _sliding_ways(self, protocol: Protocol, forward: Callable[..., jax.Array]) -> list["_Way"]:
        """Return how to count the images of each group of `protocols.grouped`, and note the work of each image."""
        sizes = self._source.sizes()
        ways = []
        for fixed, members in grouped(protocol, sizes):
            held = [sizes[i] for i in members]
            scorer = make_scorer(self._card, forward, fixed, held, self._options.window_batch)
            self._work[members] = [int(scorer.plan(sizes[i])["count"]) for i in members]
            step = make_sliding_step(scorer, self._mesh)
            ways.append(_Way(counted(step, self._mesh, self._sharding), set(members), scorer))
        return ways

    def run(
        self,
        variables: Variables,
        step: int,
        show: Callable[[str, np.ndarray], None] = lambda name, picture: None,
        resume: bool = False,
    ) -> dict[str, float | None]:
        """Evaluate after `step` steps, write the results and return mean_iou, pixel_accuracy and mean_accuracy.

        Args:
          variables: replicated over the mesh.
          step: optimizer steps that made them.
          show: receives, by name, pictures u8 [H, W, 3] of some images with prediction and ground truth.
          resume: keep what is counted in eval/partial.npz, and go on from there.
        """
        source, evaluated = self._source, self._directory / "eval"
        protocol = self._protocol.describe() if self._protocol else WHOLE | {"size": list(self._card.size)}
        tally = Tally(len(source), self._card.classes.num_classes)
        partial = evaluated / "partial.npz" if resume else None
        if partial:
            norm = float(jax.jit(optax.tree.norm)(variables))
            data = f"{source.directory} {source.classes.digest()} {self._split}"
            tally = self._resumed(tally, partial, owner := f"{step} {norm!r} {data} {protocol}")
        self._count(variables, tally, functools.partial(tally.save, partial, owner) if partial else None)
        if partial and self._options.save_predictions:
            self._write_missing_predictions(variables)
        record = {"step": step, "split": self._split, "images": len(source), "protocol": protocol}
        if self._options.precise_bn_batches:
            record |= self._statistics
        scores = results.image_scores(tally)
        chosen = results.choose_gallery(scores, self._options.gallery)
        pictured = self._pictured(variables, chosen)
        if processes.is_primary():
            ids = [source.ids(i) for i in range(len(source))]
            found = results.write_scores(evaluated, tally, self._card.classes, ids, record)
            self._draw(pictured, chosen, scores, show)
            if partial:
                partial.unlink(missing_ok=True)
        else:
            found = summarize(tally.confusion, self._card.classes.names)
        return {name: found[name] for name in ("mean_iou", "pixel_accuracy", "mean_accuracy")}

    def _resumed(self, tally: Tally, partial: Path, owner: str) -> Tally:
        """Return the counts of an interrupted evaluation, on every process the same, or the empty `tally`."""
        words = tally.load(partial, owner)
        processes.wait_for_all("tally")  # nobody saves before everybody has read
        if not processes.agree(int(tally.done.sum())):
            words = f"{partial} is not seen alike by all processes; starting anew"
            tally = Tally(*tally.images.shape[::2])
        if processes.is_primary():
            if words:
                print(words, flush=True)
            if not tally.done.any():
                shutil.rmtree(partial.parent / "predictions", ignore_errors=True)  # of another evaluation
        processes.wait_for_all("begin")
        return tally

    def _count(self, variables: Variables, tally: Tally, save: Callable[[], None] | None) -> None:
        """Count the images that the tally lacks; it is kept now and then, at the end, and at SIGTERM."""

        def keep() -> None:
            if save and processes.is_primary():
                try:
                    save()
                except OSError as error:  # the evaluation can be finished all the same
                    print(f"what is counted so far could not be saved below {self._directory}: {error}", flush=True)

        pending = [int(i) for i in np.argsort(-self._work, kind="stable") if not tally.done[i]]
        saved = time.monotonic()
        try:
            with self._track(int(self._work.sum()), "evaluate", first=int(self._work[tally.done].sum())) as advance:
                for data, counts in _one_behind(self._scored(variables, pending)):
                    index = np.asarray(counts["index"])
                    if self._options.save_predictions and save:
                        self._write_predictions(data, counts)
                    tally.add(join_halves(np.asarray(counts["confusion"])), np.asarray(counts["images"]), index)
                    advance(int(self._work[index[index >= 0]].sum()))
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        saved = time.monotonic()
                        keep()
        except Preempted:
            keep()
            raise
        keep()

    def _scored(self, variables: Variables, indices: Sequence[int]) -> Iterator[tuple[Batch, Batch]]:
        """Yield each batch and its counts, both on the devices."""
        index, count = parallel.share(self._sharding)
        for way in self._ways:
            members = [i for i in indices if i in way.members]
            batches = eval_batches(
                self._source,
                canvas=None if way.scorer else self._card.size,
                label_tile=TILE,
                batch_size=self._batch_size,
                indices=members,
                shard_index=index,
                shard_count=count,
                num_workers=self._workers if members else 0,
            )
            with contextlib.closing(batches):
                for batch in batches:
                    batch["index"] = batch["index"].astype(np.int32)
                    if way.scorer:
                        batch |= _plans(way.scorer, batch)
                    data = parallel.to_global(batch, self._sharding)
                    yield data, way.step(variables, data)

    def _write_predictions(self, data: Batch, counts: Batch) -> None:
        """Write this process's label maps, as the data set's own values, to eval/predictions."""
        parts = (parallel.local_rows(x) for x in (data["index"], data["size"], counts["labels"]))
        for index, (height, width), labels in zip(*parts, strict=True):
            if index >= 0:
                picture = Image.fromarray(self._card.classes.to_raw(labels[:height, :width]))
                write_png(self._prediction(int(index)), picture)

    def _write_missing_predictions(self, variables: Variables) -> None:
        """Label again what another process had counted, but not yet written, when it was interrupted."""
        processes.wait_for_all("predictions")
        missing = [i for i in range(len(self._source)) if not self._prediction(i).exists()]
        processes.wait_for_all("missing predictions")  # nobody writes before everybody has looked
        if missing:
            with self._track(len(missing), "missing predictions") as advance:
                for data, counts in _one_behind(self._scored(variables, missing)):
                    self._write_predictions(data, counts)
                    advance(int((np.asarray(counts["index"]) >= 0).sum()))

    def _prediction(self, index: int) -> Path:
        return self._directory / "eval" / "predictions" / f"{self._source.ids(index)}.png"

    def _pictured(self, variables: Variables, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        """Label the chosen images, and some spread over the split, once more: {index: labels u8 [H, W]}."""
        # Spread: neighbours are often frames of one video.
        spread = np.linspace(0, len(self._source) - 1, self._pictures).round().astype(int).tolist()
        found = {i: np.empty(0) for i in dict.fromkeys([*spread, *chosen])}
        with self._track(len(found), "pictures") as advance:
            for data, counts in _one_behind(self._scored(variables, list(found))):
                shared = self._share(counts["index"], data["size"], counts["labels"])
                for index, (height, width), labels in zip(*map(np.asarray, shared), strict=True):
                    if index >= 0:
                        found[int(index)] = labels[:height, :width]
                        advance(1)
        return found

    def _draw(
        self,
        pictured: dict[int, np.ndarray],
        chosen: Sequence[int],
        scores: results.Scores,
        show: Callable[[str, np.ndarray], None],
    ) -> None:
        """Write overlays of the images spread over the split, show the same beside the truth, and write the gallery."""
        names, palette = self._card.classes.names, self._card.classes.palette
        folder = self._directory / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        for i in list(pictured)[: self._pictures]:
            example = self._source[i]
            image, truth, stem = example["image"], example["label"], str(example["id"]).replace("/", "_")
            Image.fromarray(overlay_with_legend(image, pictured[i], names, palette)).save(folder / f"{stem}.png")
            show(stem, side_by_side(image, pictured[i], truth, names, palette))
        gallery = results.Gallery(self._directory / "eval")
        for i in chosen:
            example = self._source[i]
            gallery.add(str(example["id"]), example["image"], pictured[i], example["label"], scores[i])
        gallery.close()


def _plans(scorer: SlidingScorer, batch: Batch) -> Batch:
    """Return the plans of a batch's images, stacked; padding has no work."""
    sizes = [(int(height), int(width)) for height, width in batch["size"]]
    plans = [scorer.plan(size if i >= 0 else None) for size, i in zip(sizes, batch["index"], strict=True)]
    return {name: np.stack([plan[name] for plan in plans]) for name in plans[0]}


def _one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """Yield each item when the next one was asked for, so that reading a result does not keep the device waiting."""
    former: list[Item] = []
    for item in items:
        yield from former
        former = [item]
    yield from former
