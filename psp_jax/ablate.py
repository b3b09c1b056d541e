"""Train the variants of a configuration file with several seeds, and write tables, a plot and a page about them.

    python -m psp_jax.ablate --config configs/ablation.py --workdir runs/ablation [--config.train.steps=200]

Every run has a workdir of its own, WORKDIR/VARIANT/seedN, made by `psp_jax.main`. Started again with the same command,
finished runs are kept and the others go on. After each run WORKDIR/ablation.{md,csv,json,png,html} are written anew.
"""

import argparse
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from psp_jax.ablation import EVALUATED, STARTS, Plan, cpu, is_finished, write_ablation
from psp_jax.command import run_command
from psp_jax.config import plain
from psp_jax.config_file import read_config
from psp_jax.progress import track
from psp_jax.train import check_run
from psp_jax.workdir import CHECKPOINTS, changed_fields, lock, read_json


@dataclass(frozen=True)
class Run:
    """A run of the plan: its workdir, the flags of `psp_jax.main` that make it, and the configuration they give."""

    variant: str
    seed: int
    directory: Path
    arguments: tuple[str, ...]
    config: ConfigDict

    @property
    def log(self) -> Path:
        """What the run printed; beside its workdir, which only a run may fill."""
        return self.directory.with_suffix(".log")

    def finished(self) -> bool:
        """Tell whether the run is trained and evaluated to its end.

        Raises:
          ValueError: its workdir holds a run of another configuration, with a checkpoint.
        """
        if any((self.directory / CHECKPOINTS).glob("*")):
            record = read_json(self.directory / "config.json")
            if changed := changed_fields(record["config"], plain(self.config), EVALUATED):
                raise ValueError(
                    f"{self.directory} holds a run with another configuration ({'; '.join(changed)}); delete it, or "
                    "choose a new --workdir."
                )
        return is_finished(self.directory)


class Processes:
    """The runs that are going on; after `end` none begins."""

    def __init__(self) -> None:
        self._lock, self._running, self._ended = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def run(self, command: Sequence[str], log: Path, cores: set[int]) -> int | None:
        """Run a command on some cores, its output added to `log`, and return its exit code; None where it is too late.

        The code of a process that was killed is the negative number of the signal.
        """
        with log.open("ab") as file, self._lock:
            if self._ended:
                return None
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            self._running.add(process)
        os.sched_setaffinity(process.pid, cores)  # before it imports anything that counts the cores
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def end(self) -> None:
        """Ask all that run to end."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


def read_plan(file: Path) -> Plan:
    """Return the tables, groups and published numbers that a configuration file names.

    Raises:
      FileNotFoundError, ValueError: no such file, or it does not hold what it should.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no configuration file {file}; the repository's is configs/ablation.py.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file; give one such as configs/ablation.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the code of a user leads to
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}.") from error
    tables, published = getattr(module, "TABLES", None), getattr(module, "PUBLISHED", {})
    if not hasattr(module, "get_config") or not tables or not _is_tables(tables) or not _is_tables(published):
        raise ValueError(
            f"{file} must have get_config and TABLES, and may have PUBLISHED, as {{title: {{variant: ...}}}}; "
            "configs/ablation.py shows them."
        )
    for title, rows in published.items():
        if unknown := [variant for variant in rows if variant not in tables.get(title, {})]:
            raise ValueError(f"{file}: PUBLISHED names {unknown[0]!r} of {title!r}, which TABLES has not.")
    groups, source = getattr(module, "GROUPS", {}), getattr(module, "PUBLISHED_FOR", "another source")
    return Plan(file.name, tables, groups, published, source)


def _is_tables(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(rows, Mapping) and rows for rows in value.values())


def list_runs(
    file: Path, variants: Sequence[str], seeds: Sequence[int], workdir: Path, overrides: Sequence[str]
) -> list[Run]:
    """Return the runs of each variant and seed, in this order.

    Raises:
      ValueError: an override or a variant is unknown, or a configuration makes no run.
    """
    found = []
    for variant in variants:
        for seed in seeds:
            fields = (*overrides, f"--config.seed={seed}")
            config = read_config(f"{file}:{variant}", fields)
            check_run(config)
            arguments = (f"--config={file}:{variant}", *fields)
            found.append(Run(variant, seed, workdir / variant / f"seed{seed}", arguments, config))
    return found


