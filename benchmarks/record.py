"""What every record of a benchmark tells besides its results."""

import importlib.metadata
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from psp_jax.workdir import environment, versions, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("libtpu", "opencv-python-headless", "torch")  # what some of the programs use besides


def header() -> dict[str, Any]:
    """Return command, date, machine (with its load just now), the variables that matter, and versions."""
    found = versions()
    for package in PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    settings = environment() | {name: os.environ[name] for name in ("GLIBC_TUNABLES",) if name in os.environ}
    settings = {name: without_places(value) for name, value in settings.items()}
    return {
        "command": shlex.join(["python", *map(without_places, sys.argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": _processor(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]},
        "environment": settings,
        "versions": found,
    }


def without_places(text: str) -> str:
    """Return a flag or a value with the paths of this machine relative to the repository, or else as names alone."""

    def shorter(found: re.Match[str]) -> str:
        path = Path(found[0])
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return re.sub(r"(?<![\w./:)-])~?/[^\s,:;'\"]+", shorter, text)


def publish(record: dict[str, Any], table: str, output: Path | None) -> None:
    """Print the table of a record and, where `output` names a JSON file, write both, the table as .md beside it."""
    print(table)
    if output:
        write_json(output, record)
        write_text(output.with_suffix(".md"), table)


def _processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
