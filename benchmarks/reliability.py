"""What a run survives: faults at any moment of it, and damaged inputs, by the long tests of tests/.

    PYTHONPATH=. python benchmarks/reliability.py --output benchmarks/results/reliability.json

Runs the tests marked soak or fault of tests/test_soak.py, test_storage_faults.py and test_fuzz.py, about twenty minutes
on two idle cores, and counts what they tell:

- faults that came, by kind and by what the run was doing: SIGKILL and SIGTERM at random moments (of PSP_JAX_SOAK_SEED,
  which is recorded), killed data workers, a corrupt record, a clock that jumps, a full disk, a read-only workdir,
  damaged checkpoints, a second run in the workdir; and how many were survived: every assertion of the test held.
- saved steps lost: where after a fault the newest checkpoint that can be read whole is older than one that was there
  before, or that the run said to have saved.
- steps since the last save that the next start took again, and whether runs finished after kills are, bit for bit, as
  undisturbed.
- damaged inputs, by kind: read; refused as every command refuses, in one line that names what is wrong; or broken:
  anything else, also one read as another value than the sound one where a checksum (of `inputs_with_checksum`) tells.

With --minutes it ends earlier. With --log several runs add up, and so do tests that were run by hand with
PSP_JAX_RELIABILITY_LOG set to that file; --minutes 0 then only counts.
"""

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import header
from psp_jax.workdir import write_json

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "PSP_JAX_RELIABILITY_LOG"  # as in tests/reliability_log.py
TESTS = ("tests/test_soak.py", "tests/test_storage_faults.py", "tests/test_fuzz.py")


def run_tests(log: Path, minutes: float) -> int | None:
    """Run the tests, which add to `log`; return pytest's exit status, None where they were killed after `minutes`."""
    command = [sys.executable, "-m", "pytest", "-m", "soak or fault", "-v", "-p", "no:cacheprovider", *TESTS]
    settings = os.environ | {VARIABLE: str(log.absolute())}
    process = subprocess.Popen(command, cwd=ROOT, env=settings, start_new_session=True)
    try:
        return process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the runs that the tests started too
            process.wait()


def count(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of what the tests told."""
    # A run may end before a fault comes; but what was not survived counts in any case.
    faults = [row for row in rows if row["kind"] == "fault" and (row.get("came", True) or not row["survived"])]
    inputs = [row for row in rows if row["kind"] == "input"]
    runs = [row for row in rows if row["kind"] == "run"]
    kinds = collections.Counter(row["signal"] for row in faults)
    again = collections.Counter(row["again"] for row in faults if "again" in row)
    outcomes = collections.Counter((row["target"], row["outcome"]) for row in inputs)
    return {
        "faults": dict(kinds),
        "faults_survived": sum(row["survived"] for row in faults),
        "faults_by_activity": dict(collections.Counter(row["activity"] for row in faults)),
        "seeds": sorted({row["seed"] for row in faults if "seed" in row}),
        "saved_steps_lost": sum(row.get("lost", 0) for row in faults),
        "faults_by_steps_taken_again": {str(steps): again[steps] for steps in sorted(again)},
        "runs_finished_after_kills": len(runs),
        "runs_finished_after_kills_bit_for_bit_as_undisturbed": sum(row["same"] for row in runs),
        "inputs": len(inputs),
        "inputs_by_kind": {
            target: {result: outcomes[target, result] for result in ("read", "refused", "broken")}
            for target in sorted({row["target"] for row in inputs})
        },
        "inputs_with_checksum": sum(row.get("exact", False) for row in inputs),
        "broken_inputs": sum(row["outcome"] == "broken" for row in inputs),
    }


def main() -> None:
    """Parse the flags, run, count and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=240, help="after which the tests are ended (240)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--log", type=Path, help="file that the tests add to, kept (a temporary one)")
    args = parser.parse_args()
    status, ended = None, "not run, counted only"
    with tempfile.TemporaryDirectory() as folder:
        log = args.log or Path(folder) / "log.jsonl"
        log.touch()
        if args.minutes:
            status = run_tests(log, args.minutes)
            ended = f"killed after {args.minutes:g} minutes" if status is None else f"exit status {status}"
        rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    if not rows:
        raise SystemExit(f"The tests told nothing ({ended}); see what pytest says above.")
    write_json(args.output, header() | {"pytest": ended} | count(rows))
    if status:
        raise SystemExit(f"pytest ended with {ended}; {args.output} tells what came until then.")


if __name__ == "__main__":
    main()
