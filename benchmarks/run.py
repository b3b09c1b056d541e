"""Runs every benchmark that this machine can, and rewrites the table of results.

    python benchmarks/run.py                       # all; those left out are named with the reason
    python benchmarks/run.py --only input train_step --camvid data/camvid
    python benchmarks/run.py --table               # only the table, from the records in results/

Each is a program of its own in this folder, run with the sizes that fit the device; records are named by the device,
so that those of several machines lie side by side in results/. The table is results/speed.md.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psp_jax.workdir import read_json, write_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
Rows = list[tuple[str, str, str, str]]  # what was measured, ours, the other side, how ours compares


@dataclass
class Machine:
    """What there is: `device` as JAX names it, "cpu" without an accelerator; packages; and data that flags name."""

    device: str
    packages: set[str]
    archive: Path | None = None
    camvid: Path | None = None

    @property
    def slug(self) -> str:
        """The device's name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "_", self.device.lower()).strip("_")


@dataclass(frozen=True)
class Job:
    """One program and its flags, or why it is left out here."""

    name: str
    command: list[str]
    left_out: str = ""


def detect(args: argparse.Namespace) -> Machine:
    """Return what this machine has; JAX is asked in a process of its own, since it keeps the device."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    packages = {name for name in ("cv2", "libtpu", "torch") if importlib.util.find_spec(name)}
    return Machine(told.splitlines()[-1], packages, args.archive, args.camvid)


def jobs(machine: Machine, workdir: Path) -> list[Job]:
    """Return every benchmark, with the sizes for the machine, in the order of their cost."""
    cpu = machine.device == "cpu"
    small = ["--depth", "18", "--width", "24", "--head_channels", "128", "--classes", "11", "--window", "217", "289"]
    small += ["--image", "360", "480", "--base_size", "480"]
    step = ["--batch", "2", "--crop", "233", "--dtypes", "float32", "--matmul", "1024", "--repeats", "3"]
    taps = ["--batch", "2", "--crop", "233", "--dtype", "float32", "--repeats", "2"]
    quickstart = workdir / "quickstart"
    train = ["-m", "psp_jax.main", "--config=configs/quickstart.py", f"--workdir={quickstart}"]
    train.append(f"--config.data.dir={workdir / 'data'}")
    precision = ["precision.py", f"--workdir={workdir / 'precision'}", f"--config.data.dir={machine.camvid}"]
    precision += [f"--config.data.prepared_dir={workdir / 'data'}", "--config.eval.every_steps=450"]
    old = "{} is there already; delete it to train anew"
    no_precision = old.format(workdir / "precision") if (workdir / "precision").exists() else ""
    no_precision = no_precision if machine.camvid else "no CamVid: name its folder with --camvid"
    no_tpu = "" if "libtpu" in machine.packages else "libtpu is not installed: pip install 'psp-jax[plan]'"
    archive = ["--archive", str(machine.archive)] if machine.archive else []
    return [
        Job("input", ["input_pipeline.py", *archive]),
        Job("convolutions", ["convolutions.py", *(taps if cpu else [])]),
        Job("train_step", ["train_step.py", *(step if cpu else [])]),
        Job("evaluate_camvid_small", ["evaluate.py", *small]),
        Job("evaluate_camvid_small_multi", ["evaluate.py", *small, "--scales", "multi"]),
        Job("evaluate", ["evaluate.py", "--room", "1024", "1024", *(["--repeats", "2"] if cpu else [])]),
        Job("quickstart", train, old.format(quickstart) if quickstart.exists() else ""),
        Job("data_wait", ["data_wait.py", str(quickstart)]),
        Job("tpu_estimate", ["tpu_estimate.py"], no_tpu),
        Job("precision", precision, no_precision),
    ]


def run_job(job: Job, machine: Machine) -> bool:
    """Run one benchmark and say whether it ended well; its record is results/NAME_DEVICE.json."""
    command = job.command
    if command[0] != "-m":
        output = RESULTS / f"{job.name}_{machine.slug}.json"
        command = [str(HERE / command[0]), *command[1:], f"--output={output}"]
    print(f"== {job.name}: python {' '.join(command)}", flush=True)
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return subprocess.run([sys.executable, *command], cwd=HERE.parent, env=environment).returncode == 0


def input_rows(record: dict[str, Any]) -> Rows:
    """Rows of a record of input_pipeline.py."""
    ours, theirs = (record["images_per_core_second"][side] for side in ("psp_jax", "semseg chain"))
    what = "input pipeline, images a second of one core; other: hszhao/semseg's chain"
    return [(what, f"{ours:.0f}", f"{theirs:.0f}", f"{record['ratio']:.1f} times")]


def train_step_rows(record: dict[str, Any]) -> Rows:
    """Rows of a record of train_step.py: a dtype of ours beside the same of PyTorch, if it was there."""
    peers = {row["side"].split()[1]: row for row in record["rows"] if row["side"].startswith("torch")}
    rows: Rows = []
    for row in record["rows"]:
        program, dtype, *_ = row["side"].split()
        if program == "psp_jax":
            what = f"training step, {dtype}, batch {record['batch']}, crop {record['crop']}, images/s; other: PyTorch"
            peer, ours = peers.get(dtype), row["images_per_second"]
            other, ratio = "not run", ""
            if peer:
                other, ratio = f"{peer['images_per_second']:.2f}", f"{ours / peer['images_per_second']:.2f} times"
            rows.append((what, f"{ours:.2f}", other, ratio))
    return rows


def evaluate_rows(record: dict[str, Any]) -> Rows:
    """Rows of a record of evaluate.py."""
    ours, theirs = (record["seconds"][side] for side in ("evaluation step", "host loop"))
    what = f"evaluation, {record['scales']}, {record['windows']} windows, s an image; other: loop on the host"
    shown = f"{ours:.2f} ({100 * record['overhead']:.1f} % outside the network)"
    return [(what, shown, f"{theirs:.2f}", f"{theirs / ours:.2f} times")]


def data_wait_rows(record: dict[str, Any]) -> Rows:
    """Rows of a record of data_wait.py."""
    return [(f"waiting for data, {row['run']}", f"{100 * row['data_wait']:.2f} %", "", "") for row in record["rows"]]


def tpu_rows(record: dict[str, Any]) -> Rows:
    """Rows of a record of tpu_estimate.py."""
    found = [row for row in record["rows"] if row["step_seconds"]]
    return [
        (f"compiler's estimate for {row['target']}, ms a step", f"{1e3 * row['step_seconds']:.2f}", "", "")
        for row in found
    ]


# By the beginning of a record's name; records of other programs have tables of their own.
TABLES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "input_": input_rows,
    "train_step_": train_step_rows,
    "evaluate_": evaluate_rows,
    "data_wait": data_wait_rows,
    "tpu_estimate": tpu_rows,
}


def machine_name(record: dict[str, Any]) -> str:
    """Return the accelerator of a record, or the processor, with its load where that is more than its cores."""
    machine = record.get("machine", {})
    if not machine or record.get("device", "cpu") != "cpu":
        return record["device"]
    load = f", load {machine['load']:.0f}" if machine.get("load", 0) > machine["cores"] else ""
    return f"{machine['cpu']}, {machine['cores']} cores{load}"


def speed_table(results: Path) -> str:
    """Return the table of all records in a folder, each line with its machine and date."""
    lines = ["# Speed, as recorded", "", "| measured | psp_jax | other | compared | machine | date |"]
    lines.append("|---|---|---|---|---|---|")
    for path in sorted(results.glob("*.json")):
        for prefix, rows in TABLES.items():
            if path.stem.startswith(prefix):
                record = read_json(path)
                # Lines of data_wait are of runs, each with a machine and a date of its own.
                single = [row | {"rows": [row]} for row in record["rows"]] if prefix == "data_wait" else [record]
                for part in single:
                    lines += [f"| {' | '.join([*row, machine_name(part), part['date']])} |" for row in rows(part)]
    devices = {read_json(path).get("device", "cpu") for path in results.glob("train_step_*.json")}
    if not devices - {"cpu"}:
        lines += ["", "On a GPU or a TPU nothing has been run."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the flags, run what can be run, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="names of benchmarks")
    parser.add_argument("--archive", type=Path, help="ADEChallengeData2016.zip; images are made up without it")
    parser.add_argument("--camvid", type=Path, help="folder of CamVid, for bfloat16 beside float32: hours on a CPU")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"), help="of the trainings")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    failed = []
    if not args.table:
        machine = detect(args)
        found = jobs(machine, args.workdir.absolute())
        if unknown := set(args.only or ()) - {job.name for job in found}:
            parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(job.name for job in found)}")
        for job in found:
            if args.only and job.name not in args.only:
                continue
            if job.left_out:
                print(f"== {job.name} left out: {job.left_out}", flush=True)
            elif not run_job(job, machine):
                failed.append(job.name)
        if "torch" not in machine.packages:
            print("PyTorch is not installed; its side of train_step was left out.")
    write_text(RESULTS / "speed.md", speed_table(RESULTS))
    print(f"wrote {RESULTS / 'speed.md'}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see above")


if __name__ == "__main__":
    main()
