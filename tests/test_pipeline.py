"""Checks that batches depend on (seed, step) alone, that evaluation misses nothing, and that workers behave."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from psp_jax.data import pipeline, transforms
from psp_jax.data.transforms import LABEL_FILL, PIXEL_FILL

ROOT = Path(__file__).parent.parent


class MemorySource:
    """Small random images; `broken` and `deadly` records raise and kill their process."""

    max_size = (50, 70)

    def __init__(self, length=11, broken=None, deadly=None):
        self.length, self.broken, self.deadly = length, broken, deadly

    def __len__(self):
        return self.length

    def ids(self, index):
        return f"image_{index:03d}"

    def __getitem__(self, index):
        if index == self.broken:
            raise KeyError("mask")
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.default_rng(index)
        size = (int(rng.integers(30, 51)), int(rng.integers(40, 71)))
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        return {"image": image, "label": rng.integers(0, 10, size, dtype=np.uint8), "id": self.ids(index)}


class JaxSource(MemorySource):
    """Tells whether jax is loaded in the process that reads."""

    def __getitem__(self, index):
        loaded = sys.modules.get("jax") is not None or "jaxlib" in sys.modules
        return {"image": np.zeros((8, 8, 3), np.uint8), "label": np.full((8, 8), loaded, np.uint8), "id": "x"}


def train(source=None, num_steps=6, **options):
    values = {"crop_size": (33, 41), "batch_size": 8, "seed": 5, "num_steps": num_steps, **options}
    return list(pipeline.train_batches(MemorySource() if source is None else source, **values))


def evaluate(source=None, **options):
    values = {"canvas": (40, 48), "label_tile": 16, "batch_size": 4, **options}
    return list(pipeline.eval_batches(MemorySource() if source is None else source, **values))


def concatenated(shards):
    """Puts the hosts' batches of each step together in the order of the hosts."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]


def assert_equal_batches(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.fixture(scope="module")
def reference():
    return train()


@pytest.mark.parametrize(("hosts", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2), (1, 3)])
def test_global_batches_do_not_depend_on_hosts_or_workers(reference, hosts, workers):
    shards = [train(shard_index=host, shard_count=hosts, num_workers=workers) for host in range(hosts)]
    assert_equal_batches(concatenated(shards), reference)


def test_batches_of_every_augmentation_depend_on_seed_and_step_alone():
    """Crops that are drawn anew take numbers from the example's own generator, so no other example notices."""
    settings = transforms.AugmentSettings(base_size=(90, 60), max_class_share=0.2, photometric=True)
    expected = train(augment=settings)
    shards = [train(augment=settings, shard_index=host, shard_count=2, num_workers=2) for host in range(2)]
    assert_equal_batches(concatenated(shards), expected)
    assert_equal_batches(train(augment=settings, start_step=4, num_steps=2), expected[4:])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_tail(reference, workers):
    assert_equal_batches(train(start_step=4, num_steps=2, num_workers=workers), reference[4:])


def test_resuming_reads_nothing_before():
    start = time.perf_counter()
    train(start_step=10**9, num_steps=1)
    assert time.perf_counter() - start < 10


def test_batch_fields(reference):
    batch = reference[0]
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "image": ("uint8", (8, 33, 41, 3)),
        "label": ("uint8", (8, 33, 41)),
        "index": ("int64", (8,)),
    }


def test_seeds_differ(reference):
    other = train(seed=6)
    assert any((batch["index"] != twin["index"]).any() for batch, twin in zip(other, reference, strict=True))
    # Not the same epochs shifted by one either, as seeds that are added to the epoch would give.
    order = np.concatenate([batch["index"] for batch in train(num_steps=22)])
    shifted = np.concatenate([batch["index"] for batch in train(seed=6, num_steps=22)])
    epochs = {tuple(epoch) for epoch in order.reshape(-1, 11)}
    assert not epochs & {tuple(epoch) for epoch in shifted.reshape(-1, 11)}


def test_every_epoch_is_another_permutation():
    order = np.concatenate([batch["index"] for batch in train(num_steps=22)]).reshape(-1, 11)
    for epoch in order:
        assert sorted(epoch) == list(range(11))
    assert len({tuple(epoch) for epoch in order}) == len(order)


def test_a_record_is_augmented_anew_each_time():
    batches = train(MemorySource(1), num_steps=1)
    images = {image.tobytes() for image in batches[0]["image"]}
    assert len(images) == 8


