"""Tell what a run will need on TPU chips before there is one: memory, time, chip-hours, traffic between chips.

    python -m psp_jax.plan --config configs/ade20k.py --topology v5e:4x4 --price 1.20
    python -m psp_jax.plan --config configs/ade20k.py --topology v5e:2x2 v5e:4x4 v5e:8x8@batch=64 --output plans

Compiles the very training step and evaluation of the configuration, with libtpu, for chips that are not there; or, with
--topology local, for the devices of this machine.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from psp_jax import checks, parallel
from psp_jax import classes as class_tables
from psp_jax.atomic import make_folder
from psp_jax.classes import ClassTable
from psp_jax.command import run_command
from psp_jax.config_file import read_config
from psp_jax.data.builders import ade20k, cityscapes, context_scenes, locate, pascal_context, voc2012
from psp_jax.data.source import open_source
from psp_jax.planning import programs, summary
from psp_jax.planning.chips import CHIPS, Chip, chip_of, topology_devices
from psp_jax.planning.plot import bar_plot
from psp_jax.train import check_run
from psp_jax.workdir import versions, write_json, write_png, write_text

# Images of the splits that the data sets' own pages tell, for a plan before anything is downloaded.
PUBLISHED = {
    "ade20k": ade20k.FULL_COUNTS,
    "cityscapes": cityscapes.FULL_COUNTS,
    "context_scenes": context_scenes.COUNTS,
    "pascal_context": pascal_context.FULL_COUNTS,
    "voc2012": voc2012.FULL_COUNTS,
}
OPTIONS = {"spatial": ("mesh.spatial",), "batch": ("train.batch_size", "eval.batch_size")}


@dataclass(frozen=True)
class Target:
    """A run to plan.

    Attributes:
      name: as it was asked for.
      config: checked and complete.
      steps: of the run.
      mesh: of its devices.
      chip: None for those of this machine, of which nothing is known.
    """

    name: str
    config: ConfigDict
    steps: int
    mesh: Mesh
    chip: Chip | None


def is_local(name: str) -> bool:
    """Say whether a target is of the devices of this machine."""
    return name.partition("@")[0] == "local"


def read_target(name: str, config: ConfigDict, images: int) -> Target:
    """Return the run on TOPOLOGY or TOPOLOGY@FIELD=N,FIELD=N, with fields of `OPTIONS`; `images` are to train on.

    Raises:
      ValueError: an unknown topology or field, a number that is none, no libtpu, or what training refuses.
    """
    topology, _, options = name.partition("@")
    config = config.copy_and_resolve_references()
    for option in filter(None, options.split(",")):
        field, _, number = option.partition("=")
        if field not in OPTIONS or not number.isdigit() or not int(number):
            raise ValueError(f"{name}: {option} is no option; write {' or '.join(f'{known}=N' for known in OPTIONS)}.")
        config.update_from_flattened_dict(dict.fromkeys(OPTIONS[field], int(number)))
    chip = None if is_local(name) else chip_of(topology)
    check_run(config)
    devices = jax.devices() if chip is None else topology_devices(topology)
    if config.mesh.devices not in (0, len(devices)):
        raise ValueError(
            f"{name} has {len(devices)} devices, and mesh.devices={config.mesh.devices} refuses any other number; set "
            "it to 0, or choose another topology."
        )
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.spatial, devices)
    hosts = len({device.process_index for device in devices})
    checks.check_mesh(config, checks.crop_size(config), True, mesh.shape["data"], mesh.shape["spatial"], hosts)
    return Target(name, config, checks.total_steps(config, images), mesh, chip)


def data_set(config: ConfigDict, images: int | None) -> tuple[ClassTable, int]:
    """Return the classes and the number of training images: `images`, those prepared here, or those published.

    Raises:
      FileNotFoundError, ValueError: neither is there; see also `builders.locate`.
    """
    data = config.data
    if data.name == "image_folder" and data.classes and images:
        return class_tables.get(data.classes), images
    where: dict[str, Any] = {"prepared_dir": data.prepared_dir, "classes": data.classes or None}
    if locate(data.name, data.dir, **where).exists():
        source = open_source(data.name, data.dir, data.train_split, **where)
        return source.classes, images or len(source)
    if data.name not in PUBLISHED:
        raise ValueError(
            f"{data.dir} is not prepared, so its number of images is not known: prepare it, or give --images and "
            "--config.data.classes."
        )
    known, splits = PUBLISHED[data.name], data.train_split.split("+")
    if unknown := [split for split in splits if split not in known]:
        raise ValueError(f"{data.name} has no split {unknown[0]!r}; its splits are {', '.join(known)}.")
    return class_tables.get(data.name), images or sum(known[split] for split in splits)


def plan_target(target: Target, classes: ClassTable, args: argparse.Namespace) -> dict[str, Any]:
    """Compile for one target and return what was found; `args` are the flags of the command."""
    config, steps, mesh = target.config, target.steps, target.mesh
    _say(f"{target.name}: compiling the training step for {mesh.size} chips, which takes minutes for a full network")
    program = programs.compile_training(config, classes, steps, mesh)
    _say(f"{target.name}: compiled in {program.seconds:.0f} s")
    if args.hlo and program.text:
        write_text(args.hlo, program.text)
    row: dict[str, Any] = {
        "target": target.name,
        "chips": mesh.size,
        "hosts": len({device.process_index for device in mesh.devices.flat}),
        **mesh.shape,  # data and spatial
        "batch_size": config.train.batch_size,
        "crop": list(checks.crop_size(config)),
        "dtype": config.model.dtype,
        "steps": steps,
    }
    flops = programs.training_flops(config, classes, steps)
    sizes = (mesh.size, config.train.batch_size, steps)
    row |= summary.training_summary(program, target.chip, *sizes, flops, price_of(args.price, target.name))
    if args.largest_batch and target.chip:
        row["largest_batch_size"] = largest_batch(target, classes, program, target.chip.hbm)
    if args.evaluate:
        _say(f"{target.name}: compiling the evaluation")
        size = tuple(args.eval_image)
        found = programs.compile_evaluation(config, classes, size, mesh)
        _say(f"{target.name}: compiled in {found.program.seconds:.0f} s")
        row["evaluation"] = summary.evaluation_summary(found, target.chip, size)
    return row


def largest_batch(target: Target, classes: ClassTable, known: programs.Program, limit: int) -> int:
    """Return the largest train.batch_size that `limit` bytes a chip hold, 0 if none; `known` is of the target's own."""
    own = target.config.train.batch_size
    unit = math.lcm(target.mesh.shape["data"], target.config.model.bn_group_size or 1)  # what a batch must divide by

    def total(count: int) -> int | None:
        if count * unit == own:
            return known.total
        config = target.config.copy_and_resolve_references()
        config.train.batch_size = count * unit
        found = programs.compile_training(config, classes, target.steps, target.mesh)
        shown = "does not fit" if found.total is None else f"{found.total / summary.GIB:.2f} GiB a chip"
        _say(f"{target.name}: train.batch_size={count * unit}: {shown}, compiled in {found.seconds:.0f} s")
        return found.total

    return unit * programs.largest_count(total, own // unit, limit)


def price_of(prices: Sequence[str], target: str) -> float | None:
    """Return USD a chip-hour of a target, from prices such as 1.20 (of any chip) and v5e=1.20; None without one.

    Raises:
      ValueError: a price is no number.
    """
    found = None
    for price in prices:
        chip, _, number = price.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"--price={price} is no price; write USD a chip-hour as 1.20, or v5e=1.20.") from None
        if not 0 <= value < math.inf:
            raise ValueError(f"--price={price} must be at least 0, and finite.")
        if chip and chip not in CHIPS:
            raise ValueError(f"--price={price} is of an unknown chip; known: {', '.join(CHIPS)}.")
        if chip == target.partition(":")[0]:
            return value
        found = found if chip else value
    return found


