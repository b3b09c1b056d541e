"""A training run: build, restore, then the loop."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from psp_jax import checks, parallel, processes, protocols, run_record
from psp_jax.agreement import check_shared
from psp_jax.build import build_optimizer, build_step
from psp_jax.checkpoint import Checkpoints
from psp_jax.class_weights import complete
from psp_jax.compile_cache import CompileLog
from psp_jax.config import check_fields, plain
from psp_jax.data.source import Source
from psp_jax.data.transforms import AugmentSettings
from psp_jax.download import checksum
from psp_jax.goodput import Goodput
from psp_jax.loop import Run, loop
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model, check_model, variable_shapes
from psp_jax.precise_bn import make_statistics
from psp_jax.preemption import Preemption
from psp_jax.progress import Progress
from psp_jax.recorder import Recorder
from psp_jax.train_step import TrainState, create_state, state_shardings
from psp_jax.validation import Validation
from psp_jax.walltime import WallTime
from psp_jax.watchdog import Watchdog
from psp_jax.weights.fetch import fetch
from psp_jax.weights.initial import RANDOM, check_init, initialise
from psp_jax.workdir import CHECKPOINTS, ModelCard, check_owner, lock, write_json


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
    """Train as `config` says, going on from the newest whole checkpoint in `directory` where there is one.

    SIGTERM saves the state after the present step, also out of a validation, which then is the first thing that the
    next start does. A run so interrupted gives what an undisturbed one gives.

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
      Preempted: SIGTERM came, here or on another process.
      TrainingDiverged: `train.max_skipped` steps in a row were skipped.
    """
    compiled, walltime = CompileLog(), WallTime()
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.spatial)
    sides = mesh.shape["data"], mesh.shape["spatial"]
    checks.check_mesh(config, checks.crop_size(config), True, *sides, jax.process_count())
    PixelLoss(**config.loss).check(train_source.classes.num_classes)
    steps, images = checks.total_steps(config, len(train_source)), len(train_source)
    card = run_record.card(config, train_source)
    check_owner(directory, plain(config), card.classes, images, override)
    model = build_model(card.model, card.classes.num_classes)
    schedule, optimizer = build_optimizer(config, steps)
    state = create_state(model, optimizer, config.seed, mesh, bool(config.train.ema_decay))
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(_watched(config, directory, walltime))
        checkpoints = Checkpoints(directory / CHECKPOINTS, config.checkpoint.keep_latest, config.checkpoint.keep_best)
        stack.callback(_close, checkpoints, walltime)
        latest, notes = _latest(checkpoints, directory), dict[str, Any]()
        if latest is not None:
            state, notes, origin = checkpoints.restore(latest, state), checkpoints.notes(latest), ""
        else:
            state, origin = _initialised(state, config.init, card, mesh)
        start, owed = int(state.step), notes.get("owed", False)
        pixel_loss = complete(PixelLoss(**config.loss), plain(config), train_source, directory, start, steps)
        step_fn = build_step(config, card.classes.ignore_label, model, optimizer, mesh, pixel_loss)
        if processes.is_primary():  # only now: a run that cannot go on keeps the record of what it was
            card.write(directory)
            write_json(directory / "config.json", run_record.record(config, card, steps, images, pixel_loss))
        logs = {"primary": processes.is_primary(), "tensorboard": config.log.tensorboard}
        progress = stack.enter_context(Progress(directory, steps, start, **logs, between=watch.between))
        checkpoints.say = progress.say
        progress.say(run_record.opening(config, mesh, directory, (start, steps), owed, train_source, state, origin))
        of_run = schedule, config.train.log_every_steps, steps, train_source, directory, notes.get("interval", [])
        recorder = Recorder(progress, walltime, watch.goodput, compiled, *of_run, notes.get("skipped", 0))
        validation = Validation(config, card, model, mesh, eval_source, directory, progress)
        renew = _renewed_statistics(config, card, mesh, train_source, progress)
        parts = step_fn, recorder, renew, validation, checkpoints, watch.preemption
        return loop(Run(config, directory, mesh, train_source, *parts), state, (start, steps), owed)


@dataclass(frozen=True)
class _Watch:
    """What looks after a run: the record of its time, and whether it is to end."""

    walltime: WallTime
    goodput: Goodput | None
    preemption: Preemption

    def between(self) -> None:
        """Look after the run between two batches of a validation, on every process."""
        self.walltime.move()
        if self.goodput:
            self.goodput.keep()
        self.preemption.check()


@contextlib.contextmanager
def _watched(config: ConfigDict, directory: Path, walltime: WallTime) -> Iterator[_Watch]:
    """Hold the workdir, and look after the run inside."""
    primary = processes.is_primary()
    with contextlib.ExitStack() as stack:
        if primary:
            stack.enter_context(lock(directory))
        check_shared(directory)
        goodput = stack.enter_context(Goodput(directory, walltime)) if primary else None
        preemption = stack.enter_context(Preemption())
        stack.enter_context(Watchdog(walltime, directory, jax.process_index(), **config.watchdog))
        yield _Watch(walltime, goodput, preemption)


def _latest(checkpoints: Checkpoints, directory: Path) -> int | None:
    latest = checkpoints.latest_step()
    if not processes.agree(-1 if latest is None else latest):
        raise ValueError(
            f"The processes of this run do not see the same newest checkpoint in {directory} (this one: {latest}); "
            "--workdir must be on storage that all hosts share."
        )
    return latest


def _close(checkpoints: Checkpoints, walltime: WallTime) -> None:
    with walltime.during("checkpoint"):
        checkpoints.close()


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
    state = replace(state, **variables, averaged=averaged)
    return parallel.placed(state, state_shardings(state, mesh)), f" from {origin}"


def _renewed_statistics(
    config: ConfigDict, card: ModelCard, mesh: Mesh, source: Source, progress: Progress
) -> Callable[[TrainState], TrainState]:
    """Return what gives a state the batch-norm statistics to be evaluated and saved with; training uses none."""
    if not config.eval.precise_bn_batches:
        return lambda state: state
    statistics = make_statistics(config, card, mesh, source, progress.track)
    whole = parallel.replicated(mesh)
    return lambda state: replace(state, batch_stats=statistics(parallel.placed(state.variables["params"], whole)))
