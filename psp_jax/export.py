"""Write a run's inference parameters as a plain Orbax checkpoint that describes itself.

python -m psp_jax.export --workdir runs/camvid --output exported/camvid
"""

import argparse
from pathlib import Path

from psp_jax import api
from psp_jax.checkpoint import save_variables
from psp_jax.command import run_command
from psp_jax.workdir import versions, write_json


def export(workdir: Path, output: Path, checkpoint: str) -> None:
    """Write parameters/ (Orbax) and model.json of the run in `workdir` into `output`.

    Raises:
      FileNotFoundError: `workdir` holds no trained model.
      FileExistsError: `output` is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another --output.")
    model = api.load(workdir, checkpoint)
    save_variables(output / api.PARAMETERS, model.variables)
    write_json(output / "export.json", {"step": model.step, "workdir": str(workdir), "versions": versions()})
    # Last, so that a directory with a model.json is complete.
    model.card.write(output)
    print(f"wrote {output}: load it with psp_jax.load({str(output)!r})")


def main() -> None:
    """Parse the flags and export."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.export", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
    parser.add_argument("--output", type=Path, required=True, help="new directory to write")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    args = parser.parse_args()
    export(args.workdir, args.output, args.checkpoint)


if __name__ == "__main__":
    run_command(main)
