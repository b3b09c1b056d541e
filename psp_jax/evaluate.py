"""Evaluation of a finished run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from psp_jax import api, parallel, protocols
from psp_jax import config as configuration
from psp_jax.data.source import Source
from psp_jax.report import write_report
from psp_jax.validation import Validation


def evaluate(config: ConfigDict, directory: Path, source: Source) -> dict[str, Any]:
    """Evaluate the run in `directory` on a split, write eval/, predictions/ and report.html, return the scores.

    The network, its classes and its normalisation are the run's own (model.json); `config` says which images, by which
    protocol, how many at a time, and whether the latest or the best checkpoint. An evaluation that was interrupted
    goes on where it was.

    Raises:
      FileNotFoundError: `directory` holds no trained model.
      ValueError: the split has other classes than the run.
    """
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.spatial)
    configuration.check_mesh(config, False, mesh.shape["data"], mesh.shape["spatial"], jax.process_count())
    model = api.load(directory, config.eval.checkpoint, parallel.replicated(mesh))
    if source.classes.digest() != model.card.classes.digest():
        raise ValueError(
            f"The split has the classes of {source.classes.name}, the run in {directory} those of "
            f"{model.card.classes.name}, with other names or another label mapping; give the run's own data set."
        )
    card = dataclasses.replace(model.card, size=configuration.eval_size(config))
    protocol = protocols.choose(
        config.eval.protocol,
        config.eval.scales,
        config.eval.base_size,
        configuration.eval_window(config),
        config.eval.stride,
        configuration.crop_size(config),
    )
    validation = Validation(config, card, model.network, mesh, source, directory, protocol=protocol)
    scores = validation.run(model.variables, model.step, resume=True)
    if parallel.is_primary():
        write_report(directory)
        print(
            f"step {model.step}, {config.eval.protocol} {config.eval.scales}:",
            *(f"{k} {v:.4f}" for k, v in scores.items() if v is not None),
            sep="  ",
        )
    return scores
