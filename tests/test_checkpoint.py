"""Checkpoints: what is kept, what comes back, on which devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from psp_jax import processes, train
from psp_jax.checkpoint import Checkpoints, load_variables, save_variables
from psp_jax.train_step import TrainState


def state(step: int, devices: int = 1, averaged: bool = False) -> TrainState:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    values = TrainState(
        jnp.asarray(step, jnp.int32),
        {"backbone": {"kernel": jnp.full((3, 4), step + 0.1)}},
        {"backbone": {"mean": jnp.full((4,), step + 0.2)}},
        ({"trace": jnp.full((3, 4), step + 0.3)}, ()),
        {"backbone": {"kernel": jnp.full((3, 4), step + 0.4)}} if averaged else None,
    )
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec()))


def identical(ours: object, theirs: object) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


def scores(mean_iou: float | None) -> dict[str, float | None]:
    return {"mean_iou": mean_iou, "pixel_accuracy": 0.5}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=2, keep_best=1)
    validated = {1: scores(0.5), 2: scores(0.9), 3: None, 4: scores(0.1), 5: None, 6: scores(None)}
    for step, metrics in validated.items():
        checkpoints.save(step, state(step), metrics)
    checkpoints.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 5, 6]
    reader = Checkpoints(tmp_path)
    assert (reader.latest_step(), reader.best_step()) == (6, 2)
    identical(reader.restore(2, state(0)), state(2))
    identical(reader.restore_variables(6, state(0).variables), state(6).variables)


def test_without_a_validation_there_is_no_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=2, keep_best=1)
    checkpoints.save(1, state(1), None)
    checkpoints.close()
    assert Checkpoints(tmp_path).best_step() is None


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 4)])
def test_restoring_on_other_devices(before: int, after: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    checkpoints.save(3, state(3, before), None)
    checkpoints.close()
    like = state(0, after)
    restored = Checkpoints(tmp_path).restore(3, like)
    identical(restored, state(3))
    assert restored.params["backbone"]["kernel"].sharding == like.params["backbone"]["kernel"].sharding


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=2)
    checkpoints.save(1, state(1), None)
    checkpoints.close()
    half = tmp_path / "2.orbax-checkpoint-tmp"  # the name that a kill in the middle of a save leaves
    half.mkdir()
    assert Checkpoints(tmp_path).latest_step() == 1
    assert half.exists()  # it may be another process's, just now
    again = Checkpoints(tmp_path, keep_latest=2)
    again.save(2, state(2), None)
    again.close()
    identical(Checkpoints(tmp_path).restore(2, state(0)), state(2))
    assert not half.exists()


def test_variables_alone_come_back(tmp_path: Path) -> None:
    save_variables(tmp_path / "parameters", state(4).variables)
    identical(load_variables(tmp_path / "parameters", state(0).variables), state(4).variables)


def test_averaged_parameters_are_the_variables_and_the_trained_ones_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    checkpoints.save(3, state(3, averaged=True), None)
    checkpoints.close()
    reader = Checkpoints(tmp_path)
    identical(reader.restore(3, state(0, averaged=True)), state(3, averaged=True))
    variables = reader.restore_variables(3, state(0).variables)
    np.testing.assert_array_equal(variables["params"]["backbone"]["kernel"], np.full((3, 4), 3.4, np.float32))


@pytest.mark.parametrize(("saved", "wanted", "words"), [(True, False, "with averaged"), (False, True, "without")])
def test_averages_neither_begin_nor_end_on_the_way(saved: bool, wanted: bool, words: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    checkpoints.save(3, state(3, averaged=saved), None)
    checkpoints.close()
    with pytest.raises(ValueError, match=rf"step 3 was saved {words}.*train\.ema_decay.*choose a new --workdir"):
        Checkpoints(tmp_path).restore(3, state(0, averaged=wanted))


def test_the_only_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=1, keep_best=1)
    checkpoints.save(1, state(1), None, {"owed": True})
    assert not checkpoints.replaceable(1)
    checkpoints.close()
    several = Checkpoints(tmp_path, keep_latest=2, keep_best=1)
    several.save(2, state(2), None, {"owed": True})
    several.close()
    again = Checkpoints(tmp_path, keep_latest=2, keep_best=1)
    assert again.notes(2) == {"owed": True}
    assert again.replaceable(2)
    again.save(2, state(2), scores(0.5))
    again.close()
    assert Checkpoints(tmp_path).best_step() == 2


def test_processes_see_the_same_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    checkpoints.save(7, state(7), None)
    checkpoints.close()
    asked = []
    monkeypatch.setattr(processes, "agree", lambda step: asked.append(step) or step != 7)
    assert train._latest(Checkpoints(tmp_path / "none", keep_latest=1), tmp_path) is None
    with pytest.raises(ValueError, match=r"\(this one: 7\); --workdir must be on storage that all hosts share"):
        train._latest(Checkpoints(tmp_path), tmp_path)
    assert asked == [-1, 7]
