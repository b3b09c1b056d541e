"""Validation of a model on a whole split: metrics, pictures, and the files that tell them."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from psp_jax import parallel
from psp_jax.data.pipeline import eval_batches
from psp_jax.data.source import Source
from psp_jax.inference import TILE, Variables, count_split, make_eval_step, make_forward, make_labeler
from psp_jax.metrics import summarize
from psp_jax.progress import Progress, track
from psp_jax.visualize import overlay_with_legend, side_by_side
from psp_jax.workdir import ModelCard, write_json


class Validation:
    """Scores variables on every image of a split at its original size, one resized forward pass each.

    Writes eval/metrics.json and predictions/*.png into the run's directory. Built once: it compiles at its first use
    only.
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
    ) -> None:
        self._card, self._mesh, self._source, self._directory = card, mesh, source, directory
        self._track = progress.track if progress else functools.partial(track, primary=parallel.is_primary())
        self._batch_size, self._workers = config.eval.batch_size, config.data.num_workers
        self._split, self._pictures = config.data.eval_split, min(config.log.images, len(source))
        forward = make_forward(model, card.mean, card.std)
        align_corners = card.model["align_corners"]
        step = make_eval_step(
            forward, num_classes=card.classes.num_classes, canvas=card.size, align_corners=align_corners
        )
        self._eval_step = jax.jit(step, out_shardings=parallel.replicated(mesh))
        self._label = make_labeler(forward, canvas=card.size, align_corners=align_corners)

    def run(
        self, variables: Variables, step: int, show: Callable[[str, np.ndarray], None] = lambda name, picture: None
    ) -> dict[str, float | None]:
        """Validate after `step` steps, write the results and return mean_iou, pixel_accuracy and mean_accuracy.

        `show` receives, by name, pictures u8 [H, W, 3] of some images with prediction and ground truth.
        """
        confusion = self._count(variables)
        results = summarize(confusion, self._card.classes.names)
        scores = {name: results[name] for name in ("mean_iou", "pixel_accuracy", "mean_accuracy")}
        if parallel.is_primary():
            record = {"step": step, "split": self._split, "images": len(self._source), "protocol": self._protocol()}
            write_json(self._directory / "eval" / "metrics.json", results | record)
            self._draw(variables, show)
        return scores

    def _count(self, variables: Variables) -> np.ndarray:
        batches = eval_batches(
            self._source,
            canvas=self._card.size,
            label_tile=TILE,
            batch_size=self._batch_size,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
            num_workers=self._workers,
        )
        sharding = parallel.batch_axis_sharding(self._mesh)
        total = -(-len(self._source) // self._batch_size)
        with contextlib.closing(batches), self._track(total, "validate") as advance:

            def to_device(batch: dict[str, np.ndarray]) -> dict[str, Any]:
                advance(1)
                return parallel.to_global(batch, sharding)

            return count_split(self._eval_step, variables, batches, to_device)

    def _protocol(self) -> dict[str, Any]:
        return {
            "name": "whole",
            "description": "each image resized, ratio kept, into the canvas; one forward pass, no flip; scores "
            "interpolated to the label's original size",
            "size": self._card.size,
            "scales": [1.0],
            "flip": False,
        }

    def _draw(self, variables: Variables, show: Callable[[str, np.ndarray], None]) -> None:
        """Write overlays of some images, and show the same beside the ground truth."""
        # Every process holds a whole copy; this one's alone runs here, without the others.
        local = jax.tree.map(lambda x: x.addressable_data(0), variables)
        names, palette = self._card.classes.names, self._card.classes.palette
        folder = self._directory / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        # Spread over the split: neighbours are often frames of one video.
        for i in np.linspace(0, len(self._source) - 1, self._pictures).round().astype(int):
            example = self._source[int(i)]
            image, truth = example["image"], example["label"]
            labels = self._label(local, image)
            stem = str(example["id"]).replace("/", "_")
            Image.fromarray(overlay_with_legend(image, labels, names, palette)).save(folder / f"{stem}.png")
            show(stem, side_by_side(image, labels, truth, names, palette))
