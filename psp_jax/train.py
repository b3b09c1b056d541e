"""The training loop: build, restore, then per step: batch, update, look at the step before, validate, save."""

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from psp_jax import checks, parallel, processes, protocols
from psp_jax.build import build_optimizer, build_step
from psp_jax.checkpoint import Checkpoints
from psp_jax.class_weights import complete
from psp_jax.compile_cache import CompileLog
from psp_jax.config import check_fields
from psp_jax.data.pipeline import train_batches
from psp_jax.data.source import Source
from psp_jax.data.transforms import AugmentSettings
from psp_jax.download import checksum
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model, check_model, variable_shapes
from psp_jax.precise_bn import make_statistics
from psp_jax.progress import Progress
from psp_jax.recorder import Recorder
from psp_jax.train_step import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    StepFunction,
    TrainState,
    create_state,
)
from psp_jax.validation import Validation
from psp_jax.weights.fetch import fetch
from psp_jax.weights.initial import RANDOM, check_init, initialise
from psp_jax.workdir import CHECKPOINTS, ModelCard, check_owner, environment, lock, versions, write_json


def check_run(config: ConfigDict) -> None:
    """Raise ValueError, naming the field and the remedy, where `config` makes no run; no data is read."""
    check_fields(config)
    check_model(config.model)
    check_init(config.init.source, config.init.path, config.init.sha256)
    AugmentSettings(**config.augment)  # checks itself
    PixelLoss(**config.loss)  # so does this
    checks.check_values(config)
    options, window = config.eval, checks.eval_window(config)
    sizes = (options.base_size, window, options.stride, checks.crop_size(config))
    protocols.choose(options.protocol, options.scales, *sizes)  # a run of days shall not end in an unknown name


def train(
    config: ConfigDict, directory: Path, train_source: Source, eval_source: Source, override: bool = False
) -> TrainState:
    """Train as `config` says, going on from the newest checkpoint in `directory` where there is one.

    Args:
      config: checked and complete.
      directory: the run's workdir; made if missing.
      train_source: the images to train on.
      eval_source: the images to validate on.
      override: go on although fields changed that decide what is learned.

    Returns:
      The state after the last step.

    Raises:
      ValueError: the workdir belongs to another configuration, batches do not divide over the mesh, or class weights
        are not those of the classes.
      TrainingDiverged: loss or gradient is not finite; the last checkpoint before that is kept.
    """
    compiled = CompileLog()
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.spatial)
    sides = mesh.shape["data"], mesh.shape["spatial"]
    checks.check_mesh(config, checks.crop_size(config), True, *sides, jax.process_count())
    PixelLoss(**config.loss).check(train_source.classes.num_classes)
    steps = checks.total_steps(config, len(train_source))
    card = _card(config, train_source)
    check_owner(directory, _plain(config), card.classes, len(train_source), override)
    model = build_model(card.model, card.classes.num_classes)
    schedule, optimizer = build_optimizer(config, steps)
    state = create_state(model, optimizer, config.seed, mesh, bool(config.train.ema_decay))
    primary = processes.is_primary()
    with contextlib.ExitStack() as stack:
        if primary:
            stack.enter_context(lock(directory))
        processes.wait_for_all("locked")
        checkpoints = Checkpoints(directory / CHECKPOINTS, config.checkpoint.keep_latest, config.checkpoint.keep_best)
        stack.callback(checkpoints.close)
        latest = checkpoints.latest_step()
        if latest is not None:
            state, origin = checkpoints.restore(latest, state), ""
        else:
            state, origin = _initialised(state, config.init, card, mesh)
        start = int(state.step)
        pixel_loss = complete(PixelLoss(**config.loss), _plain(config), train_source, directory, start, steps)
        step_fn = build_step(config, card.classes.ignore_label, model, optimizer, mesh, pixel_loss)
        if primary:  # only now: a run that cannot go on keeps the record of what it was
            card.write(directory)
            write_json(directory / "config.json", _record(config, card, steps, len(train_source), pixel_loss))
        progress = stack.enter_context(
            Progress(directory, steps, start, primary=primary, tensorboard=config.log.tensorboard)
        )
        progress.say(_opening(config, mesh, directory, start, steps, len(train_source), state, origin))
        recorder = Recorder(progress, schedule, config.train.log_every_steps, steps, train_source, directory, compiled)
        validation = Validation(config, card, model, mesh, eval_source, directory, progress)
        renew = _renewed_statistics(config, card, mesh, train_source, progress)
        span = (start, steps)
        return _loop(config, mesh, train_source, state, span, step_fn, recorder, renew, validation, checkpoints)


def _card(config: ConfigDict, source: Source) -> ModelCard:
    return ModelCard(
        model=config.model.to_dict(),
        classes=source.classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=checks.eval_size(config),
        window=checks.crop_size(config),
        base_size=config.eval.base_size[0] if len(config.eval.base_size) == 1 else 512,
    )


