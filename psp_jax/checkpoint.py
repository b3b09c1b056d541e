"""Checkpoints and exported parameters, through Orbax: the only module that imports it.

A checkpoint holds the items `variables` (parameters and batch-norm statistics: all that inference needs) and
`training` (step and optimizer state). Where the parameters in `variables` are averaged ones, a third item, `trained`,
holds those that are trained; `notes` holds what else a run needs to go on as if it had never ended. The data stream is
a pure function of the seed and the step, so the step is its position as well.

A checkpoint gets its name, and older ones are deleted for it, when all of it was read back and found to be what was in
memory; see `integrity`.
"""

import itertools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from psp_jax import processes
from psp_jax.atomic import remedy
from psp_jax.integrity import (
    CHECKSUMS,
    REPLACED,
    array_sums,
    bring_back,
    checked,
    damage,
    move_damaged,
    score,
    seal,
    set_aside,
    steps_in,
    write_checksums,
)
from psp_jax.train_step import TrainState

VARIABLES = "variables"
TRAINED = "trained"
NOTES = "notes"
_numbers = itertools.count()  # of the saves of a process; all processes of a run save in the same order
# What fails in Orbax's threads comes from it as an error, told in a sentence; its log would print pages of stacks.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)


class Checkpoints:
    """The checkpoints of one run, written and verified in the background.

    One that is damaged is never taken: a reader passes over it, and a writer sets it aside when it is made, so that
    its step can be saved anew. All processes of a run make the writer; the first one verifies.

    Args:
      directory: where they are; made if missing.
      keep_latest: how many of the newest to keep; 0 for a reader, which must not save.
      keep_best: how many of the best by `mean_iou` to keep besides.

    Attributes:
      say: takes the lines about what is saved and what is passed over; stderr by default.

    Raises:
      ValueError: there are checkpoints, and every one is damaged (a writer would begin the run anew).
    """

    def __init__(self, directory: Path, keep_latest: int = 0, keep_best: int = 0) -> None:
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics["mean_iou"], n=keep_best, keep_checkpoints_without_metrics=False
        )
        policies = [preservation_policy.LatestN(keep_latest), *([best] if keep_best else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics["mean_iou"],
            create=bool(keep_latest),  # not read_only, which warns on every use
            # What a killed process left half written; a reader must not take it from a run that is still writing.
            cleanup_tmp_directories=bool(keep_latest),
            # Orbax calls it on the first process when all files are written, before the checkpoint gets its name.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._verify, barrier_sync_fn=self._meet),
            lightweight_initialize=not keep_latest,  # a damaged file of scores must not stop a reader
        )
        self.say: Callable[[str], None] = _to_stderr
        self._directory, self._writes = directory.absolute(), bool(keep_latest)
        self._saving: tuple[int, dict[str, list[int]], float] | None = None
        self._lost: OSError | None = None  # why the last save failed, if it did
        self._number, self._wrong, self._news = 0, "", ""  # of the save under way; what is wrong with it, or to tell
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        if self._writes:
            if processes.is_primary():
                bring_back(self._directory, self.say)
                whole = set_aside(self._directory, self.say)
                if whole is not None:
                    self._tell_of_old(whole)
            processes.wait_for_all(f"checkpoints/{directory}")
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(
        self,
        step: int,
        state: TrainState,
        metrics: dict[str, float | None] | None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Start writing a checkpoint, `notes` as JSON; the state may be donated as soon as this returns.

        Raises:
          OSError: it cannot be written, nor could the one before; one failure alone is told and survived.
        """
        self._settle()
        tree = _items(state)
        items = {name: ocp.args.StandardSave(item) for name, item in tree.items()}
        items[NOTES] = ocp.args.JsonSave(dict(notes or {}))
        known = metrics if metrics and metrics["mean_iou"] is not None else None
        self._saving = step, {name: array_sums(item) for name, item in tree.items()}, time.monotonic()
        self._number, self._wrong, self._news = next(_numbers), "", ""
        try:
            if self._manager.save(step, args=ocp.args.Composite(**items), metrics=known):
                return
        except Exception as error:  # whatever the file system, tensorstore and Orbax make of it
            self._failed(error)
            return
        raise ValueError(f"There is a checkpoint of step {step} already.")

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, if there is one."""
        if self._writes:
            return self._manager.latest_step()
        return self._first_whole(steps_in(self._directory))

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest mean IoU, if one was saved with a validation."""
        if self._writes:
            return self._manager.best_step()
        scores = {step: score(self._directory / str(step)) for step in steps_in(self._directory)}
        return self._first_whole(sorted((s for s in scores if scores[s] >= 0), key=scores.__getitem__, reverse=True))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state at `step`, with the shapes and shardings of `like`.

        Raises:
          ValueError: one of the two has averaged parameters, the other has not.
        """
        averaged = (self._manager.directory / str(step) / TRAINED).exists()
        if averaged != (like.averaged is not None):
            raise ValueError(
                f"The checkpoint of step {step} was saved {'with' if averaged else 'without'} averaged parameters, and "
                f"train.ema_decay would now {'leave them out' if averaged else 'begin them'}; set it as it was, or "
                "choose a new --workdir."
            )
        abstract = _items(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(item) for name, item in abstract.items()})
        items = self._manager.restore(step, args=args)
        variables, training = items[VARIABLES], items["training"]
        evaluated, statistics = variables["params"], variables["batch_stats"]
        params, mean = (items[TRAINED], evaluated) if averaged else (evaluated, None)
        return TrainState(training["step"], params, statistics, training["opt_state"], mean)

    def notes(self, step: int) -> dict[str, Any]:
        """Return the notes saved at `step`; checkpoints of version 0.1.0 have none."""
        if not (self._manager.directory / str(step) / NOTES).exists():
            return {}
        args = ocp.args.Composite(**{NOTES: ocp.args.JsonRestore()})
        return dict(self._manager.restore(step, args=args)[NOTES])

    def make_way(self, step: int) -> None:
        """Let the step of a checkpoint be saved anew; it is back unless what is saved is whole."""
        if processes.is_primary():
            (self._directory / str(step)).rename(self._directory / f"{REPLACED}{step}")
        processes.wait_for_all(f"make_way/{self._directory}/{step}")
        self._manager.reload()

    def restore_variables(self, step: int, like: Any) -> Any:
        """Return parameters and statistics at `step` without the optimizer; `like` gives shapes and shardings."""
        args = ocp.args.Composite(**{VARIABLES: ocp.args.StandardRestore(like)})
        return self._manager.restore(step, args=args)[VARIABLES]

    def close(self) -> None:
        """Wait until everything is written; OSError tells that the last checkpoint could not be."""
        try:
            self._settle()
            if self._lost is not None:
                raise self._lost
        finally:
            self._manager.close()

    def _verify(self) -> None:
        """Read back the checkpoint that is being written, in Orbax's thread."""
        assert self._saving is not None
        step, sums, began = self._saving
        (folder,) = self._unfinished(step)
        try:
            seal(folder, sums)
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self._wrong = remedy(error)  # raised here, the other processes would wait for this one in vain: see `_meet`
            return
        words = f"checkpoint of step {step} written and read back in {time.monotonic() - began:.1f} s"
        self._news = f"{words}: {self._directory / str(step)}"

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the other processes in Orbax's thread; raise on all of them what is wrong with the checkpoint.

        By the second time a damaged one has its name: it loses it here, before Orbax deletes others for it. The last
        time, of a single process too, all is done: only then a whole one is told of, since a kill may come before.
        """
        if "async_commit_complete" not in key:
            if self._news and self._saving and (self._directory / str(self._saving[0])).exists():
                news, self._news = self._news, ""
                self.say(news)
            self._barrier(key=key, timeout_ms=timeout_ms)
            return
        verdict = f"checkpoint/{self._number}"
        if processes.is_primary():
            if self._wrong and self._saving is not None:
                move_damaged(self._directory, self._saving[0])
                bring_back(self._directory, self.say)
            processes.tell(verdict, self._wrong)
        self._barrier(key=key, timeout_ms=timeout_ms)
        if wrong := processes.hear(verdict, timeout_ms / 1000):
            raise ValueError(wrong)

    def _settle(self) -> None:
        """Wait for the save that is under way."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `save`
            self._failed(error)
            return
        self._saving = self._lost = None
        if processes.is_primary():
            bring_back(self._directory, self.say)

    def _failed(self, error: Exception) -> None:
        """Tell of a save that failed and free its space; OSError where the one before has failed too."""
        assert self._saving is not None
        step, self._saving, former = self._saving[0], None, self._lost
        if processes.is_primary():
            for folder in self._unfinished(step):
                shutil.rmtree(folder, ignore_errors=True)
            bring_back(self._directory, self.say)
        self._manager.reload()  # what it would have deleted is still there
        latest = self._manager.latest_step()
        words = f"The checkpoint of step {step} could not be saved in {self._directory} ({remedy(error)})"
        kept = "there is none before it" if latest is None else f"that of step {latest} is whole"
        lost = OSError(f"{words}; {kept}, and the same command goes on from there.")
        if former is not None:
            self._lost = None  # told by now
            raise lost from error
        self._lost = lost
        line = f"{words}; the next one is tried, and if that fails too the run ends."
        if processes.is_primary():
            self.say(line)
        else:
            _to_stderr(f"process {jax.process_index()}: {line}")

    def _unfinished(self, step: int) -> list[Path]:
        """Return the folder that Orbax writes the checkpoint of `step` into, before it gets its name."""
        return list(self._directory.glob(f"{step}.orbax-checkpoint-tmp*"))

    def _first_whole(self, steps: Iterable[int]) -> int | None:
        for step in steps:
            if not (words := damage(self._directory / str(step))):
                self._tell_of_old(step)
                return step
            self.say(f"The checkpoint of step {step} in {self._directory} is damaged ({words}) and passed over.")
        return None

    def _tell_of_old(self, step: int) -> None:
        if not (self._directory / str(step) / CHECKSUMS).exists():
            self.say(f"The checkpoint of step {step} has no checksums, as those of earlier versions; it can be read.")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _items(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint holds of a state, by item."""
    items = {VARIABLES: state.variables, "training": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.averaged is None else items | {TRAINED: state.params}


def load_variables(directory: Path, like: Any) -> Any:
    """Read what `save_variables` wrote, or an item of a checkpoint, onto `like`'s devices; ValueError if damaged."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with checked(directory), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), abstract)


def save_variables(directory: Path, variables: Any) -> None:
    """Write parameters and statistics as a plain Orbax checkpoint, with checksums."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), variables)
    write_checksums(directory, directory.rglob("*"))
