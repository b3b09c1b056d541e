"""Hosts that differ are refused on all processes alike, and one that fails ends the others; real processes."""

import dataclasses
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Run, environment, free_address, write_stripes

from psp_jax.agreement import Host, check_hosts, differences, of_configuration, of_data, refusal, table
from psp_jax.config import defaults
from psp_jax.data.prepared import ensure_prepared
from psp_jax.data.source import open_source
from psp_jax.processes import AllRefuse

TPU = Host("host-0", 17, 4, "TPU v5 lite", 16_909_336_576)


def hosts(count: int) -> list[Host]:
    return [dataclasses.replace(TPU, name=f"host-{rank}") for rank in range(count)]


def two(run: Run, workdir: Path, flags: tuple[tuple, tuple], devices: tuple[int, int] = (1, 1)) -> list[tuple]:
    """Exit code and stderr of each of two processes of `run`, which have flags of their own."""
    command = [sys.executable, "-m", "psp_jax.main", *run.flags, "--workdir", str(workdir), "--num_processes=2"]
    command.append(f"--coordinator={free_address()}")
    started = [
        subprocess.Popen(
            [*command, f"--process_id={rank}", *map(str, flags[rank])],
            cwd=ROOT,
            env=environment(devices[rank]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def assert_both_refuse(ended: list[tuple], *parts: str) -> None:
    assert ended[0] == ended[1]
    code, error = ended[0]
    assert (code, error.count("\n")) == (1, 1), error
    for part in parts:
        assert part in error


def test_another_configuration_names_the_fields(finished_run: Run, tmp_path: Path):
    """Where the data are, and what decodes them, may differ."""
    other = ("--config.train.batch_size=8", "--config.model.bins=(1,2)", "--config.data.num_workers=0")
    ended = two(finished_run, tmp_path / "w", ((), other))
    assert_both_refuse(ended, "train.batch_size: 4 on process 0 (", "), 8 on process 1 (")
    assert_both_refuse(ended, "model.bins: [1, 2, 3, 6] on process 0 (", "), [1, 2] on process 1 (")
    assert "num_workers" not in ended[0][1]
    assert not (tmp_path / "w").exists()


def test_other_data_are_refused(finished_run: Run, tmp_path: Path):
    folder = write_stripes(tmp_path / "stripes", {"train": 120, "val": 10})
    ensure_prepared("image_folder", folder, prepared_dir=tmp_path / "prepared")
    other = (f"--config.data.dir={folder}", f"--config.data.prepared_dir={tmp_path / 'prepared'}")
    ended = two(finished_run, tmp_path / "w", ((), other))
    assert_both_refuse(ended, "records of train: 21 on process 0 (", "), 120 on process 1 (", "record files of train: ")


def test_other_devices_are_refused(finished_run: Run, tmp_path: Path):
    ended = two(finished_run, tmp_path / "w", ((), ()), devices=(1, 2))
    assert_both_refuse(ended, "different devices: 1 x cpu on process 0 (", "), 2 x cpu on process 1 (")


def test_a_host_without_the_data_ends_the_others_at_once(finished_run: Run, tmp_path: Path):
    begun = time.monotonic()
    missing = tmp_path / "nowhere"
    first, second = two(finished_run, tmp_path / "w", ((), (f"--config.data.dir={missing}",)))
    assert (second[0], first[0]) == (1, 1)
    assert second[1].startswith("error: There is no folder")
    assert first[1].startswith("error: Process 1 (")
    assert first[1].endswith(f") has failed: FileNotFoundError: {second[1].removeprefix('error: ')}")
    assert time.monotonic() - begun < 60  # JAX by itself takes 100 s to miss a process


SHARED = """
import sys
from pathlib import Path
from psp_jax import processes
from psp_jax.agreement import check_shared
from psp_jax.command import run_command

def check():
    address, rank, folder = sys.argv[1:]
    processes.initialize(address, 2, int(rank))
    check_shared(Path(folder), seconds=0.5)

run_command(check, leave=processes.leave)
"""


def test_a_workdir_that_is_another_folder_on_one_host_is_refused(tmp_path: Path):
    """By both, in a sentence that names the host; nothing stays behind."""
    address, folders = free_address(), ("own", "other")
    for own in folders:
        (tmp_path / own).mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, address, str(rank), str(tmp_path / own)],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(folders)
    ]
    for process, own in zip(started, folders, strict=True):
        error = process.communicate(timeout=300)[1]
        assert (process.returncode, error.count("\n")) == (1, 1), error
        assert error.startswith(f"error: 1 of 2 processes do not see in {tmp_path / own} what process 0 writes there: ")
        assert f"process 1 ({socket.gethostname()}); --workdir must be on storage that all hosts share." in error
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_differences_are_those_of_values():
    reference = {"a": 1, "b": [1, 2], "c": "x"}
    assert differences(reference, {"a": 1, "b": [1, 2], "c": "x"}) == []
    found = differences(reference, {"a": 2, "b": [1, 2], "d": None})
    assert found == [("a", 1, 2), ("c", "x", "none"), ("d", "none", None)]


def test_hosts_that_differ_alike_are_named_together():
    names = [f"h{rank}" for rank in range(10)]
    found = {rank: [("jax", "0.10.2", "0.10.0")] for rank in (1, 2, 3, 4, 5, 6, 9)}
    found[2] = [("jax", "0.10.2", "0.9")]
    assert refusal(names, found) == (
        "The processes of this run differ: jax: 0.10.2 on process 0 (h0), 0.10.0 on processes 1, 3-6, 9 (h1, h3, h4, "
        "h5, h6 and 1 more), 0.9 on process 2 (h2). Start all of them with the same command, packages and data."
    )


def test_many_fields_are_counted():
    told = refusal(["a", "b"], {1: [(f"f{i}", i, i + 1) for i in range(7)]})
    assert "f4: 4 on process 0 (a), 5 on process 1 (b); and 2 more." in told
    assert "f5" not in told


def test_paths_may_differ_and_the_mesh_may_not():
    ours, theirs = defaults(), defaults()
    theirs.data.dir = theirs.data.prepared_dir = theirs.data.archive = theirs.init.path = "/elsewhere"
    theirs.data.num_workers = 7
    assert of_configuration(ours, {}) == of_configuration(theirs, {})
    theirs.mesh.spatial, theirs.eval.stride = 2, (60,)
    assert differences(of_configuration(ours, {"jax": "1"}), of_configuration(theirs, {"jax": "2"})) == [
        ("eval.stride", [], [60]),
        ("jax", "1", "2"),
        ("mesh.spatial", 1, 2),
    ]


def test_copies_of_the_records_are_the_same_data(finished_run: Run, tmp_path: Path):
    values = dict(flag.removeprefix("--config.").split("=", 1) for flag in finished_run.flags)
    folder, prepared = values["data.dir"], Path(values["data.prepared_dir"])
    ours = of_data([open_source("image_folder", folder, "train", prepared_dir=prepared)])
    assert ours["records of train"] == 21
    shutil.copytree(prepared, tmp_path / "copy")
    theirs = open_source("image_folder", folder, "train", prepared_dir=tmp_path / "copy")
    assert of_data([theirs]) == ours
    next(theirs.directory.glob("*val*")).open("ab").write(b"more")
    assert differences(ours, of_data([theirs]))[0][0] == "record files of train"


def test_the_table_groups_hosts_alike():
    assert table([*hosts(2), Host("odd", 3, 1, "cpu", None)]) == (
        "3 processes, 9 devices\n4 x TPU v5 lite (15.7 GiB each), on each of:\n  0 host-0:17  1 host-1:17\n"
        "1 x cpu, on:\n  2 odd:3"
    )
    big = table(hosts(64)).splitlines()
    assert len(big) < 14
    assert max(map(len, big)) <= 120


def test_the_number_of_devices_is_checked():
    check_hosts(hosts(8), 0)
    check_hosts(hosts(8), 32)
    with pytest.raises(AllRefuse) as refused:
        check_hosts(hosts(8), 64)
    assert str(refused.value) == (
        "mesh.devices=64 but this run has 32: 4 x TPU v5 lite on processes 0-7 (host-0, host-1, host-2, host-3, host-4 "
        "and 3 more); start it where there are 64, or set mesh.devices=0 to take what is there."
    )
    with pytest.raises(AllRefuse, match=r"different devices: 4 x TPU v5 lite on process 0 \(host-0\), 3 x TPU"):
        check_hosts([TPU, Host("host-1", 17, 3, "TPU v5 lite", None)], 0)
