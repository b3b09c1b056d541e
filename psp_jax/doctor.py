"""Examine an installation, a machine and its devices, before hours are spent on them.

    python -m psp_jax.doctor [--workdir runs/ade20k] [--config configs/ade20k.py]

Each finding is one line: ok, warn or fail, what was seen and what to do. Exit code 1 where anything fails. Devices are
examined by a process of its own with a limit of time, since one that is held by another process may hang.
"""

import argparse
import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from psp_jax.command import run_command
from psp_jax.health import machine
from psp_jax.health.findings import CONFIGURATION, FAIL, OK, WARN, Finding, guarded, of_error

EXAMINE_DEVICES = [sys.executable, "-m", "psp_jax.health.devices"]
# What the driver of an accelerator is opened by; a process that has it open holds the device.
DEVICE_FILES = ("/dev/accel", "/dev/vfio/", "/dev/nvidia")
REMEDY = "end what holds them, or mend the driver and JAX's installation; JAX_PLATFORMS=cpu does without them"


def devices(directory: str, seconds: float) -> Iterator[Finding]:
    """Yield what the process that examines devices and compile cache finds; it is killed after `seconds`."""
    variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # or it takes most of a GPU that is in use
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    until, last = time.monotonic() + seconds, "the start"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as words:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": words}
        process = subprocess.Popen([*EXAMINE_DEVICES, directory], text=True, env=variables, **pipes)  # type: ignore[call-overload]
        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        try:
            while (line := lines.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                found = Finding.decoded(line)
                last = f"{found.name!r}"
                failed = found.level == FAIL and found.name == "devices"
                yield replace(found, text=f"{found.text}; {_holders(process.pid)}", remedy=REMEDY) if failed else found
            code = process.wait(max(1.0, until - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            text = f"no answer within {seconds:.0f} s, the last came after {last}; {_holders(process.pid)}"
            remedy = "end what holds them, or give --seconds more; a pod slice answers only when all its hosts ask"
            yield Finding(FAIL, "devices", text, remedy)
            return
        finally:
            process.kill()  # and not waited for: one that hangs in a driver does not end
        if code:
            words.seek(0)
            said = [line.strip() for line in words if line.strip()] or ["it said nothing"]
            text = f"the process that examines them ended with code {code}: {said[-1]}; {_holders(process.pid)}"
            yield Finding(FAIL, "devices", text, REMEDY)


def _holders(own: int) -> str:
    """Name the processes, of those that this user may look into, that have an accelerator open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            opened = [_opened(file) for file in (folder / "fd").iterdir()] if folder.name != str(own) else []
            if any(file.startswith(DEVICE_FILES) for file in opened):
                found.append(f"{folder.name} ({(folder / 'comm').read_text().strip()})")
    return f"held by process {', '.join(found)}" if found else "no process of this user holds an accelerator"


def _opened(descriptor: Path) -> str:
    """Return the file behind a descriptor, "" where it was closed meanwhile."""
    try:
        return os.readlink(descriptor)
    except FileNotFoundError:
        return ""


def _data_worker(data: Any, seconds: float) -> Iterator[Finding]:
    """Let a worker process answer; with the section `data` of a configuration by a record of its training split."""
    from psp_jax.data.source import open_source  # imports much, which may be what is broken
    from psp_jax.health import workers

    source = None
    told = data is None or (data.name == "image_folder" and data.dir and not Path(data.dir).expanduser().exists())
    if not told:
        try:
            where = {"prepared_dir": data.prepared_dir, "classes": data.classes or None}
            source = open_source(data.name, data.dir, data.train_split, **where)
        except (FileNotFoundError, ValueError) as error:
            yield of_error(FAIL if isinstance(error, ValueError) else WARN, "prepared data", error)
    if source is None:
        yield from workers.worker(workers.Numbers(), "a number", seconds)
        return
    yield Finding(OK, "prepared data", f"{len(source):,} records of {data.train_split} in {source.directory}")
    yield from workers.worker(workers.Records(source), "the first record", seconds)


def examine(workdir: Path, config_file: str, overrides: Sequence[str], seconds: float) -> Iterator[Finding]:
    """Yield all findings, in the order in which they are made."""
    places, data = {"workdir": workdir}, None

    def configuration() -> Iterator[Finding]:
        from psp_jax.config_file import read_config

        nonlocal data
        data = read_config(config_file, overrides).data
        own = data.name == "image_folder"  # of others data.dir is where the prepared records are
        places["prepared data"] = Path(data.prepared_dir if own else data.dir).expanduser()
        if own and data.dir:
            places["data"] = Path(data.dir).expanduser()
        yield Finding(OK, "configuration", f"{config_file} can be read")

    def compiled() -> Iterator[Finding]:
        from psp_jax.compile_cache import default_directory

        yield from devices(default_directory(workdir, 1), seconds)

    yield from guarded("packages", machine.packages)
    if config_file:
        yield from guarded(CONFIGURATION, configuration)
    places |= {"shared memory": Path("/dev/shm"), "temporary files": Path(tempfile.gettempdir())}
    yield from guarded("host memory", machine.memory)
    yield from guarded("storage", lambda: machine.storage(places))
    yield from guarded("clock", lambda: machine.clocks(workdir))
    yield from guarded("data worker", lambda: _data_worker(data, seconds))
    yield from guarded("devices", compiled)


def main() -> None:
    """Parse the flags, examine, and leave with 1 where anything fails."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path(), help="where a run would write (here)")
    parser.add_argument("--config", default="", help="configuration file, as for psp_jax.main, whose data are read")
    parser.add_argument("--seconds", type=float, default=180, help="that the devices, and a worker, may take (180)")
    args, rest = parser.parse_known_args()
    if rest and not args.config:
        raise ValueError(f"Unexpected argument {rest[0]}; fields of a configuration need --config.")
    levels = []
    for finding in examine(args.workdir, args.config, rest, args.seconds):
        print(finding.line(), flush=True)
        levels.append(finding.level)
    print(", ".join(f"{levels.count(level)} {level}" for level in (OK, WARN, FAIL)), flush=True)
    if FAIL in levels:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
