"""What every exported program computes, and what is written beside it: image in, class scores and labels out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from psp_jax.inference import make_forward
from psp_jax.interpolation import resize
from psp_jax.models import build_model
from psp_jax.workdir import ModelCard

Array = jax.Array
Program = Callable[[Any, Array], tuple[Array, Array]]

# Largest difference between an exported model and the live one, relative to the largest score, that passes.
TOLERANCE = 1e-4


def in_float32(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `config.model` for the same network computed in float32, as every other runtime can."""
    return settings | {"dtype": "float32", "remat": False, "phases": False}


def make_program(card: ModelCard, size: tuple[int, int]) -> Program:
    """Return the function (variables, image f32 [B, *size, 3]) -> (logits f32 [B, *size, C], labels u8 [B, *size]).

    The image is RGB of 0..255; normalisation is part of the function.
    """
    network = build_model(in_float32(card.model), card.classes.num_classes)
    forward = make_forward(network, card.mean, card.std)

    def program(variables: Any, image: Array) -> tuple[Array, Array]:
        scores = forward(variables, image)
        logits = resize(scores, size, card.model["align_corners"], lax.Precision.HIGHEST)
        return logits, logits.argmax(-1).astype(jnp.uint8)

    return program


def abstract_image(size: tuple[int, int]) -> jax.ShapeDtypeStruct:
    """Return the program's input with any batch; height and width are fixed, as the resizing matrices are."""
    return jax.ShapeDtypeStruct(export.symbolic_shape(f"batch, {size[0]}, {size[1]}, 3"), jnp.float32)


def signature(card: ModelCard, size: tuple[int, int]) -> dict[str, Any]:
    """Describe input, outputs and classes of the program as JSON values."""
    image = ["batch", *size]
    return {
        "input": {
            "name": "image",
            "dtype": "float32",
            "shape": [*image, 3],
            "content": "RGB, 0 to 255; normalisation is part of the program",
        },
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": [*image, card.classes.num_classes]},
            {"name": "labels", "dtype": "uint8", "shape": image, "content": "indices into classes.names"},
        ],
        "classes": card.classes.as_dict(),
        "mean": card.mean,
        "std": card.std,
    }


def relative_difference(scores: np.ndarray, live: np.ndarray) -> float:
    """Return the largest absolute difference, relative to the largest live score; nan where a score is not finite."""
    return float(np.abs(scores - live).max() / np.abs(live).max())
