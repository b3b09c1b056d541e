"""Checkpoints and exported parameters, through Orbax: the only module that imports it.

A checkpoint holds the items `variables` (parameters and batch-norm statistics: all that inference needs) and
`training` (step and optimizer state). Where the parameters in `variables` are averaged ones, a third item, `trained`,
holds those that are trained; `notes` holds what else a run needs to go on as if it had never ended. The data stream is
a pure function of the seed and the step, so the step is its position as well.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from psp_jax.train_step import TrainState

VARIABLES = "variables"
TRAINED = "trained"
NOTES = "notes"


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Args:
      directory: where they are; made if missing.
      keep_latest: how many of the newest to keep; 0 for a reader, which must not save.
      keep_best: how many of the best by `mean_iou` to keep besides.
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
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(
        self,
        step: int,
        state: TrainState,
        metrics: dict[str, float | None] | None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Start writing a checkpoint, `notes` as JSON; the state may be donated as soon as this returns."""
        items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        items[NOTES] = ocp.args.JsonSave(dict(notes or {}))
        known = metrics if metrics and metrics["mean_iou"] is not None else None
        if not self._manager.save(step, args=ocp.args.Composite(**items), metrics=known):
            raise ValueError(f"There is a checkpoint of step {step} already.")

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, if there is one."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest mean IoU, if one was saved with a validation."""
        return self._manager.best_step()

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

    def replaceable(self, step: int) -> bool:
        """Delete the checkpoint of `step`, to be saved anew with its scores, unless it is the only one.

        A kill before it is saved anew costs the steps since the checkpoint before. The only one stays, without scores.
        """
        if len(self._manager.all_steps()) < 2:
            return False
        self._manager.delete(step)
        return True

    def restore_variables(self, step: int, like: Any) -> Any:
        """Return parameters and statistics at `step` without the optimizer; `like` gives shapes and shardings."""
        args = ocp.args.Composite(**{VARIABLES: ocp.args.StandardRestore(like)})
        return self._manager.restore(step, args=args)[VARIABLES]

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint holds of a state, by item."""
    items = {VARIABLES: state.variables, "training": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.averaged is None else items | {TRAINED: state.params}


def load_variables(directory: Path, like: Any) -> Any:
    """Read parameters and statistics, written by `save_variables` or as part of a checkpoint, onto `like`'s devices."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), abstract)


def save_variables(directory: Path, variables: Any) -> None:
    """Write parameters and statistics as a plain Orbax checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), variables)
