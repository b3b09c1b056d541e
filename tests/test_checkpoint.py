"""Checkpoints: what is kept, what comes back, on which devices."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from psp_jax import api, parallel, processes, train
from psp_jax.checkpoint import Checkpoints, load_variables, save_variables
from psp_jax.train_step import TrainState


def state(step: int, devices: int = 1, averaged: bool = False) -> TrainState:
    mesh = Mesh(np.array(jax.local_devices()[:devices]), ("data",))
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


def test_a_step_saved_anew_keeps_the_former_one_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep_latest=1, keep_best=1)
    checkpoints.make_way(1)
    assert steps_in(tmp_path) == ["replaced-1"]  # what a kill would leave
    killed = Checkpoints(tmp_path, keep_latest=1, keep_best=1)
    assert (killed.latest_step(), steps_in(tmp_path)) == (1, ["1"])
    killed.make_way(1)
    with monkeypatch.context() as context:
        context.setattr("psp_jax.checkpoint.array_sums", lambda tree: [1])  # as if other bits had been in memory
        killed.save(1, state(2), scores(0.95))
        with pytest.raises(OSError, match="step 1 could not be saved"):
            killed.close()
    again = Checkpoints(tmp_path, keep_latest=1, keep_best=1)
    identical(again.restore(1, state(0)), state(1))
    again.make_way(1)
    again.save(1, state(3), scores(0.5))
    again.close()
    assert steps_in(tmp_path) == ["1"]
    identical(Checkpoints(tmp_path).restore(1, state(0)), state(3))


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


def test_processes_that_choose_other_checkpoints_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path / "checkpoints", 4)
    asked = []
    card = SimpleNamespace(model=None, classes=SimpleNamespace(num_classes=3))
    monkeypatch.setattr(api.ModelCard, "read", lambda directory: card)
    monkeypatch.setattr(api, "variable_shapes", lambda *_: state(0).variables)
    monkeypatch.setattr(processes, "agree", lambda step: asked.append(step))
    with pytest.raises(ValueError, match=r"choose the same latest checkpoint in .* \(this one: 4\); --workdir must be"):
        api.load(tmp_path, "latest", parallel.replicated(parallel.make_mesh()))
    assert asked == [4]


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def kept(directory: Path, *steps: int) -> None:
    """Checkpoints of `steps`, the first of which is the best."""
    checkpoints = Checkpoints(directory, keep_latest=len(steps), keep_best=1)
    for step in steps:
        checkpoints.save(step, state(step), scores(0.9 - step / 100), {"owed": step})
    checkpoints.close()


def arrays_of(checkpoint: Path) -> Path:
    """The largest file of the parameters: it holds the arrays."""
    return max(
        (path for path in (checkpoint / "variables").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def flip(path: Path) -> None:
    """Turn one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("8")


