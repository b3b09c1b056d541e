"""Take a step again that was skipped, and tell which tensor is not finite first, or whether labels are invalid.

    python -m psp_jax.replay --bundle runs/mine/not_finite/1234

It is the training step of the run, compiled for as many devices of this machine as divide the batch, with a look at the
output of every layer and at every gradient; batch and state are those of the bundle that the run left. Exit code 0,
whatever is found.
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from psp_jax import build, checks, parallel
from psp_jax.bundle import BATCH, STEP
from psp_jax.checkpoint import Checkpoints
from psp_jax.command import cause, run_command
from psp_jax.config import defaults, plain
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model
from psp_jax.train import check_run
from psp_jax.train_step import TrainState, init_state, state_shardings
from psp_jax.weights.formats import read_tensors
from psp_jax.workdir import CHECKPOINTS, ModelCard, read_json

_SHOWN = 10  # names in a line


class Looks:
    """What was found of tensors inside a compiled step: those that are not finite, by kind, in the step's order."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, bool]] = {}

    def look(self, kind: str, name: str, x: jax.Array) -> None:
        """Have the compiled step tell whether `x` is finite."""
        names = self._found.setdefault(kind, {})
        names.setdefault(name, True)

        def tell(finite: np.ndarray) -> None:
            names[name] = names[name] and bool(finite)

        jax.debug.callback(tell, jnp.isfinite(x).all())

    def layer(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Call a method of the network and look at what it returns."""
        outputs = call(*args, **kwargs)
        for x in jax.tree.leaves(outputs) if context.method_name == "__call__" else ():
            self.look("layers, from the image on", "/".join(context.module.path) or "the network", x)
        return outputs

    def gradients(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """Return `optimizer` with a look at the gradients that it is given."""

        def update(gradients: Any, state: Any, params: Any = None) -> Any:
            for name, x in _names(gradients).items():
                self.look("gradients", name, x)
            return optimizer.update(gradients, state, params)

        return optax.GradientTransformation(optimizer.init, update)

    def told(self) -> dict[str, list[str]]:
        """Return the names of those that are not finite, by kind."""
        jax.effects_barrier()
        return {kind: [name for name in names if not names[name]] for kind, names in self._found.items()}


def _names(tree: Any) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


@dataclass(frozen=True)
class Bundle:
    """What a step began with, as `open_bundle` finds it whole.

    Attributes:
      config: of the run.
      card: of its network.
      step: counted from 1.
      steps: of the whole run.
      images: ids of the batch.
      batch: {"image": [B, H, W, 3], "label": [B, H, W]}.
      pixel_loss: with the class weights of the run.
    """

    config: ConfigDict
    card: ModelCard
    step: int
    steps: int
    images: list[str]
    batch: dict[str, np.ndarray]
    pixel_loss: PixelLoss


def open_bundle(folder: Path) -> Bundle:
    """Read all of a bundle but its checkpoint.

    Raises:
      FileNotFoundError: `folder` is none.
      ValueError: something of it is damaged, or its parts do not belong together.
    """
    if not (folder / BATCH).exists():
        raise FileNotFoundError(f"{folder} holds no {BATCH}; give the folder not_finite/STEP of a workdir.")
    try:
        return _read(folder)
    except Exception as error:  # a configuration holds values of any kind
        raise ValueError(f"{folder} is damaged ({cause(error)}); copy it anew from its run.") from error


def _read(folder: Path) -> Bundle:
    record, about, card = read_json(folder / "config.json"), read_json(folder / STEP), ModelCard.read(folder)
    config = defaults()  # of fields that the run's version did not have
    config.update(record["config"])
    check_run(config)
    loss = PixelLoss(**config.loss)
    weights = tuple(record["resolved"]["class_weights"])
    loss = replace(loss, class_weighting="none", class_weights=weights)
    loss.check(card.classes.num_classes)
    step, steps, images = about["step"], record["resolved"]["steps"], about["images"]
    if not (isinstance(step, int) and isinstance(steps, int) and 1 <= step <= steps < 2**31):
        raise ValueError(f"step {step!r} of {steps!r}")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError(f"{STEP} has no list of images")
    if card.model != plain(config)["model"]:
        raise ValueError("model.json has another network than config.json")
    batch = read_tensors(folder / BATCH)
    shape = (config.train.batch_size, *checks.crop_size(config))
    if {name: array.shape for name, array in batch.items()} != {"image": (*shape, 3), "label": shape}:
        raise ValueError(f"{BATCH} does not hold {shape[0]} images and labels of {shape[1]} x {shape[2]} pixels")
    return Bundle(config, card, step, steps, images, batch, loss)


def restore(folder: Path, bundle: Bundle, like: TrainState) -> TrainState:
    """Return the state that the step began with; ValueError where the checkpoint in `folder` does not hold it."""
    path, step = folder / CHECKPOINTS, bundle.step - 1
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        if checkpoints.latest_step() != step:
            raise ValueError(f"{path} does not hold the state of step {step} whole; copy {folder} anew from its run.")
        try:
            return checkpoints.restore(step, like)
        except Exception as error:  # Orbax tells of another structure in pages
            problem = f"{path} is not of the run in config.json ({cause(error)})"
            raise ValueError(f"{problem}; copy it anew from its run.") from error


def begin(bundle: Bundle) -> tuple[Mesh, nn.Module, optax.GradientTransformation, TrainState]:
    """Return mesh, network, optimizer, and shapes and places of the run's state, on devices of this machine."""
    here = jax.local_devices()  # not as many, in general, as config.mesh was for
    data = math.gcd(bundle.config.train.batch_size, len(here))
    mesh = parallel.make_mesh(data, 1, here[:data])
    model = build_model(bundle.card.model, bundle.card.classes.num_classes)
    _, optimizer = build.build_optimizer(bundle.config, bundle.steps)
    average = bool(bundle.config.train.ema_decay)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, bundle.config.seed, average))
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return mesh, model, optimizer, jax.tree.map(place, shapes, state_shardings(shapes, mesh))


