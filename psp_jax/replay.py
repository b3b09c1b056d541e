"""Take a step again that was skipped, and tell which tensor is not finite first, or whether labels are invalid.

    python -m psp_jax.replay --bundle runs/mine/not_finite/1234

It is the training step of the run, compiled for as many devices of this machine as divide the batch, with a look at the
output of every layer and at every gradient; batch and state are those of the bundle that the run left. Exit code 0,
whatever is found.
"""

import argparse
import contextlib
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from psp_jax import build, checks, parallel
from psp_jax.bundle import BATCH, STEP
from psp_jax.checkpoint import Checkpoints
from psp_jax.command import run_command
from psp_jax.config import defaults
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model
from psp_jax.train import check_run
from psp_jax.train_step import TrainState, create_state
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


def _read(bundle: Path) -> tuple[Any, dict[str, Any], int, dict[str, np.ndarray]]:
    """Return the fields of the configuration, what was resolved of it, the step and the batch of a bundle."""
    try:
        record, step = read_json(bundle / "config.json"), int(read_json(bundle / STEP)["step"])
        resolved = {name: record["resolved"][name] for name in ("steps", "class_weights")}
        with np.load(bundle / BATCH) as arrays:
            batch = {name: arrays[name] for name in ("image", "label")}
        return record["config"], resolved, step, batch
    except (OSError, LookupError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        words = " ".join(str(error).split())[:300]
        raise ValueError(f"{bundle} is damaged ({type(error).__name__}: {words}); copy it anew from its run.") from None


def _configuration(fields: Any, bundle: Path, batch: Mapping[str, np.ndarray]) -> ConfigDict:
    """Return the configuration of a bundle; a field that an older version lacked is its default, as in the run."""
    config = defaults().lock()
    try:
        config.update(fields)
        check_run(config)
        shape = (config.train.batch_size, *checks.crop_size(config))
        if batch["label"].shape != shape:
            raise ValueError(f"{BATCH} holds labels {batch['label'].shape}, not {shape}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"{bundle}/config.json is of another version of psp_jax, or was edited ({words}); copy it anew from its "
            "run, or replay it with the version that wrote it."
        ) from None
    return config


def _restore(bundle: Path, like: TrainState, step: int) -> TrainState:
    with contextlib.closing(Checkpoints(bundle / CHECKPOINTS)) as checkpoints:
        if checkpoints.latest_step() != step - 1:
            raise ValueError(f"{bundle / CHECKPOINTS} does not hold the state of step {step - 1}; bundles are whole.")
        return checkpoints.restore(step - 1, like)


def replay(bundle: Path) -> dict[str, list[str]]:
    """Return what is not finite in the step of a bundle, by kind, in the order in which the step comes to it.

    The first kind, invalid labels, is there only where the batch has any.

    Raises:
      FileNotFoundError: `bundle` is none.
      ValueError: something of it is damaged, or its configuration is none of this version's.
    """
    if not (bundle / BATCH).exists():
        raise FileNotFoundError(f"{bundle} holds no {BATCH}; give the folder not_finite/STEP of a workdir.")
    (fields, resolved, step, batch), card = _read(bundle), ModelCard.read(bundle)
    config = _configuration(fields, bundle, batch)
    here = jax.local_devices()  # not as many, in general, as config.mesh was for
    data = math.gcd(config.train.batch_size, len(here))
    mesh = parallel.make_mesh(data, 1, here[:data])
    model = build_model(card.model, card.classes.num_classes)
    looks, (_, optimizer) = Looks(), build.build_optimizer(config, resolved["steps"])
    like = create_state(model, optimizer, config.seed, mesh, bool(config.train.ema_decay))
    state = _restore(bundle, like, step)
    values = {"parameters": state.params, "statistics": state.batch_stats}
    values |= {"optimizer state": state.opt_state, "running mean": state.averaged}
    found = {kind: _not_finite(_names(tree)) for kind, tree in values.items()}
    weights = tuple(resolved["class_weights"])
    pixel_loss = replace(PixelLoss(**config.loss), class_weighting="none", class_weights=weights)
    watched = looks.gradients(optimizer)
    step_fn = build.build_step(config, card.classes.ignore_label, model, watched, mesh, pixel_loss)
    with nn.intercept_methods(looks.layer):
        _, metrics = step_fn(state, parallel.to_global(batch, parallel.batch_axis_sharding(mesh)))
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


def _tell(bundle: Path) -> None:
    step = read_json(bundle / STEP) if (bundle / STEP).exists() else {}
    found = replay(bundle)
    print(f"step {step['step']} with the images {', '.join(step['images'])}")
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
