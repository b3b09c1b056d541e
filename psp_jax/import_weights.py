"""Make a model of psp_jax from a segmentation network that another framework trained.

python -m psp_jax.import_weights --source semseg --input train_epoch_100.pth --output imported/semseg
"""

import argparse
from pathlib import Path
from typing import Any

from psp_jax import api, classes
from psp_jax.atomic import check_unused, whole_folder
from psp_jax.checkpoint import save_variables
from psp_jax.checks import check_size
from psp_jax.classes import ClassTable
from psp_jax.command import run_command
from psp_jax.models import variable_shapes
from psp_jax.weights.architecture import Recognised, recognise
from psp_jax.weights.fetch import fetch
from psp_jax.weights.formats import read_tensors
from psp_jax.weights.schemes import SOURCES
from psp_jax.weights.tables import ignored, names, to_variables
from psp_jax.workdir import ModelCard, versions, write_json

# (height, width) of the crops that each source trains with, and the long side of the protocol semseg.
SIZES = {
    "semseg": ((473, 473), 512),
    "mmseg": ((512, 512), 512),
    "encoding": ((480, 480), 520),
    "caffe": ((473, 473), 512),
}
CITYSCAPES_SIZES = {
    "semseg": ((713, 713), 2048),
    "mmseg": ((512, 1024), 2048),
    "encoding": ((480, 480), 520),
    "caffe": ((713, 713), 2048),
}
MMSEG_ALIGNED = (769, 769)  # its networks on Cityscapes with align_corners
TABLES = ("ade20k", "voc2012", "cityscapes", "camvid", "pascal_context")


def import_weights(
    source: str, file: Path, output: Path, class_table: str | None = None, choices: dict[str, Any] | None = None
) -> str:
    """Write parameters/ (Orbax), export.json and model.json of the network in `file` into `output`.

    Args:
      source: a name of `SOURCES`.
      file: of any format that `weights.formats` reads.
      output: a new directory.
      class_table: name or JSON file; by default the one of a known data set with as many classes.
      choices: fields of config.model that no tensor tells, where they are others than the source's usual ones.

    Returns:
      What was imported, in words.

    Raises:
      FileExistsError: `output` is not empty, or a file.
      ValueError: the file is damaged, not of the source, or of a backbone alone; the classes are unknown or of another
        number.
    """
    output = output.resolve()
    check_unused(output, "model")
    tensors = read_tensors(file)
    recognised = recognise(source, tensors)
    if recognised.num_classes is None:
        raise ValueError(
            f"{file.name} holds a classification network, which labels no pixels; start training from it with "
            f"--config.init.source={source} --config.init.path={file}."
        )
    settings = recognised.settings | (choices or {})
    table = _classes(class_table, recognised.num_classes)
    like = variable_shapes(settings, table.num_classes)
    variables = to_variables(source, tensors, settings, like)
    left_out = ignored(source, tensors, names(source, settings, like))
    _write(output, _card(source, settings, recognised, table), variables, {"source": source, "input": file.name})
    return _told(source, settings, table, left_out)


def _classes(name: str | None, count: int) -> ClassTable:
    """Return the class table that was asked for, or the known one with `count` classes."""
    if name is None:
        fitting = [table for table in map(classes.get, TABLES) if table.num_classes == count]
        if not fitting:
            known = ", ".join(f"{table.name} {table.num_classes}" for table in map(classes.get, TABLES))
            raise ValueError(
                f"The network tells {count} classes apart, which is no known data set ({known}); name them with "
                "--classes FILE.json."
            )
        return fitting[0]
    table = classes.get(name)
    if table.num_classes != count:
        raise ValueError(
            f"The network tells {count} classes apart, the class table {table.name} has {table.num_classes}; choose "
            "another --classes."
        )
    return table


def image_sizes(source: str, table: str, settings: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """Return (height, width) that images are fitted into, and the long side of the protocol semseg.

    The height and width are the source's, or the nearest that `check_size` lets pass, the larger of two as near: 481
    for encoding's 480, whose features lie on 60 positions that 480 pixels do not divide into with align_corners.
    """
    size, base_size = (CITYSCAPES_SIZES if table == "cityscapes" else SIZES)[source]
    if source == "mmseg" and table == "cityscapes" and settings["align_corners"]:
        size = MMSEG_ALIGNED
    stride, offset = settings["output_stride"], int(settings["align_corners"])
    height, width = ((side - offset + stride // 2) // stride * stride + offset for side in size)
    return (height, width), base_size


def _card(source: str, settings: dict[str, Any], recognised: Recognised, table: ClassTable) -> ModelCard:
    size, base_size = image_sizes(source, table.name, settings)
    check_size(size, "the size of images", settings)
    return ModelCard(settings, table, recognised.mean, recognised.std, size, size, base_size)


def _write(output: Path, card: ModelCard, variables: dict[str, Any], origin: dict[str, str]) -> None:
    """Write everything into `output`; a failure leaves nothing behind."""
    with whole_folder(output) as partial:
        save_variables(partial / api.PARAMETERS, variables)
        write_json(partial / "export.json", {"step": 0, "imported": origin, "versions": versions()})
        card.write(partial)


def _told(source: str, settings: dict[str, Any], table: ClassTable, left_out: set[str]) -> str:
    """Return what the network is, in a line or two."""
    choices = ("stem", "output_stride", "first_block_dilation", "stride_in", "align_corners")
    text = f"{settings['head'].upper()} head on ResNet-{settings['depth']}, classes of {table.name}; "
    text += ", ".join(f"{field} {settings[field]}" for field in choices)
    if source == "mmseg" and settings["head"] in ("aspp", "fcn"):
        text += "\ndilations are taken to be those of D8 networks; files of d16-mg124 and d6 networks look the same"
    # In ASCII and short, whatever letters a hostile file gave its names.
    layers = [ascii(name[:100])[1:-1] for name in sorted(left_out) if not name.endswith("num_batches_tracked")]
    return text + (f"\nleft out, as no layer needs them: {', '.join(layers)}" if layers else "")


def main() -> None:
    """Parse the flags and import."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.import_weights", description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, choices=SOURCES, help="whose names the tensors have")
    parser.add_argument("--input", required=True, help="file or URL: .pth, .pt, .safetensors, .npz or .caffemodel")
    parser.add_argument("--output", type=Path, required=True, help="new directory to write")
    parser.add_argument("--classes", help="known class table or a classes.json; by default by the number of classes")
    parser.add_argument("--sha256", help="checksum of the file, or its first digits")
    usual = parser.add_argument_group("where the network is not run as its source usually does, which no tensor tells")
    usual.add_argument("--align_corners", choices=("True", "False"), help="mmseg: True in its 769 x 769 networks")
    usual.add_argument("--output_stride", type=int, choices=(8, 16, 32), help="mmseg: 32 in its d32 networks")
    usual.add_argument("--stride_in", choices=("3x3", "1x1"), help="caffe: 1x1 in ResNet-50, 3x3 in ResNet-101")
    args = parser.parse_args()
    choices: dict[str, Any] = {field: getattr(args, field) for field in ("output_stride", "stride_in")}
    choices["align_corners"] = args.align_corners and args.align_corners == "True"
    given = {field: value for field, value in choices.items() if value is not None}
    print(import_weights(args.source, fetch(args.input, args.sha256), args.output, args.classes, given))
    print(f"wrote {args.output}: load it with psp_jax.load({str(args.output)!r})")


if __name__ == "__main__":
    run_command(main)
