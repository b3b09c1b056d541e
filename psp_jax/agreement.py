"""What the processes of a run must have in common, compared at the start: devices, configuration, packages, data.

Every process compares itself with process 0 and tells all where it differs; all read the same, so that all refuse.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import socket
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from psp_jax import processes
from psp_jax.config import flatten, plain
from psp_jax.data.source import Source
from psp_jax.workdir import LOCK

# Paths, and what a host decodes with: hosts may lawfully differ there, as long as the data and the weights do not.
_FREE = ("data.dir", "data.prepared_dir", "data.archive", "data.classes", "data.num_workers", "init.path")
_NAMED = 5  # differing fields, and hosts, that a refusal names before it counts the rest
_Differences = list[tuple[str, Any, Any]]  # field, what process 0 has, what this one has


@dataclasses.dataclass(frozen=True)
class Host:
    """A process and its devices, as the others see them.

    Attributes:
      name: of its machine.
      pid: its number there.
      devices: how many it drives.
      kind: what they are, such as "TPU v5 lite".
      memory: bytes that JAX may use of each; None where it does not tell.
    """

    name: str
    pid: int
    devices: int
    kind: str
    memory: int | None

    def words(self) -> str:
        """Return what it drives, such as "4 x TPU v5 lite (15.7 GiB each)"."""
        memory = f" ({self.memory / 2**30:.1f} GiB{' each' if self.devices > 1 else ''})" if self.memory else ""
        return f"{self.devices} x {self.kind}{memory}"


def this_host() -> Host:
    """Return this process; JAX takes hold of the devices here, for which all processes must come."""
    devices = jax.local_devices()
    kinds = sorted({device.device_kind for device in devices})
    try:
        stats = devices[0].memory_stats()
    except jax.errors.JaxRuntimeError:
        stats = None  # some backends do not tell
    limit = (stats or {}).get("bytes_limit")
    return Host(socket.gethostname(), os.getpid(), len(devices), " and ".join(kinds), limit)


def gather_hosts(seconds: float) -> list[Host]:
    """Return all processes of the run, by rank; they must come within `seconds`."""
    own = this_host()
    if processes.count() == 1:
        return [own]
    processes.tell(f"hosts/{processes.rank()}", dataclasses.asdict(own))
    processes.wait_for_all("hosts", seconds / 3600)
    told = processes.told("hosts")
    return [Host(**told[str(rank)]) for rank in range(processes.count())]


def table(hosts: Sequence[Host]) -> str:
    """Return the processes in groups of the same devices: a heading, then rank, host and process id of each."""
    lines = [f"{len(hosts)} processes, {sum(host.devices for host in hosts)} devices"]
    for words, ranks in _groups(range(len(hosts)), lambda rank: hosts[rank].words()).items():
        lines.append(f"{words}, on each of:" if len(ranks) > 1 else f"{words}, on:")
        entries = "  ".join(f"{rank}\N{NO-BREAK SPACE}{hosts[rank].name}:{hosts[rank].pid}" for rank in ranks)
        wrapped = textwrap.wrap(entries, 118, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {line}".replace("\N{NO-BREAK SPACE}", " ") for line in wrapped]
    return "\n".join(lines)


def check_hosts(hosts: Sequence[Host], wanted: int) -> None:
    """Raise ValueError where hosts differ in their devices, or there are not the `wanted` ones (0 takes any number)."""
    names = [host.name for host in hosts]
    groups = _groups(range(len(hosts)), lambda rank: f"{hosts[rank].devices} x {hosts[rank].kind}")
    listed = ", ".join(f"{words} on {_ranks(ranks, names)}" for words, ranks in groups.items())
    if len(groups) > 1:
        raise processes.AllRefuse(f"The processes of this run have different devices: {listed}; give all the same.")
    found = sum(host.devices for host in hosts)
    if wanted and found != wanted:
        raise processes.AllRefuse(
            f"mesh.devices={wanted} but this run has {found}: {listed}; start it where there are {wanted}, or set "
            "mesh.devices=0 to take what is there."
        )


def of_configuration(config: ConfigDict, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that must be the same on every process, and `more`, as values that JSON keeps."""
    fields = {field: value for field, value in flatten(plain(config)) if field not in _FREE}
    return fields | dict(more)


def of_data(sources: Iterable[Source]) -> dict[str, Any]:
    """Return what tells whether two hosts read the same records: counts, class tables, names and sizes of files."""
    found: dict[str, Any] = {}
    for source in sources:
        files = {file.name: file.stat().st_size for file in sorted(source.directory.glob("*array_record*"))}
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
        found[f"records of {source.split}"] = len(source)
        found[f"class table of {source.split}"] = source.classes.digest()
        found[f"record files of {source.split}"] = f"{len(files)} of {sum(files.values()):,} bytes (digest {digest})"
    return found


