"""Evaluation of a finished run."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from psp_jax import api, checks, parallel, processes, protocols
from psp_jax.agreement import check_shared
from psp_jax.data.source import Source
from psp_jax.precise_bn import make_statistics
from psp_jax.preemption import Preemption
from psp_jax.progress import track
from psp_jax.report import write_report
from psp_jax.validation import Validation
from psp_jax.walltime import WallTime
from psp_jax.watchdog import Watchdog
from psp_jax.workdir import lock


def evaluate(config: ConfigDict, directory: Path, source: Source, train_source: Source | None = None) -> dict[str, Any]:
    """Evaluate the run in `directory` on a split, write eval/, predictions/ and report.html, return the scores.

    The network, its classes, its normalisation and, where `config.eval` does not say otherwise, the sizes of windows
    and images are the run's own (model.json); `config` says which images, by which protocol, how many at a time, and
    whether the latest or the best checkpoint. An evaluation that was interrupted goes on where it was; SIGTERM keeps
    what is counted.

    Statistics of batch norm are taken anew from config.eval.precise_bn_batches batches of `train_source`, with 0 not.

    Raises:
      FileNotFoundError: `directory` holds no trained model.
      ValueError: the split has other classes than the run; batches do not divide over the mesh; or statistics are to be
        taken anew, and there is no `train_source`.
    """
    if config.eval.precise_bn_batches and train_source is None:
        raise ValueError(
            f"eval.precise_bn_batches={config.eval.precise_bn_batches} takes batches of training images; give "
            "evaluate() a train_source, or set it to 0."
        )
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.spatial)
    model = api.load(directory, config.eval.checkpoint, parallel.replicated(mesh))
    sides = mesh.shape["data"], mesh.shape["spatial"]
    checks.check_mesh(config, model.card.window, False, *sides, jax.process_count())
    if source.classes.digest() != model.card.classes.digest():
        raise ValueError(
            f"The split has the classes of {source.classes.name}, the run in {directory} those of "
            f"{model.card.classes.name}, with other names or another label mapping; give the run's own data set."
        )
    card = model.card
    if config.eval.size:
        card = dataclasses.replace(card, size=checks.eval_size(config))
    own_size = (card.base_size,) if config.eval.protocol == "semseg" else ()
    protocol = protocols.choose(
        config.eval.protocol,
        config.eval.scales,
        config.eval.base_size or own_size,
        checks.eval_window(config),
        config.eval.stride,
        card.window,
    )
    with contextlib.ExitStack() as stack:
        between = _looked_after(stack, config, directory)
        validation = Validation(config, card, model.network, mesh, source, directory, None, protocol, between)
        variables = model.variables
        if train_source is not None and config.eval.precise_bn_batches:
            show = functools.partial(track, primary=processes.is_primary(), between=between)
            statistics = make_statistics(config, card, mesh, train_source, show)
            variables = variables | {"batch_stats": statistics(variables["params"])}
        scores = validation.run(variables, model.step, resume=True)
        if processes.is_primary():
            write_report(directory)
    if processes.is_primary():
        print(
            f"step {model.step}, {config.eval.protocol} {config.eval.scales}:",
            *(f"{k} {v:.4f}" for k, v in scores.items() if v is not None),
            sep="  ",
        )
    return scores


def _looked_after(stack: contextlib.ExitStack, config: ConfigDict, directory: Path) -> Callable[[], None]:
    """Hold the workdir and watch over an evaluation until `stack` closes; return what to call between two batches."""
    preemption = stack.enter_context(Preemption())
    if processes.is_primary():
        stack.enter_context(lock(directory))
    check_shared(directory)
    walltime = WallTime()
    stack.enter_context(walltime.during("validation"))
    stack.enter_context(Watchdog(walltime, directory, jax.process_index(), **config.watchdog))

    def between() -> None:
        walltime.move()
        preemption.check()

    return between
