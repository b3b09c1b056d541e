"""Examines what needs no device: packages, memory, storage, clocks. Imports no jax."""

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from psp_jax.health.findings import FAIL, OK, WARN, Finding

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "Pillow")
PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
MIB, GIB = 2**20, 2**30
# Free bytes below which a place fails, and below which it is a warning. Runs write checkpoints to the workdir; records
# are written once; /dev/shm is NCCL's, the data workers use none of it; /tmp holds what is being unpacked.
LIMITS = {
    "workdir": (GIB, 20 * GIB),
    "data": (0, 0),
    "prepared data": (100 * MIB, 5 * GIB),
    "shared memory": (0, 64 * MIB),
    "temporary files": (16 * MIB, GIB),
}
CGROUP = Path("/sys/fs/cgroup")
LEAST_FILES = 1000  # that a file system must have room for
LEAST_MEMORY = 2 * GIB
SKEW_SECONDS = 2.0  # some file systems keep times to two seconds
DRIFT_SECONDS = 0.1  # by which wall and monotonic clock may part within PAUSE_SECONDS
PAUSE_SECONDS = 0.3


def packages() -> Iterator[Finding]:
    """Tell versions; a missing package and a plugin that is not of jaxlib's version are failures."""
    found = {name: _version(name) for name in (*REQUIRED, *PLUGINS)}
    shown = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = [name for name in REQUIRED if not found[name]]
    text = f"Python {platform.python_version()}, {shown}"
    if missing:
        yield Finding(FAIL, "packages", f"{text}; not installed: {', '.join(missing)}", "run `pip install .` again")
    else:
        yield Finding(OK, "packages", text)
    for plugin in PLUGINS[1:]:
        if found[plugin] and found[plugin] != found["jaxlib"]:
            text = f"{plugin} {found[plugin]} is not of the version of jaxlib {found['jaxlib']}"
            yield Finding(FAIL, "packages", text, f"run `pip install {plugin}=={found['jaxlib']}`")


def memory() -> Iterator[Finding]:
    """Tell the memory of the host that is free."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return  # not Linux
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    free, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit and used:  # of a container; files that the kernel may drop from memory count as used there
        free, total = min(free, limit - used + _droppable()), min(total, limit)
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, {os.cpu_count()} CPUs"
    short = free < LEAST_MEMORY
    yield Finding(WARN if short else OK, "host memory", text, "end other programs" if short else "")


def storage(places: Mapping[str, Path]) -> Iterator[Finding]:
    """Tell the room at each of the places, named as in LIMITS; those that a run writes to are written to."""
    for name, path in places.items():
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if name == "data" and existing != path.absolute():
            yield Finding(FAIL, name, f"there is no {path}", "set config.data.dir to the folder of your data set")
            continue
        label, stat = f"{name} {path}", os.statvfs(existing)
        free, files = stat.f_bavail * stat.f_frsize, stat.f_favail
        text, remedy = f"{free / GIB:.1f} GiB free", "make room, or choose another folder"
        least, enough = LIMITS[name]
        if free < least or (stat.f_files and files < LEAST_FILES and least):
            yield Finding(FAIL, label, f"{text}, room for {files:,} more files", remedy)
        elif least and (problem := _write_problem(existing)):
            yield Finding(FAIL, label, f"cannot be written ({problem})", "change its owner, or choose another folder")
        elif free < enough:
            yield Finding(WARN, label, text, "give the container more (--shm-size)" if least == 0 else remedy)
        else:
            yield Finding(OK, label, text)


def clocks(directory: Path) -> Iterator[Finding]:
    """Compare the wall clock with the monotonic one, and with the times that the file system gives to new files."""
    before = _offset()
    time.sleep(PAUSE_SECONDS)
    drift = _offset() - before
    remedy = "let NTP or chrony slew the clock instead of setting it"
    if abs(drift) > DRIFT_SECONDS:
        text = f"the wall clock moved {drift:+.2f} s against the monotonic one in {PAUSE_SECONDS} s"
        yield Finding(WARN, "clock", text, remedy)
    else:
        yield Finding(OK, "clock", f"wall and monotonic clock agree ({1000 * drift:+.1f} ms in {PAUSE_SECONDS} s)")
    existing = next(folder for folder in (directory.absolute(), *directory.absolute().parents) if folder.exists())
    start = time.time()
    with tempfile.TemporaryFile(dir=existing) as file:
        given = os.fstat(file.fileno()).st_mtime
        end = time.time()
    skew = min(given - start, 0) + max(given - end, 0)  # s outside of the time that making the file took
    text = f"files in {existing} get times {skew:+.1f} s from this machine's clock"
    if abs(skew) > SKEW_SECONDS:
        yield Finding(WARN, "file times", text, "set both machines' clocks by the same NTP server")
    else:
        yield Finding(OK, "file times", text)


def _number(file: Path) -> int:
    """Return the number in a file; 0 where there is none, as where a limit is "max"."""
    try:
        return int(file.read_text("utf-8"))
    except (OSError, ValueError):
        return 0


def _droppable() -> int:
    """Return the bytes of a container's memory that hold files not used lately."""
    try:
        lines = (CGROUP / "memory.stat").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write_problem(folder: Path) -> str:
    """Return why a file of a mebibyte cannot be written to `folder`, or ""."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(MIB))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _offset() -> float:
    """Return wall clock minus monotonic clock, from the pair of readings that lie closest together."""
    readings = [(time.monotonic(), time.time(), time.monotonic()) for _ in range(9)]
    before, wall, after = min(readings, key=lambda reading: reading[2] - reading[0])
    return wall - (before + after) / 2
