"""Command: prepare a data set for training.

    python -m psp_jax.prepare --dataset ade20k --data_dir D [--archive ADEChallengeData2016.zip]
    python -m psp_jax.prepare --dataset voc2012|cityscapes|pascal_context --data_dir D [--archive FOLDER]
    python -m psp_jax.prepare --dataset image_folder --source FOLDER --data_dir D [--classes camvid]
    python -m psp_jax.prepare --dataset context_scenes --data_dir D

What is prepared already is left alone. The exit code is 1 when something is wrong with the data; one line says what.
"""

import argparse
from collections.abc import Sequence

from psp_jax.command import run_command
from psp_jax.data.builders import BUILDERS
from psp_jax.data.prepared import describe, ensure_prepared


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare what the flags say; raises ValueError or OSError, with the remedy, where something is wrong."""
    flags = _parser().parse_args(argv)
    is_folder = flags.dataset == "image_folder"
    if is_folder != bool(flags.source):
        raise ValueError("The data set image_folder needs --source FOLDER, and no other data set takes it.")
    directory = ensure_prepared(
        flags.dataset,
        flags.source if is_folder else flags.data_dir,
        prepared_dir=flags.data_dir,
        classes=flags.classes,
        archive=flags.archive,
    )
    print(describe(directory))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m psp_jax.prepare", description="Prepare a data set for training.")
    parser.add_argument("--dataset", required=True, help=f"one of {', '.join(BUILDERS)}")
    parser.add_argument("--data_dir", required=True, help="folder of prepared data sets, where records are written")
    parser.add_argument(
        "--archive",
        help="ade20k: ADEChallengeData2016.zip or its unpacked folder; voc2012, cityscapes, pascal_context: the folder "
        "of the official archives, or unpacked from them (default: DATA_DIR/downloads, fetched without a login)",
    )
    parser.add_argument("--source", help="image_folder: folder with images/SPLIT, annotations/SPLIT, classes.json")
    parser.add_argument("--classes", help="image_folder: name of a class table or path of a classes.json")
    return parser


if __name__ == "__main__":
    run_command(main)