def differences(reference: Mapping[str, Any], own: Mapping[str, Any]) -> _Differences:
    """Return every field in which `own` is not as `reference`; a field that one of them lacks is "none" there."""
    fields = sorted(reference.keys() | own.keys())
    pairs = [(field, reference.get(field, "none"), own.get(field, "none")) for field in fields]
    return [pair for pair in pairs if pair[1] != pair[2]]


def refusal(names: Sequence[str], found: Mapping[int, _Differences]) -> str:
    """Return the sentence that refuses a run whose processes `found` differ from process 0; `names` are the hosts."""
    fields: dict[str, list[str]] = {}
    for (field, reference, own), ranks in _by_difference(found).items():
        if field not in fields:
            fields[field] = [f"{field}: {reference} on {_ranks([0], names)}"]
        fields[field].append(f"{own} on {_ranks(ranks, names)}")
    parts = [", ".join(parts) for parts in fields.values()]
    more = f"; and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    return (
        f"The processes of this run differ: {'; '.join(parts[:_NAMED])}{more}. Start all of them with the same "
        "command, packages and data."
    )


def check_same(name: str, own: Mapping[str, Any], names: Sequence[str], seconds: float) -> None:
    """Raise on all processes where `own` is not the same on all; every one must come, within `seconds`.

    Args:
      name: of the comparison, once in a run.
      own: plain values, by field.
      names: the processes' hosts.
      seconds: how long the last may take to come.

    Raises:
      ValueError: naming fields, values, processes and hosts.
    """
    if processes.count() == 1:
        return
    if processes.rank() == 0:
        processes.tell(f"{name}/reference", own)
    differing = differences(processes.hear(f"{name}/reference", seconds), json.loads(json.dumps(own)))
    if differing:
        processes.tell(f"{name}/differing/{processes.rank()}", differing)
    processes.wait_for_all(name, seconds / 3600)
    found = {int(rank): [(f, a, b) for f, a, b in pairs] for rank, pairs in processes.told(f"{name}/differing").items()}
    if found:
        raise processes.AllRefuse(refusal(names, found))


def check_shared(directory: Path, seconds: float = 120) -> None:
    """Raise ValueError on all processes where one does not see in `directory` what process 0 writes there.

    All must come, process 0 with the lock of `directory`. For about a minute a host may see network storage as it was:
    hence `seconds`.
    """
    if processes.count() == 1:
        return
    token = directory / f"{LOCK}_{time.time_ns()}"
    if processes.rank() == 0:
        for former in directory.glob(f"{LOCK}_*"):
            former.unlink()  # of a start that was killed here
        token.touch()
        processes.tell("workdir/token", token.name)
    token = directory / processes.hear("workdir/token", 24 * 3600)
    until = time.monotonic() + seconds
    while not (seen := token.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    if not seen:
        processes.tell(f"workdir/unseen/{processes.rank()}", socket.gethostname())
    processes.wait_for_all("workdir")
    if processes.rank() == 0:
        token.unlink()
    if unseen := processes.told("workdir/unseen"):
        names = ", ".join(f"{rank} ({unseen[rank]})" for rank in sorted(unseen, key=int)[:_NAMED])
        raise processes.AllRefuse(
            f"{len(unseen)} of {processes.count()} processes do not see in {directory} what process 0 writes there: "
            f"process {names}; --workdir must be on storage that all hosts share."
        )


def _by_difference(found: Mapping[int, _Differences]) -> dict[tuple[str, Any, Any], list[int]]:
    """Group processes by what differs; JSON stands for values that are lists."""
    groups: dict[tuple[str, Any, Any], list[int]] = collections.defaultdict(list)
    for rank in sorted(found):
        for field, reference, own in found[rank]:
            groups[field, _shown(reference), _shown(own)].append(rank)
    return groups


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _groups(ranks: Iterable[int], key: Callable[[int], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for rank in ranks:
        groups[key(rank)].append(rank)
    return groups


def _ranks(ranks: Sequence[int], names: Sequence[str]) -> str:
    """Return such as "process 3 (host-3)" or "processes 0-2, 5 (a, b, c, f)"."""
    runs = []
    for _, members in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in members]
        runs.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    hosts = list(dict.fromkeys(names[rank] for rank in ranks))
    shown = ", ".join(hosts[:_NAMED]) + (f" and {len(hosts) - _NAMED} more" if len(hosts) > _NAMED else "")
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(runs)} ({shown})"
