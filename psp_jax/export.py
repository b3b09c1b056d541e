"""Write a run's model for others to use: Orbax parameters, a StableHLO or ONNX program, or a PyTorch state dict.

python -m psp_jax.export --workdir runs/camvid --output exported/camvid
python -m psp_jax.export --workdir runs/camvid --format onnx --size 360 480 --output exported/onnx
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from psp_jax import api
from psp_jax.atomic import check_unused, make_folder
from psp_jax.checkpoint import load_variables, save_variables
from psp_jax.checks import check_size
from psp_jax.command import run_command
from psp_jax.deploy.fold import fold_batch_norm
from psp_jax.deploy.program import TOLERANCE, in_float32, relative_difference, signature
from psp_jax.workdir import versions, write_json

Written = tuple[np.ndarray | None, dict[str, Any]]

# Optional packages of a format, and the extra of this package that brings them.
NEEDS = {
    "onnx": ("onnx", ("onnx", "onnxruntime")),
    "semseg": ("weights", ("safetensors",)),
    "mmseg": ("weights", ("safetensors",)),
}


def _scores(model: api.Model, image: np.ndarray, variables: Any = None) -> np.ndarray:
    """Return the logits f32 [1, H, W, C] of an RGB image f32 [1, H, W, 3] of 0..255, with other variables if given."""
    if variables is not None:
        model = copy.copy(model)  # shares what is compiled
        model.variables = jax.device_put(variables, jax.local_devices()[0])
    return np.asarray(model.logits(model.normalize(image)))


def write_orbax(output: Path, model: api.Model, image: np.ndarray) -> Written:
    """Write parameters/; the scores are those of what is read back."""
    save_variables(output / api.PARAMETERS, model.variables)
    variables = load_variables(output / api.PARAMETERS, model.variables)
    return _scores(model, image, variables), {}


def write_program(output: Path, model: api.Model, image: np.ndarray, form: str) -> Written:
    """Write model.stablehlo or model.onnx for images of the size of `image`."""
    size = (image.shape[1], image.shape[2])
    if form == "stablehlo":
        from psp_jax.deploy import stablehlo

        stablehlo.write_stablehlo(output, model.card, model.variables, size)
        scores = stablehlo.run_stablehlo(output, image)
    else:
        from psp_jax.deploy import onnx_model

        onnx_model.write_onnx(output, model.card, model.variables, size)
        scores = onnx_model.run_onnx(output, image)
    return scores, signature(model.card, size)


def write_state_dict(output: Path, model: api.Model, image: np.ndarray, form: str) -> Written:
    """Write the state dict for a peer, which nothing here can run: it is read back instead."""
    from psp_jax.deploy import peers

    peers.write_peer(output, form, model.card, model.variables)
    peers.check_peer_files(output, form, model.card, model.variables)
    return None, peers.peer_signature(form, model.card)


# A writer puts the files of its format into `output` and returns the scores that they give for `image`, None where it
# has read them back bit for bit, and what signature.json says.
WRITERS: dict[str, Callable[[Path, api.Model, np.ndarray], Written]] = {
    "orbax": write_orbax,
    "stablehlo": functools.partial(write_program, form="stablehlo"),
    "onnx": functools.partial(write_program, form="onnx"),
    "semseg": functools.partial(write_state_dict, form="semseg"),
    "mmseg": functools.partial(write_state_dict, form="mmseg"),
}
PROGRAMS = ("stablehlo", "onnx")


def check_flags(form: str, size: tuple[int, int] | None, fold_bn: bool | None) -> None:
    """Raise ValueError where a format is unknown, lacks a package, or does not take a flag."""
    if form not in WRITERS:
        raise ValueError(f"--format={form} is unknown; choose one of: {', '.join(WRITERS)}.")
    for flag, given in (("--size", size), ("--fold_bn", fold_bn)):
        if given and form not in PROGRAMS:
            raise ValueError(f"{flag} is for --format={' and '.join(PROGRAMS)}; leave it out for --format={form}.")
    extra, packages = NEEDS.get(form, ("", ()))
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"--format={form} needs {' and '.join(missing)}: pip install 'psp-jax[{extra}]'.")


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[None]:
    """Make `output`, and empty it again where what is done inside fails.

    Raises:
      FileExistsError: it holds something, or is no folder.
    """
    check_unused(output, "export")
    made = not output.exists()
    make_folder(output)
    try:
        yield
    except BaseException:
        for path in output.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if made:
            output.rmdir()
        raise


def _difference(scores: np.ndarray, live: np.ndarray) -> float:
    """Return the largest difference, relative to the largest live score; ValueError where it is too large."""
    difference = relative_difference(scores, live)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"The exported model differs from the live one by {difference:.1e} of the largest score, more than "
            f"{TOLERANCE:.0e}, and was not kept; try other versions of jax or of the format's packages."
        )
    return difference


def export(
    workdir: Path,
    output: Path,
    checkpoint: str = "latest",
    form: str = "orbax",
    size: tuple[int, int] | None = None,
    fold_bn: bool | None = None,
) -> float | None:
    """Write the model of the run in `workdir` into `output`, and check it against the live one.

    Args:
      workdir: of a training run, or an export of the format orbax.
      output: new or empty directory. model.json (orbax) or signature.json comes last: with it, the export is complete.
      checkpoint: latest or best.
      form: a key of `WRITERS`.
      size: (height, width) of a program's images; the run's canvas by default.
      fold_bn: whether a program has batch norm folded into its convolutions; by default where that makes it smaller,
        in ONNX.

    Returns:
      The largest difference of a score on a random image, relative to the largest score; None for a state dict, which
      is read back bit for bit.

    Raises:
      FileNotFoundError: `workdir` holds no trained model.
      FileExistsError: `output` is not empty, or a file.
      ValueError: the format has no such network, lacks a package, or gives other scores than the live model.
    """
    check_flags(form, size, fold_bn)
    with new_directory(output):
        model = api.load(workdir, checkpoint)
        card, trained_in = model.card, model.card.model["dtype"]
        if form != "orbax":
            card = dataclasses.replace(card, model=in_float32(card.model))
        if size:
            check_size(size, "--size", card.model)
        fold_bn = form == "onnx" if fold_bn is None else fold_bn
        live = api.Model(card, model.variables, model.step)
        written = api.Model(card, fold_batch_norm(model.variables), model.step) if fold_bn else live
        image = np.random.default_rng(0).integers(0, 256, (1, *(size or card.size), 3)).astype(np.float32)
        scores, described = WRITERS[form](output, written, image)
        difference = None if scores is None else _difference(scores, _scores(live, image))
        record = {"format": form, "step": model.step, "workdir": str(workdir), "fold_bn": fold_bn}
        record |= {"dtype": card.model["dtype"], "versions": versions()}
        if difference is None:
            record["checked"] = checked = "read back bit for bit"
        else:
            record |= {"checked": "scores of a random image", "largest_relative_difference": difference}
            checked = f"largest difference to the live model on a random image: {difference:.1e} of the largest score"
        write_json(output / "export.json", record)
        # Last, so that a directory which holds it is complete.
        card.write(output) if form == "orbax" else write_json(output / "signature.json", described)
    computed = f", computed in float32 (trained in {trained_in})" if trained_in != card.model["dtype"] else ""
    print(f"wrote {output}: {form}{computed}\n{checked}")
    return difference


def main() -> None:
    """Parse the flags and export."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
    parser.add_argument("--output", type=Path, required=True, help="new directory to write")
    parser.add_argument("--format", choices=tuple(WRITERS), default="orbax")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    size_help = "of the images of a program (stablehlo, onnx); the run's canvas by default"
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=size_help)
    fold_help = "fold batch norm into the convolutions of a program; done for onnx unless --no-fold_bn"
    parser.add_argument("--fold_bn", action=argparse.BooleanOptionalAction, help=fold_help)
    args = parser.parse_args()
    # Writing needs no accelerator, which a training run may hold; and float32 on the CPU is float32.
    jax.config.update("jax_platforms", "cpu")
    size = (args.size[0], args.size[1]) if args.size else None
    export(args.workdir, args.output, args.checkpoint, args.format, size, args.fold_bn)


if __name__ == "__main__":
    run_command(main)