def write_rows(output: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Write plan.json, plan.md, plan.csv and, of several rows with estimates, plan.png."""
    make_folder(output)
    write_json(output / "plan.json", {"title": title, "rows": rows, "versions": versions()})
    write_text(output / "plan.md", f"# {title}\n\n{summary.as_markdown(summary.table(rows))}")
    write_text(output / "plan.csv", summary.as_csv(rows))
    if len(rows) > 1 and any(row["step_seconds"] for row in rows):
        write_png(output / "plan.png", Image.fromarray(bar_plot(title, rows)))


def _say(line: str) -> None:
    print(line, flush=True)


def _parse_flags() -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and the arguments left over, which are the configuration's."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="configuration file, as for psp_jax.main")
    topology_help = "CHIP:SHAPE, with @spatial=N,batch=N for another mesh or batch; or local; several are compared"
    parser.add_argument("--topology", nargs="+", required=True, metavar="TOPOLOGY", help=topology_help)
    parser.add_argument("--images", type=int, help="training images; those prepared or published by default")
    parser.add_argument("--price", nargs="+", default=[], metavar="USD", help="of a chip-hour: 1.20, or v5e=1.20 ...")
    batch_help = "search for the largest batch that fits; several compiles"
    parser.add_argument("--largest_batch", action="store_true", help=batch_help)
    evaluate_help = "compile the evaluation too (default for one topology)"
    parser.add_argument("--evaluate", action=argparse.BooleanOptionalAction, help=evaluate_help)
    size_help = "original size of the images evaluated (512 683)"
    parser.add_argument("--eval_image", type=int, nargs=2, default=(512, 683), metavar=("H", "W"), help=size_help)
    parser.add_argument("--hlo", type=Path, help="file to write the compiled training step to, for one topology")
    parser.add_argument("--output", type=Path, help="folder of plan.json, plan.md, plan.csv and plan.png")
    args, rest = parser.parse_known_args()
    if args.hlo and len(args.topology) > 1:
        raise ValueError(f"--hlo writes one program; give one --topology, not {len(args.topology)}.")
    for flag, numbers in (("images", [1 if args.images is None else args.images]), ("eval_image", args.eval_image)):
        if min(numbers) < 1:
            raise ValueError(f"--{flag}={getattr(args, flag)} must be at least 1.")
    if args.largest_batch and any(map(is_local, args.topology)):
        raise ValueError("--largest_batch needs chips whose memory is known; leave the topology local out.")
    if args.evaluate is None:
        args.evaluate = len(args.topology) == 1
    return args, rest


def main() -> None:
    """Parse the flags, compile for each target, and tell what was found."""
    args, rest = _parse_flags()
    if not any(map(is_local, args.topology)):
        jax.config.update("jax_platforms", "cpu")  # a TPU or GPU of this machine may be in use
    for name in args.topology:
        price_of(args.price, name)
    config = read_config(args.config, rest)
    classes, images = data_set(config, args.images)
    rows: list[dict[str, Any]] = []
    for target in [read_target(name, config, images) for name in args.topology]:  # all are read before one compiles
        rows.append(plan_target(target, classes, args))
        _say(f"\n{summary.as_text(rows[-1])}")
        if args.output:
            write_rows(args.output, rows, args.config)
    if len(rows) > 1:
        _say(summary.as_columns(summary.table(rows)))
    if args.output:
        _say(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