@pytest.mark.parametrize(("hosts", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 0)])
@pytest.mark.parametrize("length", [11, 9, 1])
def test_evaluation_sees_every_record_once(length, hosts, workers):
    shards = [
        evaluate(MemorySource(length), shard_index=i, shard_count=hosts, num_workers=workers) for i in range(hosts)
    ]
    assert {len(shard) for shard in shards} == {-(-length // 4)}
    batches = concatenated(shards)
    index = np.concatenate([batch["index"] for batch in batches])
    assert index.tolist() == [*range(length), *[-1] * (-length % 4)]
    assert_equal_batches(batches, evaluate(MemorySource(length)))


def test_evaluation_labels_are_original_and_padding_is_void():
    source = MemorySource()
    for batch in evaluate(source):
        assert batch["label"].shape[1:] == (64, 80)  # (50, 70) in tiles of 16
        assert batch["image"].shape[1:] == (40, 48, 3)
        for row, index in enumerate(batch["index"]):
            (height, width), valid = batch["size"][row], batch["valid"][row]
            void = np.ones((64, 80), bool)
            if index >= 0:
                np.testing.assert_array_equal(batch["label"][row, :height, :width], source[index]["label"])
                void[:height, :width] = False
            assert (batch["label"][row][void] == LABEL_FILL).all()
            assert (batch["label"][row][~void] != LABEL_FILL).all()
            assert (batch["image"][row, valid[0] :] == PIXEL_FILL).all()
            assert (batch["image"][row, :, valid[1] :] == PIXEL_FILL).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_record_is_named_after_the_batches_before_it(workers):
    batches = pipeline.eval_batches(
        MemorySource(broken=9), canvas=(40, 48), label_tile=16, batch_size=4, num_workers=workers
    )
    with contextlib.closing(batches):
        assert [next(batches)["index"][0] for _ in range(2)] == [0, 4]
        with pytest.raises(ValueError) as caught:
            next(batches)
        assert str(caught.value) == "Record 9 (image_009): KeyError: 'mask'"


def test_the_death_of_a_worker_is_reported():
    batches = pipeline.train_batches(MemorySource(deadly=3), crop_size=(33, 33), batch_size=4, seed=0, num_workers=2)
    with contextlib.closing(batches), pytest.raises(ChildProcessError, match="killed by SIGKILL"):
        for _ in range(10):
            next(batches)


def test_wrong_divisions_and_empty_splits_are_refused():
    with pytest.raises(ValueError, match=r"batch size 8 .* 3 hosts"):
        train(shard_count=3)
    with pytest.raises(ValueError, match="no records"):
        train(MemorySource(0))
    with pytest.raises(ValueError, match="no records"):
        evaluate(MemorySource(0))


def children(pid):
    """Returns the living child processes of a process (zombies are dead)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def gone(pids, within):
    """Waits until none of the processes lives."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_closing_ends_the_workers_at_once():
    before = set(children(os.getpid()))
    batches = pipeline.train_batches(MemorySource(), crop_size=(33, 33), batch_size=4, seed=0, num_workers=2)
    next(batches)
    workers = set(children(os.getpid())) - before
    assert len(workers) == 2
    start = time.monotonic()
    batches.close()
    assert gone(workers, within=1)
    assert time.monotonic() - start < 1
    with pytest.raises(StopIteration):
        next(batches)


def test_forgetting_the_iterator_ends_the_workers_too():
    before = set(children(os.getpid()))
    batches = pipeline.train_batches(MemorySource(), crop_size=(33, 33), batch_size=4, seed=0, num_workers=2)
    next(batches)
    workers = set(children(os.getpid())) - before
    del batches
    assert gone(workers, within=1)


def script(body):
    """Runs Python code with the project and this folder on its path, without a `__main__` guard."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{body}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_main_process_leaves_no_workers():
    main = script(
        "from psp_jax.data import pipeline\nfrom test_pipeline import MemorySource\nimport time\n"
        "it = pipeline.train_batches(MemorySource(), crop_size=(33, 33), batch_size=4, seed=0, num_workers=2)\n"
        "next(it); next(it); print('ready', flush=True); time.sleep(60)"
    )
    with main:
        assert main.stdout.readline() == "ready\n", main.stderr.read()
        workers = children(main.pid)
        assert len(workers) == 2
        main.kill()
        assert gone(workers, within=10)


def test_jax_is_absent_from_the_modules_and_the_workers():
    main = script(
        "from psp_jax.data import pipeline, transforms, workers\n"
        "assert 'jax' not in sys.modules and 'jaxlib' not in sys.modules\n"
        "from test_pipeline import JaxSource\n"
        "it = pipeline.eval_batches(JaxSource(), canvas=(8, 8), label_tile=8, batch_size=1, num_workers=2)\n"
        "assert [int(next(it)['label'][0, 0, 0]) for _ in range(2)] == [0, 0]\n"
        "it = pipeline.train_batches(\n"
        "    JaxSource(), crop_size=(1, 1), batch_size=4, seed=0, num_workers=2,\n"
        "    augment=transforms.AugmentSettings(1, 1, 0, 0, 0, 0))\n"
        "assert [next(it)['label'].max() for _ in range(2)] == [0, 0]\n"
    )
    _, errors = main.communicate(timeout=120)
    assert main.returncode == 0, errors
    assert errors == ""


def test_shared_memory_is_not_used():
    """A container's /dev/shm has 64 MB; one batch of the paper's run is 14 MB, and every worker holds some."""
    before = set(children(os.getpid()))
    batches = pipeline.train_batches(MemorySource(), crop_size=(473, 473), batch_size=4, seed=0, num_workers=2)
    with contextlib.closing(batches):
        kept = [next(batches) for _ in range(4)]
        processes = [os.getpid(), *set(children(os.getpid())) - before]
        assert len(processes) == 3
        assert not any("/dev/shm" in Path(f"/proc/{pid}/maps").read_text() for pid in processes)
    assert len(kept) == 4