def replay(folder: Path, bundle: Bundle) -> dict[str, list[str]]:
    """Return what is not finite in the step of a bundle, by kind, in the order in which the step comes to it.

    The first kind, invalid labels, is there only where the batch has any.

    Raises:
      ValueError: the checkpoint in `folder` is damaged.
    """
    mesh, model, optimizer, like = begin(bundle)
    state = restore(folder, bundle, like)
    values = {"parameters": state.params, "statistics": state.batch_stats}
    values |= {"optimizer state": state.opt_state, "running mean": state.averaged}
    found = {kind: _not_finite(_names(tree)) for kind, tree in values.items()}
    looks, ignore = Looks(), bundle.card.classes.ignore_label
    watched = looks.gradients(optimizer)
    step_fn = build.build_step(bundle.config, ignore, model, watched, mesh, bundle.pixel_loss)
    with nn.intercept_methods(looks.layer):
        _, metrics = step_fn(state, parallel.to_global(bundle.batch, parallel.batch_axis_sharding(mesh)))
    others = ("grad_norm", "state_norm", "skipped", "invalid_labels")
    losses = {name: x for name, x in metrics.items() if name not in others}
    invalid = int(metrics["invalid_labels"])
    told = looks.told()
    gradients = told.pop("gradients", [])
    norms = {name: metrics[name] for name in ("grad_norm", "state_norm")}
    return (
        ({"labels": [f"{invalid} pixels that are neither a class nor void"]} if invalid else {})
        | found
        | told
        | {
            "losses": _not_finite(losses),
            "gradients": gradients,
            "norms of the gradient and of the new state": _not_finite(norms),
        }
    )


def _not_finite(tensors: Mapping[str, jax.Array]) -> list[str]:
    return [name for name, x in tensors.items() if not bool(jnp.isfinite(x).all())]


def _tell(folder: Path) -> None:
    bundle = open_bundle(folder)
    found = replay(folder, bundle)
    print(f"step {bundle.step} with the images {', '.join(bundle.images)}")
    for kind, names in found.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        print(f"  {kind}: {'finite' if not names else ', '.join(names[:_SHOWN]) + more}")
    first = next(((kind, names[0]) for kind, names in found.items() if names), None)
    print(f"first fault: {first[1]} ({first[0]})" if first else "all of it is finite here")


def main() -> None:
    """Read the flags and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="folder not_finite/STEP of a run's workdir")
    arguments = parser.parse_args()
    _tell(arguments.bundle)


if __name__ == "__main__":
    run_command(main)
