"""The training loop: build, restore, then per step: stop if asked, batch, update, look at the step before, validate."""

import contextlib
import functools
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
from psp_jax.data.pipeline import BatchIterator, train_batches
from psp_jax.data.source import Source
from psp_jax.data.transforms import AugmentSettings
from psp_jax.download import checksum
from psp_jax.goodput import Goodput
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model, check_model, variable_shapes
from psp_jax.precise_bn import make_statistics
from psp_jax.preemption import Preempted, Preemption
from psp_jax.progress import Progress
from psp_jax.recorder import Recorder
from psp_jax.train_step import (
    StepFunction,
    TrainState,
    create_state,
)
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
    """Train as `config` says, going on from the newest checkpoint in `directory` where there is one.

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
      TrainingDiverged: loss or gradient is not finite; the last checkpoint before that is kept.
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
        progress.say(run_record.opening(config, mesh, directory, (start, steps), owed, images, state, origin))
        every, held = config.train.log_every_steps, notes.get("interval", [])
        told = progress, walltime, watch.goodput, compiled
        recorder = Recorder(*told, schedule, every, steps, train_source, directory, held)
        validation = Validation(config, card, model, mesh, eval_source, directory, progress)
        renew = _renewed_statistics(config, card, mesh, train_source, progress)
        run = _Run(config, mesh, train_source, step_fn, recorder, renew, validation, checkpoints, watch.preemption)
        return _loop(run, state, (start, steps), owed)


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
    return replace(state, **variables, averaged=averaged), f" from {origin}"


def _renewed_statistics(
    config: ConfigDict, card: ModelCard, mesh: Mesh, source: Source, progress: Progress
) -> Callable[[TrainState], TrainState]:
    """Return what gives a state the batch-norm statistics to be evaluated and saved with; training uses none."""
    if not config.eval.precise_bn_batches:
        return lambda state: state
    statistics = make_statistics(config, card, mesh, source, progress.track)
    return lambda state: replace(state, batch_stats=statistics(state.variables["params"]))


@dataclass(frozen=True)
class _Run:
    """What the loop works with."""

    config: ConfigDict
    mesh: Mesh
    source: Source
    step_fn: StepFunction
    recorder: Recorder
    renew: Callable[[TrainState], TrainState]
    validation: Validation
    checkpoints: Checkpoints
    preemption: Preemption

    def batches(self, start: int, steps: int) -> BatchIterator:
        """Return this process's share of the batches of the steps start + 1 ... steps."""
        config, (index, count) = self.config, parallel.share(parallel.batch_axis_sharding(self.mesh))
        return train_batches(
            self.source,
            crop_size=checks.crop_size(config),
            batch_size=config.train.batch_size,
            seed=config.seed,
            start_step=start,
            num_steps=steps - start,
            shard_index=index,
            shard_count=count,
            augment=AugmentSettings(**config.augment),
            num_workers=config.data.num_workers,
        )

    def finish(self, done: int, state: TrainState, validate: bool, saved: bool = False) -> TrainState:
        """Return the state of step `done` with renewed statistics, after validating and saving it.

        Args:
          done: the step.
          state: after it.
          validate: whether to; a validation that SIGTERM breaks off is owed, and the state saved without scores.
          saved: whether such a state is saved.
        """
        scores = None
        try:
            with self.recorder.walltime.during("validation"):
                state = self.renew(state)
                if validate:
                    scores = self.validation.run(state.variables, done, functools.partial(self.recorder.show, done))
        except Preempted:
            self.stop(done, None if saved else state, owed=validate)
            raise
        if scores:
            self.recorder.validated(done, scores)
        if not saved or self.checkpoints.replaceable(done):
            self.save(done, state, scores)
        return state

    def save(
        self, done: int, state: TrainState, scores: dict[str, float | None] | None = None, owed: bool = False
    ) -> None:
        """Start writing a checkpoint, with what a run that goes on from it must know to log the same lines."""
        with self.recorder.walltime.during("checkpoint"):  # in the background, while the interval goes on
            self.checkpoints.save(done, state, scores, {"interval": list(self.recorder.interval), "owed": owed})

    def stop(self, done: int, state: TrainState | None, owed: bool = False) -> None:
        """Save the state of step `done`, None where that was done before, since SIGTERM came."""
        if state is not None:
            self.save(done, state, owed=owed)
        self.recorder.stopped(done)


def _loop(run: _Run, state: TrainState, span: tuple[int, int], owed: bool) -> TrainState:
    """Take the steps; the order of events matters and is stated where they stand.

    Args:
      run: what they take.
      state: the first one.
      span: steps taken so far, steps of the whole run.
      owed: whether SIGTERM broke off the validation of `state`.
    """
    config, recorder, walltime = run.config, run.recorder, run.recorder.walltime
    sharding = parallel.batch_axis_sharding(run.mesh)
    (start, steps), saved = span, span[0]  # before the first step there is nothing to lose
    if owed:
        state = run.finish(start, state, validate=True, saved=True)
    with contextlib.closing(run.batches(start, steps)) as batches:
        for done in range(start + 1, steps + 1):
            if run.preemption.reached():  # not asked after the last step: the run ends by itself
                recorder.settle()  # a state that is not finite must be neither validated nor saved
                run.stop(done - 1, state if saved < done - 1 else None)
                raise Preempted
            walltime.begin(done)
            with walltime.during("data_wait"):
                batch = next(batches)
            index = batch.pop("index")
            with walltime.during("compile" if done == start + 1 else walltime.activity):
                state, metrics = run.step_fn(state, parallel.to_global(batch, sharding))
            if done == start + 1:
                walltime.take()  # this call compiled; images per second count from here
                recorder.compiled()
            # The metrics of the step before are there by now: reading them does not stall the device.
            recorder.settle()
            recorder.push(done, metrics, index)
            walltime.add(config.train.batch_size)
            validate = done == steps or (config.eval.every_steps and done % config.eval.every_steps == 0)
            if validate or done % config.checkpoint.every_steps == 0:
                recorder.settle()
                state, saved = run.finish(done, state, bool(validate)), done
    return state
