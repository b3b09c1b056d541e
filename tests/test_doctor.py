"""The doctor: a sound machine is told to be one, and every fault put in is found, named and survived."""

import itertools
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, run_module, write_stripes

from psp_jax import doctor
from psp_jax.data import workers as pool
from psp_jax.data.prepared import ensure_prepared
from psp_jax.health import devices, machine, workers
from psp_jax.health.findings import Finding, guarded

MONTH = 30 * 24 * 3600


def levels(output: str) -> set[str]:
    return {line.split()[0] for line in output.splitlines()[:-1]}


def test_a_sound_machine(tmp_path: Path) -> None:
    folder = write_stripes(tmp_path / "stripes", {"train": 2, "val": 1})
    ensure_prepared("image_folder", folder, prepared_dir=tmp_path / "prepared", say=lambda _: None)
    flags = [f"--config.data.dir={folder}", f"--config.data.prepared_dir={tmp_path / 'prepared'}"]
    done = run_module(
        "psp_jax.doctor", "--config=configs/folder.py", *flags, "--workdir", tmp_path / "w", "--seconds=280", devices=2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fail" not in levels(done.stdout) and not (tmp_path / "w").exists()
    for words in (
        f"jax {jax.__version__}, ",
        "2 records of train",
        "answers with the first record, 48x40 pixels",
        "devices: 2 x cpu",
        "device 0 (cpu): convolution forward and backward agree with NumPy",
        "device 1 (cpu): convolution forward and backward agree with NumPy",
        "one just kept is found again",
    ):
        assert words in done.stdout, words


def test_faults_are_lines_and_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    flags = ["--config=configs/folder.py", "--config.data.dir=/nowhere"]
    done = run_module("psp_jax.doctor", *flags, "--workdir", tmp_path / "w", "--seconds=280")
    assert done.returncode == 1
    assert "fail  data: there is no /nowhere; set config.data.dir" in done.stdout
    assert f"fail  compile cache: {tmp_path}/file/cache cannot be written" in done.stdout
    assert "ok    device 0" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.count("/nowhere") == 1 and done.stdout.splitlines()[-1].endswith(", 2 fail")
    wrong = run_module("psp_jax.doctor", "--config.train.steps=3")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1


def test_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(free: int, files: int = 10**6) -> list[str]:
        values = (4096, 4096, 10**9, free // 4096, free // 4096, 10**9, files, files, 0, 255)
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
        places = {"workdir": tmp_path, "shared memory": Path("/dev/shm")}
        return [finding.level for finding in machine.storage(places)]

    assert found(2**40) == ["ok", "ok"]
    assert found(2 * 2**30) == ["warn", "ok"]
    assert found(32 * 2**20) == ["fail", "warn"]
    assert found(2**40, files=3) == ["fail", "ok"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    (finding,) = machine.storage({"workdir": tmp_path})
    assert finding.level == "fail" and "cannot be written (No space left on device)" in finding.line()


def test_a_plugin_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict.fromkeys(machine.REQUIRED, "0.10.2") | {"jax-cuda12-plugin": "0.9.1", "flax": ""}
    monkeypatch.setattr(machine, "_version", lambda name: found.get(name, ""))
    missing, plugin = machine.packages()
    assert (missing.level, plugin.level) == ("fail", "fail")
    assert "not installed: flax" in missing.text
    assert "pip install jax-cuda12-plugin==0.10.2" in plugin.remedy


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2 * 2**30}\n")
    (finding,) = machine.memory()
    assert finding.level == "warn" and finding.text.startswith("1.0 of 3.0 GiB free")
    (tmp_path / "memory.stat").write_text(f"active_file {2**29}\ninactive_file {2**29}\ntotal_inactive_file 7\n")
    (finding,) = machine.memory()
    assert finding.text.startswith("1.5 of 3.0 GiB free")


def test_clocks_that_jump_and_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.level for finding in machine.clocks(tmp_path)] == ["ok", "ok"]
    real, late = time.time, itertools.count()
    # The first nine readings are those before the pause.
    monkeypatch.setattr(time, "time", lambda: real() + (MONTH if next(late) >= 9 else 0))
    jumped, files = machine.clocks(tmp_path)
    assert (jumped.level, files.level) == ("warn", "warn")
    assert f"moved +{MONTH}.0" in jumped.text and f" -{MONTH}.0 s from this machine's clock" in files.text


@pytest.mark.parametrize(
    ("program", "seconds", "words"),
    [
        ("import os; os._exit(7)  # {path} {descriptor}", 280, "ended with exit code 7"),
        ("import os; os.kill(os.getpid(), 9)  # {path} {descriptor}", 280, "was killed by SIGKILL"),
        ("import time; time.sleep(600)  # {path} {descriptor}", 0.5, "gave no answer in 0 s"),
    ],
)
def test_a_worker_that_dies_or_hangs(program: str, seconds: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_START", program)
    (finding,) = workers.worker(workers.Numbers(), "a number", seconds)
    assert finding.level == "fail" and words in finding.text


@pytest.mark.parametrize("wrong", [0.01, np.nan, np.inf])
def test_a_device_that_computes_wrong_numbers(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = jax.lax.conv_general_dilated
    monkeypatch.setattr(jax.lax, "conv_general_dilated", lambda *a, **k: right(*a, **k).at[3, 7, 9, 5].add(100 * wrong))
    (finding,) = devices._numbers(jax.devices()[0], "device 0")
    assert finding.level == "fail" and "do not train on it" in finding.remedy


def test_a_device_that_is_wrong_in_the_backward_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    right = jax.vjp

    def halved(function: Callable, *values: jax.Array) -> tuple:
        y, pull = right(function, *values)
        return y, lambda slope: (pull(slope)[0], 0.5 * pull(slope)[1])

    monkeypatch.setattr(jax, "vjp", halved)
    (finding,) = devices._numbers(jax.devices()[0], "device 0")
    assert finding.level == "fail" and "0.5 off" in finding.text


@pytest.mark.parametrize(
    ("program", "seconds", "words"),
    [
        ("import time; time.sleep(600)", 1, "no answer within 1 s, the last came after the start"),
        ("import os, sys; print('TPU in use by 77', file=sys.stderr, flush=True); os.abort()", 280, "TPU in use by 77"),
        ("print('{}')", 280, "ValueError: '{}"),
    ],
)
def test_devices_that_hang_or_end_the_process(
    program: str, seconds: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "EXAMINE_DEVICES", [sys.executable, "-c", program])
    (finding,) = guarded("devices", lambda: doctor.devices("off", seconds))
    assert finding.level == "fail" and words in finding.text and finding.remedy


def test_who_holds_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEVICE_FILES", (str(tmp_path / "accel"),))
    assert doctor._holders(0) == "no process of this user holds an accelerator"
    with (tmp_path / "accel0").open("w"):
        assert f"held by process {os.getpid()} (" in doctor._holders(0)


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.abort()",
        "from psp_jax.health import devices as d, findings as f\n"
        "def busy(): raise RuntimeError('Unable to initialize backend: the device is busy')\n"
        "for found in f.guarded('devices', busy): print(found.encoded(), flush=True)",
    ],
)
def test_who_holds_an_accelerator_is_told_of_a_backend_that_fails_at_once(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "DEVICE_FILES", (str(tmp_path / "accel"),))
    monkeypatch.setattr(doctor, "EXAMINE_DEVICES", [sys.executable, "-c", program])
    with (tmp_path / "accel0").open("w"):
        (finding,) = doctor.devices("off", 280)
    assert finding.level == "fail" and f"; held by process {os.getpid()} (" in finding.text
    assert finding.remedy.startswith("end what holds them")


def test_one_mistake_is_one_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "devices", lambda *_: iter(()))
    folder = write_stripes(tmp_path / "stripes", {"train": 2, "val": 1})

    def wrong(*flags: str) -> list[Finding]:
        found = doctor.examine(tmp_path, str(ROOT / "configs" / "folder.py"), flags, 280)
        return [finding for finding in found if finding.level != "ok" and "GiB" not in finding.text]

    (finding,) = wrong("--config.data.dri=x")
    assert (finding.level, finding.name) == ("fail", "configuration") and finding.remedy.startswith("known fields")
    (finding,) = wrong("--config.train.crop_size=('a',)")
    assert finding.text.startswith("train.crop_size=('a',) must") and finding.remedy.startswith("correct it")
    (finding,) = wrong("--config.data.name=coco", f"--config.data.dir={folder}")
    assert (finding.level, finding.name) == ("fail", "prepared data") and "coco" in finding.text
    (finding,) = wrong(f"--config.data.dir={folder}")
    assert (finding.level, finding.name) == ("warn", "prepared data") and finding.remedy.startswith("prepare it: ")
    (finding,) = wrong("--config.data.name=ade20k", "--config.data.dir=not_yet")
    assert (finding.level, finding.name) == ("warn", "prepared data") and finding.remedy.startswith("prepare it: ")


def test_what_is_not_ok_has_a_remedy() -> None:
    with pytest.raises(ValueError, match="says not what to do"):
        Finding("warn", "a", "b")
    for error in (OSError(5, "Input/output error", "/data"), ValueError("x"), RuntimeError("y; z")):

        def broken(error: Exception = error) -> Iterator[Finding]:
            raise error

        (finding,) = guarded("a", broken)
        assert str(error) in finding.text and finding.remedy


def test_gpu_memory_that_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    gpus, holders = 'printf "0, 81000, 81559\\n1, 2048, 81559\\n"', 'echo "4711, python, 79000"'
    program.write_text(f'#!/bin/sh\ncase "$1" in *gpu=*) {gpus};; *) {holders};; esac\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    free, taken = devices._gpu_holders()
    assert (free.level, taken.level) == ("ok", "warn")
    assert taken.text == "GPU 1 has 2.0 of 79.6 GiB free; held: process 4711 (python) 79000 MiB"


def test_a_finding_is_one_line() -> None:
    assert Finding("warn", "a", "b\n  c", "d").line() == "warn  a: b c; d"
    finding = Finding("ok", "a", "\u2028 <b>")
    assert Finding.decoded(finding.encoded()) == finding
