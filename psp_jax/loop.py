"""The training loop, step by step: stop if asked, batch, update, look at the step before, validate, save."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from psp_jax import checks, parallel
from psp_jax.bundle import TrainingDiverged, write_bundle
from psp_jax.checkpoint import Checkpoints
from psp_jax.data.pipeline import BatchIterator, train_batches
from psp_jax.data.source import Source
from psp_jax.data.transforms import AugmentSettings
from psp_jax.preemption import Preempted, Preemption
from psp_jax.recorder import Recorder, some
from psp_jax.train_step import StepFunction, TrainState
from psp_jax.validation import Validation


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: ConfigDict
    directory: Path
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

    def give_up(self, done: int, state: TrainState) -> None:
        """Write down the last of the skipped steps, with what it began with, and end the run.

        Raises:
          TrainingDiverged: always.
        """
        images, why = self.recorder.images, self.recorder.why
        remedy = "run psp_jax.check_data" if "invalid_labels" in why else "lower optimizer.base_lr"
        try:
            with self.recorder.walltime.during("checkpoint"):
                folder = write_bundle(self.directory, self.config, self.source, done, state, images)
            kept = f"is in {folder}, and python -m psp_jax.replay --bundle {folder} tells what is wrong with it first"
        except (OSError, ValueError) as error:  # must not hide why the run ends
            kept = f"could not be kept: {str(error).rstrip('.')}"
        raise TrainingDiverged(
            f"Steps {done - self.recorder.row + 1} to {done} were skipped, the last for {why} with the "
            f"images {some(images)}; look at these, or {remedy}. The checkpoints are kept; what that "
            f"step began with {kept}."
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
                    whole = parallel.placed(state.variables, parallel.replicated(self.mesh))
                    scores = self.validation.run(whole, done, functools.partial(self.recorder.show, done))
        except Preempted:
            self.stop(done, None if saved else state, owed=validate)
            raise
        if scores:
            self.recorder.validated(done, scores)
        if saved:
            self.checkpoints.make_way(done)
        self.save(done, state, scores)
        return state

    def save(
        self, done: int, state: TrainState, scores: dict[str, float | None] | None = None, owed: bool = False
    ) -> None:
        """Start writing a checkpoint, with what a run that goes on from it must know to log the same lines."""
        recorder = self.recorder
        notes = {"interval": list(recorder.interval), "owed": owed, "skipped": recorder.skipped}
        with recorder.walltime.during("checkpoint"):  # in the background, while the interval goes on
            self.checkpoints.save(done, state, scores, notes)

    def stop(self, done: int, state: TrainState | None, owed: bool = False) -> None:
        """Save the state of step `done`, None where that was done before, since SIGTERM came."""
        if state is not None:
            self.save(done, state, owed=owed)
        self.recorder.stopped(done)


def loop(run: Run, state: TrainState, span: tuple[int, int], owed: bool) -> TrainState:
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
                recorder.settle()
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
            if recorder.row:  # in trouble: wait for this step too, so that the state is still the one it began with
                recorder.settle()
            if recorder.row == config.train.max_skipped:
                run.give_up(done, state)
            walltime.add(config.train.batch_size)
            validate = done == steps or (config.eval.every_steps and done % config.eval.every_steps == 0)
            if validate or done % config.checkpoint.every_steps == 0:
                recorder.settle()
                state, saved = run.finish(done, state, bool(validate)), done
    return state
