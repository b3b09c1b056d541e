"""The Python API: a trained model that labels images.

model = psp_jax.load("runs/camvid")            # a workdir, or the output of psp_jax.export
labels = model.predict(image)                  # u8 [H, W, 3] -> class indices u8 [H, W]
logits = model.logits(normalised_images)       # f32 [N, H, W, 3] -> f32 [N, H, W, classes]
label = model.labeler("tiles", batch=8)        # for very large images; also gives the confidence
[(labels, confidence)] = label([image])        # u8 [H, W] each, confidence 255 = certain
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from psp_jax import processes
from psp_jax.checkpoint import Checkpoints, load_variables
from psp_jax.command import cause
from psp_jax.inference import make_forward, make_labeler
from psp_jax.interpolation import resize
from psp_jax.models import build_model, variable_shapes
from psp_jax.protocols import SCALES, semseg
from psp_jax.sliding import make_scorer, make_sliding_labeler
from psp_jax.tiling import make_tile_labeler
from psp_jax.workdir import CHECKPOINTS, ModelCard, read_json

PARAMETERS = "parameters"
PROTOCOLS = ("whole", "semseg", "tiles")


class Model:
    """A network with its parameters, classes and preprocessing, on the default device.

    Attributes:
      card: architecture, classes, preprocessing.
      variables: {"params", "batch_stats"}, as the network's `apply` takes them.
      step: optimizer steps that made them.
      network: the flax module.
    """

    def __init__(self, card: ModelCard, variables: dict[str, Any], step: int) -> None:
        self.card, self.variables, self.step = card, variables, step
        self.network = build_model(card.model, card.classes.num_classes)
        align_corners = card.model["align_corners"]

        def logits(variables: dict[str, Any], images: jax.Array) -> jax.Array:
            outputs: Any = self.network.apply(variables, images, train=False)
            return resize(outputs["logits"], (images.shape[1], images.shape[2]), align_corners, lax.Precision.HIGHEST)

        self._logits = jax.jit(logits)
        self._label = self.labeler("whole")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the indices."""
        return self.card.classes.names

    @property
    def palette(self) -> np.ndarray:
        """Colours of the classes, u8 [classes, 3] RGB."""
        return self.card.classes.palette

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Turn RGB images [..., 3] of 0..255 into what `logits` takes: (image - mean) / std in f32."""
        mean, std = np.array(self.card.mean, np.float32), np.array(self.card.std, np.float32)
        return (np.asarray(images, np.float32) - mean) / std

    def logits(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Map normalised images f32 [N, H, W, 3] to class scores f32 [N, H, W, classes] at the input size.

        Every new size compiles anew.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"logits takes images [N, H, W, 3], not {tuple(images.shape)}.")
        return self._logits(self.variables, jnp.asarray(images, jnp.float32))

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Label one image of any size: RGB u8 [H, W, 3] -> class indices u8 [H, W].

        As in validation: the image is resized, ratio kept, into `card.size`, runs once, and the scores are
        interpolated back to [H, W]. No size compiles anew.
        """
        [(labels, _)] = self._label([image])
        return labels

    def labeler(
        self, protocol: str, batch: int = 1, scales: str = "single"
    ) -> Callable[[Sequence[np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
        """Return the function (RGB images u8 [H, W, 3] of any sizes) -> [(class indices, confidence)], each u8 [H, W].

        Confidence is the probability of the class, 255 = 1. Compiles at its first use, for all sizes.

        Args:
          protocol: "whole" is what `predict` does; "semseg" averages windows and mirror images, as an evaluation by
            that protocol; "tiles" covers the image with overlapping windows at its own resolution, in bounded memory.
          batch: images, or windows, that run at a time.
          scales: "single" or "multi", of the protocol semseg.

        Raises:
          ValueError: unknown protocol or scales.
        """
        for name, value, known in (("protocol", protocol, PROTOCOLS), ("scales", scales, tuple(SCALES))):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of: {', '.join(known)}.")
        if scales != "single" and protocol != "semseg":
            raise ValueError(f"protocol={protocol} has no scales; choose semseg.")
        card = self.card
        forward = make_forward(self.network, card.mean, card.std)
        align_corners = card.model["align_corners"]
        if protocol == "tiles":
            label = make_tile_labeler(forward, window=card.window, align_corners=align_corners, batch=batch)
        elif protocol == "semseg":
            views = semseg(SCALES[scales], card.base_size, card.window)
            square = [(1, 1)]  # resized by its long side, it holds every image
            label = make_sliding_labeler(make_scorer(card, forward, views, square, batch))
        else:
            label = make_labeler(forward, canvas=card.size, align_corners=align_corners, batch=batch)

        def checked(images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
            for image in images:
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                    raise ValueError(f"Labelling takes u8 images [H, W, 3], not {image.dtype} {tuple(image.shape)}.")
            return label(self.variables, images)

        return checked


def load(directory: str | Path, checkpoint: str = "latest", sharding: jax.sharding.Sharding | None = None) -> Model:
    """Load the model of a training run's workdir or of an export.

    Args:
      directory: a workdir, or the output of `psp_jax.export`.
      checkpoint: "latest" or "best" (by validation mean IoU); an export holds one only.
      sharding: where the parameters go, and all processes of a run must then load them together; one device of this
        process by default.

    Raises:
      FileNotFoundError: the directory holds no model, or a run that has not saved a checkpoint yet.
      ValueError: a file of it is damaged, or the processes do not choose the same step.
    """
    together = sharding is not None
    if checkpoint not in ("latest", "best"):
        raise ValueError(f"checkpoint={checkpoint!r} is unknown; choose one of: latest, best.")
    directory = Path(directory)
    card = ModelCard.read(directory)
    try:
        shapes = variable_shapes(card.model, card.classes.num_classes)
    except (LookupError, TypeError, ValueError) as error:
        problem = f"{directory}/model.json describes no network that can be built ({cause(error)})"
        raise ValueError(f"{problem}; restore it, or export the model again.") from error
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    if (directory / PARAMETERS).exists():
        return Model(card, load_variables(directory / PARAMETERS, like), _exported_step(directory / "export.json"))
    if not (directory / CHECKPOINTS).exists():
        raise FileNotFoundError(f"{directory} holds no checkpoint yet; train until the first one is saved.")
    with contextlib.closing(Checkpoints(directory / CHECKPOINTS)) as checkpoints:
        step = checkpoints.best_step() if checkpoint == "best" else checkpoints.latest_step()
        if together and not processes.agree(-1 if step is None else step):
            raise ValueError(
                f"The processes of this run do not choose the same {checkpoint} checkpoint in {directory} (this one: "
                f"{step}); --workdir must be on storage that all hosts share, and no run may be writing to it."
            )
        if step is None:
            raise FileNotFoundError(
                f"{directory} holds no {checkpoint} checkpoint; train until the first one is saved"
                f"{' with a validation' if checkpoint == 'best' else ''}."
            )
        return Model(card, checkpoints.restore_variables(step, like), step)


def _exported_step(file: Path) -> int:
    record = read_json(file) if file.exists() else {}
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(step, int):
        raise ValueError(f"{file} tells no step, it is damaged or missing; export the model again.")
    return step
