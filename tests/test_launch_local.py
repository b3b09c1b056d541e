"""launch/local.py starts, watches, ends and restarts the processes of a run; a small program stands in for training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

# Writes what it was told, then does what `--<rank>=...` says: a code, "wait" for a signal, "deaf" or "saving".
# A file started.RANK.START appears for each start, so that a test can act on the process whose number it holds.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path

flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
rank, folder = flags["process_id"], Path(flags["folder"])
start = len(list(folder.glob(f"started.{rank}.*")))
deeds = flags.get(rank, "0").split(",")
deed = deeds[min(start, len(deeds) - 1)]
if deed == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if deed in ("wait", "saving"):
    signal.signal(signal.SIGTERM, lambda *_: (print("got SIGTERM"), sys.exit(5)))
    signal.signal(signal.SIGINT, lambda *_: (print("got SIGINT"), sys.exit(6)))
    signal.signal(signal.SIGHUP, lambda *_: (print("got SIGHUP"), sys.exit(7)))
print("arguments", *sys.argv[1:])
print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES"), file=sys.stderr)
whole = folder / f"whole.{rank}"
whole.write_text(str(os.getpid()))
whole.rename(folder / f"started.{rank}.{start}")
while deed not in ("0", "wait", "deaf") and len(list(folder.glob(f"started.*.{start}"))) < int(flags["num_processes"]):
    time.sleep(0.02)  # a failure ends the others, which are to be there
if deed in ("wait", "deaf"):
    time.sleep(60)
if deed == "saving":
    time.sleep(1)
sys.exit(75 if deed == "saving" else int(deed))
"""


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    (tmp_path / "stand_in.py").write_text(PROGRAM)

    def start(*options: str, run: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "launch/local.py", "--program=stand_in", *options, "--", f"--folder={tmp_path}", *run],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(tmp_path)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup, around the tests, ignores it
        )

    return start


def pid(folder: Path, rank: int, start: int = 0) -> int:
    """Number of the process of a rank, as soon as it has set up its signals."""
    file = folder / f"started.{rank}.{start}"
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until, f"process {rank} did not start {start + 1} times"
        time.sleep(0.02)
    return int(file.read_text())


def ends(process: subprocess.Popen, timeout: float = 60) -> tuple[int, list[str]]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output.splitlines()


def is_gone(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


def test_arguments_ranks_and_prefixes(launch, tmp_path):
    code, lines = ends(launch("--processes=3", run=("--config=a b.py", "--x=$HOME")))
    assert code == 0
    told = {line[:3]: line for line in lines if "arguments" in line}
    assert sorted(told) == ["[0]", "[1]", "[2]"]
    ports = set()
    for rank in range(3):
        start, _, rest = told[f"[{rank}]"].partition(" --coordinator=127.0.0.1:")
        assert start == f"[{rank}] arguments --folder={tmp_path} --config=a b.py --x=$HOME"
        port, _, last = rest.partition(" ")
        assert last == f"--num_processes=3 --process_id={rank}"
        ports.add(int(port))
    assert len(ports) == 1
    assert "[1] gpus None" in lines or "CUDA_VISIBLE_DEVICES" in os.environ  # stderr bears the rank too


def test_first_failure_ends_the_others_and_gives_the_code(launch, tmp_path):
    code, lines = ends(launch("--processes=3", run=("--0=wait", "--1=3", "--2=wait")))
    assert code == 3
    assert "[launch] process 1 ended with code 3; the others have 30 s to end" in lines
    assert all(is_gone(pid(tmp_path, rank)) for rank in (0, 2))


def test_a_killed_process_restarts_the_whole(launch, tmp_path):
    process = launch("--restarts=1", run=("--0=wait,0", "--1=wait,0"))
    pid(tmp_path, 0)
    os.kill(pid(tmp_path, 1), signal.SIGKILL)
    code, lines = ends(process)
    assert code == 0
    assert [line for line in lines if line.startswith("[launch]")] == [
        "[launch] process 1 ended with code 137; the others have 30 s to end",
        "[launch] restart 1 of 1",
    ]
    assert pid(tmp_path, 0, start=1) != pid(tmp_path, 0) and is_gone(pid(tmp_path, 0))


def test_a_start_after_sigterm_counts_as_no_failure_and_nobody_is_ended_while_saving(launch):
    code, lines = ends(launch("--restarts=1", run=("--0=75,4,0", "--1=saving,wait,0")))
    assert code == 0
    assert [line for line in lines if line.startswith("[launch]") or "got" in line] == [
        "[launch] process 0 ended with code 75; the others have 30 s to end",
        "[launch] start again after SIGTERM",
        "[launch] process 0 ended with code 4; the others have 30 s to end",
        "[1] got SIGTERM",
        "[launch] restart 1 of 1",
    ]


def test_restarts_are_used_up(launch, tmp_path):
    code, _ = ends(launch("--restarts=2", run=("--1=4,4,7",)))
    assert code == 7
    assert len(list(tmp_path.glob("started.1.*"))) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 5), (signal.SIGINT, 6), (signal.SIGHUP, 7)])
def test_signals_are_forwarded_and_end_the_restarts(launch, tmp_path, number, code):
    process = launch("--restarts=3", run=("--0=wait", "--1=wait"))
    pid(tmp_path, 0), pid(tmp_path, 1)
    process.send_signal(number)
    ended, lines = ends(process)
    assert ended == code
    assert {f"[{rank}] got {number.name}" for rank in (0, 1)} <= set(lines)
    assert len(list(tmp_path.glob("started.*"))) == 2


def test_the_deaf_are_killed_after_the_grace(launch, tmp_path):
    process = launch("--grace=0.5", run=("--0=deaf", "--1=3"))
    code, _ = ends(process)
    assert code == 3
    assert is_gone(pid(tmp_path, 0))


def test_gpus_are_shared_out(launch):
    _, lines = ends(launch("--gpus_per_process=2", CUDA_VISIBLE_DEVICES="1,2,5,7"))
    assert {"[0] gpus 1,2", "[1] gpus 5,7"} <= set(lines)
    process = launch("--gpus_per_process=2", CUDA_VISIBLE_DEVICES="1,2,5")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error == "error: 2 processes of 2 GPUs need 4; CUDA_VISIBLE_DEVICES names 3.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "the arguments of psp_jax.main must follow --."),
        (["--processes=0", "--", "--config=a"], "--processes must be at least 1."),
        (["--config=a", "--", "--workdir=b"], "unrecognized arguments: --config=a"),
    ],
)
def test_wrong_usage_is_told(arguments, message):
    command = [sys.executable, "launch/local.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and message in result.stderr