def ablate(
    file: Path,
    workdir: Path,
    *,
    variants: Sequence[str] = (),
    seeds: int = 3,
    jobs: int = 1,
    overrides: Sequence[str] = (),
) -> None:
    """Run what is not finished yet, and write the tables after each run.

    Args:
      file: see `configs/ablation.py`.
      workdir: of the whole; made if missing.
      variants: which to run; () is all that the tables name.
      seeds: how many of each, from 0.
      jobs: runs side by side, each on its share of the CPU cores.
      overrides: flags --config.FIELD=VALUE for every run.

    Raises:
      FileNotFoundError, ValueError: see `read_plan` and `list_runs`; or a run failed, which its log explains.
    """
    plan = read_plan(file)
    known = list(dict.fromkeys(variant for rows in plan.tables.values() for variant in rows))
    if unknown := [variant for variant in variants if variant not in known]:
        raise ValueError(f"{file} has no variant {unknown[0]!r} in its tables; choose from: {', '.join(known)}.")
    runs = list_runs(file, variants or known, range(seeds), workdir, overrides)
    with lock(workdir):
        pending = [run for run in runs if not run.finished()]
        print(
            f"{len(pending)} of {len(runs)} runs to go, {jobs} at a time; their logs: {workdir}/VARIANT/seedN.log",
            flush=True,
        )
        write_ablation(workdir, plan)  # which also tells of runs that cannot stand in one table
        failed = _run_all(pending, jobs, len(runs), lambda: write_ablation(workdir, plan))
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}; mend it and start again.")
    print(f"results: {workdir}/ablation.html, .md, .csv, .json, .png", flush=True)


def _run_all(pending: Sequence[Run], jobs: int, total: int, report: Callable[[], Any]) -> list[str]:
    """Run everything, call `report` after each run, and return a phrase for each that failed."""
    failed: list[str] = []
    processes = Processes()
    shares: queue.Queue[set[int]] = queue.Queue()
    cores = sorted(os.sched_getaffinity(0))
    for job in range(jobs):
        shares.put(set(cores[job::jobs]) or {cores[job % len(cores)]})

    def work(run: Run) -> tuple[Run, int | None]:
        share = shares.get()
        try:
            return run, _run(run, share, processes)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(jobs) as pool, track(total, "runs", first=total - len(pending)) as advance:
        try:
            for future in as_completed([pool.submit(work, run) for run in pending]):
                run, code = future.result()
                if code:
                    how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
                    failed.append(f"{run.log} ends with {_last_line(run.log)!r} ({how})")
                else:
                    report()
                    score = read_json(run.directory / "eval" / "metrics.json")["mean_iou"]
                    print(f"{run.variant}, seed {run.seed}: mean IoU {100 * score:.1f} %", flush=True)
                advance(1)
        finally:  # also when interrupted: nothing goes on unseen
            processes.end()
    return failed


def _run(run: Run, cores: set[int], processes: Processes) -> int | None:
    """Train and evaluate, note how long it took and on what, and return the exit code."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    command = [sys.executable, "-m", "psp_jax.main", *run.arguments, f"--workdir={run.directory}"]
    code = processes.run(command, run.log, cores)
    if code is not None:
        start = {"seconds": round(time.monotonic() - begin, 1), "exit_code": code, "cpu": cpu(), "cores": len(cores)}
        with run.directory.with_suffix(STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")
    return code


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def main() -> None:
    """Parse the flags and run; flags --config.FIELD=VALUE go to every run."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m psp_jax.ablate", description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="file with variants, as configs/ablation.py")
    parser.add_argument("--workdir", type=Path, required=True, help="directory of all runs and of the results")
    parser.add_argument("--variants", default="", help="comma-separated; by default all that the tables name")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side on the CPU; leave 1 on accelerators")
    args, rest = parser.parse_known_args()
    if wrong := [argument for argument in rest if not argument.startswith("--config.") or "=" not in argument]:
        raise ValueError(f"Unexpected argument {wrong[0]}; what is for every run looks like --config.train.steps=200.")
    if any(argument.startswith("--config.seed=") for argument in rest):
        raise ValueError("--config.seed is set by --seeds; leave it out.")
    if args.seeds < 1 or args.jobs < 1:
        raise ValueError(f"--seeds={args.seeds} and --jobs={args.jobs} must be at least 1.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs end too
    jax.config.update("jax_platforms", "cpu")  # this process must not take the accelerators from its runs
    variants = [name for name in args.variants.split(",") if name]
    ablate(args.config, args.workdir, variants=variants, seeds=args.seeds, jobs=args.jobs, overrides=rest)


if __name__ == "__main__":
    run_command(main)