def _initialised(state: TrainState, init: ConfigDict, card: ModelCard, mesh: Mesh) -> tuple[TrainState, str]:
    """Return the first state with the weights that `config.init` names, and what was taken from where."""
    if init.source == RANDOM:
        return state, " from random weights"
    file = fetch(init.path, init.sha256 or None)
    if not processes.agree(int(checksum(file, "sha256")[:7], 16)):
        raise ValueError(f"{file} differs between the processes of this run; give all of them the same init.path.")
    found, origin = initialise(state.variables, card.model, variable_shapes, init.source, file, card.mean, card.std)
    variables = parallel.to_replicated(found, mesh)
    averaged = None if state.averaged is None else jax.tree.map(jnp.copy, variables["params"])
    return replace(state, **variables, averaged=averaged), f" from {origin}"


def _renewed_statistics(
    config: ConfigDict, card: ModelCard, mesh: Mesh, source: Source, progress: Progress
) -> Callable[[TrainState], TrainState]:
    """Return what gives a state the batch-norm statistics to be evaluated and saved with; training uses none."""
    if not config.eval.precise_bn_batches:
        return lambda state: state
    statistics = make_statistics(config, card, mesh, source, progress.track)
    return lambda state: replace(state, batch_stats=statistics(state.variables["params"]))


def _loop(
    config: ConfigDict,
    mesh: Mesh,
    source: Source,
    state: TrainState,
    span: tuple[int, int],
    step_fn: StepFunction,
    recorder: Recorder,
    renew: Callable[[TrainState], TrainState],
    validation: Validation,
    checkpoints: Checkpoints,
) -> TrainState:
    """Take the steps of `span`; the order of events matters and is stated where they stand."""
    sharding = parallel.batch_axis_sharding(mesh)
    share = parallel.share(sharding)
    start, steps = span
    batches = train_batches(
        source,
        crop_size=checks.crop_size(config),
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start,
        num_steps=steps - start,
        shard_index=share[0],
        shard_count=share[1],
        augment=AugmentSettings(**config.augment),
        num_workers=config.data.num_workers,
    )
    with contextlib.closing(batches):
        for done in range(start + 1, steps + 1):
            with recorder.throughput.waiting():
                batch = next(batches)
            index = batch.pop("index")
            state, metrics = step_fn(state, parallel.to_global(batch, sharding))
            if done == start + 1:
                recorder.throughput.take()  # this call compiled; images per second count from here
                recorder.compiled()
            # The metrics of the step before are there by now: reading them does not stall the device.
            recorder.settle()
            recorder.push(done, metrics, index)
            recorder.throughput.add(config.train.batch_size)
            validate = done == steps or (config.eval.every_steps and done % config.eval.every_steps == 0)
            if validate or done % config.checkpoint.every_steps == 0:
                recorder.settle()  # a state that is not finite must be neither validated nor saved
                scores = None
                with recorder.throughput.paused():
                    state = renew(state)
                    if validate:
                        scores = validation.run(state.variables, done, functools.partial(recorder.show, done))
                        recorder.validated(done, scores)
                checkpoints.save(done, state, scores)
    return state


def _record(config: ConfigDict, card: ModelCard, steps: int, images: int, loss: PixelLoss) -> dict[str, Any]:
    """Return what config.json tells of a run."""
    return {
        "config": _plain(config),
        "resolved": {
            "steps": steps,
            "train_images": images,
            "batch_size": config.train.batch_size,
            "epochs": steps * config.train.batch_size / images,
            "backbone_lr": config.optimizer.base_lr,
            "head_lr": config.optimizer.base_lr * config.optimizer.head_lr_multiplier,
            "class_weights": loss.class_weights,
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
        },
        "classes_digest": card.classes.digest(),
        "versions": versions(),
        "environment": environment(),
    }


def _plain(config: ConfigDict) -> dict[str, Any]:
    return dict(json.loads(config.to_json()))


def _state_of(start: int, steps: int) -> str:
    if start >= steps:
        return f"finished already at step {start}: validate with --mode=evaluate, or add steps with --resume=override"
    return f"going on after step {start}" if start else "starting"


def _opening(
    config: ConfigDict, mesh: Mesh, directory: Path, start: int, steps: int, images: int, state: TrainState, origin: str
) -> str:
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    model = config.model
    return (
        f"{model.head.upper()} head on ResNet-{model.depth}, output stride {model.output_stride}: "
        f"{parameters / 1e6:.1f} M parameters, {model.dtype}\n"
        f"{steps} steps of {config.train.batch_size} crops {checks.crop_size(config)} from {images} images "
        f"({steps * config.train.batch_size / images:.1f} epochs) on {mesh.size} x {jax.devices()[0].device_kind}\n"
        f"{_state_of(start, steps)} in {directory}{origin}"
    )
