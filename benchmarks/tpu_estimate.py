"""The training step as compiled for TPU chips that are not there: the compiler's cycles, and memory, of each chip.

    python benchmarks/tpu_estimate.py --output benchmarks/results/tpu_estimate.json

It needs libtpu, and minutes of a core for each topology. The step, its compilation and what is read of it are those of
`psp_jax.plan`; flags of the form --config.FIELD=VALUE change the configuration, here as there.
"""

import argparse
from pathlib import Path
from typing import Any

import jax

from benchmarks.record import header, publish
from psp_jax import plan
from psp_jax.config_file import read_config
from psp_jax.planning.summary import CAVEAT, GIB


def estimate(config_path: str, overrides: list[str], topologies: list[str], images: int | None) -> list[dict[str, Any]]:
    """Return a row of `plan.plan_target` for each topology."""
    config = read_config(config_path, overrides)
    classes, images = plan.data_set(config, images)
    flags = argparse.Namespace(hlo=None, price=[], largest_batch=False, evaluate=False)
    targets = [plan.read_target(name, config, images) for name in topologies]  # all are read before one compiles
    return [plan.plan_target(target, classes, flags) for target in targets]


def as_markdown(record: dict[str, Any]) -> str:
    """Return the record as a table."""
    lines = [f"`{record['command']}`, {record['date']}, libtpu {record['versions']['libtpu']}. {CAVEAT}", ""]
    lines += [
        "| topology | images a chip | million cycles | ms | images/s | MFU | GiB a chip |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        seconds, memory = row["step_seconds"], row["memory_total"]
        found = ["does not fit" if memory is None else "no estimate", "", "", ""]
        if seconds:
            found = [f"{row['cycles'] / 1e6:.1f}", f"{1e3 * seconds:.2f}", f"{row['images_per_second']:.0f}"]
            found.append(f"{100 * row['mfu']:.1f} %")
        size = f"{memory / GIB:.2f}" if memory else "more than it has"
        cells = [row["target"], f"{row['batch_size'] / row['chips']:g}", *found, size]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the flags, compile, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/ade20k.py")
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2", "v5e:4x4"], help="as those of psp_jax.plan")
    parser.add_argument("--images", type=int, help="training images; those prepared or published by default")
    parser.add_argument("--output", type=Path, help="JSON file to write, and a Markdown table beside it")
    args, overrides = parser.parse_known_args()
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU of this machine may be in use
    record = header() | {"rows": estimate(args.config, overrides, args.topology, args.images)}
    publish(record, as_markdown(record), args.output)


if __name__ == "__main__":
    main()