DAMAGES = {
    "bit": lambda path: flip(arrays_of(path)),
    "bit of the notes": lambda path: flip(path / "notes" / "metadata"),
    "bit of the scores": lambda path: flip(path / "metrics" / "metrics"),
    "cut": lambda path: os.truncate(arrays_of(path), arrays_of(path).stat().st_size - 7),
    "removed": lambda path: arrays_of(path).unlink(),
    "checksums": lambda path: flip(path / "checksums.json"),
    "empty": empty,
    "a file": a_file,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_damaged_is_passed_over_and_its_step_saved_anew(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept(tmp_path, 4, 8)
    DAMAGES[what](tmp_path / "8")
    reader = Checkpoints(tmp_path)
    assert (reader.latest_step(), reader.best_step()) == (4, 4)
    assert "The checkpoint of step 8 in " in (told := capsys.readouterr().err) and "passed over" in told
    writer = Checkpoints(tmp_path, keep_latest=2, keep_best=1)
    assert "set aside" in capsys.readouterr().err
    assert writer.latest_step() == 4
    identical(writer.restore(4, state(0)), state(4))
    writer.save(8, state(8), None)
    writer.close()
    assert steps_in(tmp_path) == ["4", "8", "damaged-8"]
    identical(Checkpoints(tmp_path).restore(8, state(0)), state(8))


def test_a_damaged_older_checkpoint_neither_stops_a_run_nor_is_the_best(tmp_path: Path) -> None:
    kept(tmp_path, 4, 8)
    (tmp_path / "4" / "metrics" / "metrics").write_text("{")
    assert Checkpoints(tmp_path).best_step() == 8
    kept_by = Checkpoints(tmp_path, keep_latest=2, keep_best=1)
    assert (kept_by.latest_step(), kept_by.best_step()) == (8, 8)


def test_a_run_does_not_begin_anew_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    kept(tmp_path, 4)
    flip(arrays_of(tmp_path / "4"))
    with pytest.raises(
        ValueError, match=r"Every checkpoint in .* is damaged \(4: .* is not what was written\); restore"
    ):
        Checkpoints(tmp_path, keep_latest=1)
    assert steps_in(tmp_path) == ["4"]


def test_checkpoints_without_checksums_are_taken_if_they_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept(tmp_path, 4, 8)
    for step in (4, 8):
        (tmp_path / str(step) / "checksums.json").unlink()
    assert Checkpoints(tmp_path).latest_step() == 8
    assert "The checkpoint of step 8 has no checksums, as those of earlier versions" in capsys.readouterr().err
    for path in (tmp_path / "8" / "variables" / "d").iterdir():
        os.truncate(path, 40)
    assert Checkpoints(tmp_path).latest_step() == 4


@pytest.mark.parametrize("left", [None, "{}", '{"variables/d": [1, 2]}'])
def test_a_checkpoint_that_lost_its_checksums_is_not_taken_for_an_old_one(tmp_path: Path, left: str | None) -> None:
    kept(tmp_path, 4, 8)
    (tmp_path / "8" / "checksums.json").unlink()
    if left is not None:
        (tmp_path / "8" / "checksums.json").write_text(left)
    (tmp_path / "damaged-8").write_text("a file of somebody else")
    (tmp_path / "replaced-note.txt").write_text("and another")
    assert Checkpoints(tmp_path).latest_step() == 4
    assert Checkpoints(tmp_path, keep_latest=2).latest_step() == 4
    assert (tmp_path / "damaged-8").is_dir() and (tmp_path / "replaced-note.txt").exists()


def test_what_is_read_back_wrong_gets_no_name_and_nothing_is_deleted_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    checkpoints.say = lambda line: print(*steps_in(tmp_path), line, sep=", ", file=sys.stderr)
    checkpoints.save(1, state(1), None)
    with monkeypatch.context() as context:
        context.setattr("psp_jax.checkpoint.array_sums", lambda tree: [1])  # as if other bits had been in memory
        checkpoints.save(2, state(2), None)
        checkpoints.save(3, state(3), None)
        told = capsys.readouterr().err
        assert "1, checkpoint of step 1 written and read back in " in told  # only when it has its name
        assert "step 2 could not be saved in " in told and "is not what was written" in told
        with pytest.raises(
            OSError, match=r"step 3 could not be saved .*; that of step 1 is whole, and the same command"
        ):
            checkpoints.save(4, state(4), None)
    assert steps_in(tmp_path) == ["1"]
    checkpoints.save(4, state(4), None)
    checkpoints.close()
    assert steps_in(tmp_path) == ["4"]
    identical(Checkpoints(tmp_path).restore(4, state(0)), state(4))


def test_a_former_checkpoint_is_back_where_the_new_one_is_damaged(tmp_path: Path) -> None:
    kept(tmp_path, 4)
    shutil.copytree(tmp_path / "4", tmp_path / "replaced-4")
    flip(arrays_of(tmp_path / "4"))
    assert Checkpoints(tmp_path, keep_latest=1).latest_step() == 4
    assert steps_in(tmp_path) == ["4", "damaged-4"]
    identical(Checkpoints(tmp_path).restore(4, state(0)), state(4))
