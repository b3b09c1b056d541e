"""A model as one StableHLO file, which JAX runs without this package.

import json, jax, numpy as np
from jax import export
run = export.deserialize(open("DIR/model.stablehlo", "rb").read())
signature = json.load(open("DIR/signature.json"))
image = np.zeros([1, *signature["input"]["shape"][1:]], np.float32)  # RGB, 0 to 255
logits, labels = run.call(image)
names = [signature["classes"]["names"][label] for label in np.unique(labels)]
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from psp_jax.deploy.program import abstract_image, make_program
from psp_jax.workdir import ModelCard

FILE = "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(directory: Path, card: ModelCard, variables: Any, size: tuple[int, int]) -> None:
    """Lower the program for every platform, with the parameters inside, and write it.

    JAX promises that its releases of the next six months read the file, and those of the three weeks before.
    """
    program = make_program(card, size)
    lowered = export.export(jax.jit(lambda image: program(variables, image)), platforms=PLATFORMS)(abstract_image(size))
    (directory / FILE).write_bytes(lowered.serialize())


def run_stablehlo(directory: Path, image: np.ndarray) -> np.ndarray:
    """Return the logits f32 [B, H, W, C] of the written program for `image` f32 [B, H, W, 3]."""
    logits, _ = export.deserialize(bytearray((directory / FILE).read_bytes())).call(image)
    return np.asarray(logits)
