"""What the fuzzer damages of runs and what they leave, and how the package reads it."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import Target, Told, files_of, folder_name

OWNER = "12 1.5 data and protocol"
OVERRIDES = {
    "train.steps": 3,
    "train.crop_size": "(65,)",
    "train.ema_decay": 0.9,
    "optimizer.base_lr": 0.1,
    "model.bins": "(1, 2)",
    "model.head": "psp",
    "loss.class_weights": "(1.0, 2.0)",
    "augment.photometric": "True",
    "eval.scales": "multi",
    "mesh.data": -1,
}


def _tiny_config() -> Any:
    from psp_jax.config import defaults

    config = defaults()
    config.model.update(depth=10, width=8, stem="32-32-64", head_channels=16, aux_channels=8)
    config.train.update(steps=12, batch_size=2, crop_size=(41, 41))
    return config


def make_workdir(folder: Path) -> list[Path]:
    from psp_jax import classes
    from psp_jax.config import plain
    from psp_jax.workdir import ModelCard

    config, table = plain(_tiny_config()), classes.get("camvid")
    ModelCard(config["model"], table, (1.0, 2.0, 3.0), (1.0, 1.0, 1.0), (41, 41), (41, 41), 512).write(folder)
    resolved = {"train_images": 3, "steps": 12, "class_weights": []}
    record = {"config": config, "resolved": resolved, "classes_digest": table.digest()}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "something").touch()
    return files_of(folder, "*.json")


def read_workdir(folder: Path) -> None:
    from psp_jax import api, classes
    from psp_jax.config import plain
    from psp_jax.workdir import check_owner

    check_owner(folder, plain(_tiny_config()), classes.get("camvid"), 3, False)
    with contextlib.suppress(FileNotFoundError):  # it holds no checkpoint
        api.load(folder)


def make_config(folder: Path) -> list[Path]:
    (folder / "a.py").write_text(
        "from psp_jax.config import defaults\n\n\ndef get_config():\n    config = defaults()\n"
        '    config.data.update(name="image_folder", dir="photos")\n    config.train.update(steps=40, batch_size=4)\n'
        "    config.model.update(depth=18, head_channels=128)\n    return config\n"
    )
    (folder / "overrides.json").write_text(json.dumps(OVERRIDES))
    return files_of(folder, "*.py", "*.json")


def _overrides(folder: Path) -> list[str]:
    """Return the flags that overrides.json gives, whatever it holds by now."""
    text = (folder / "overrides.json").read_text("utf-8", "replace")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = text
    fields = given if isinstance(given, dict) else {"train.steps": given}
    values = {field: value if isinstance(value, str) else json.dumps(value) for field, value in fields.items()}
    return [f"--config.{field}={value}" for field, value in values.items()]


def config_names(folder: Path, file: str) -> list[str]:
    """Return the names of a damaged configuration, or of a flag: the field, which the values of a file have too."""
    from psp_jax.config import defaults, flatten

    known = [name for name, _ in flatten(defaults())]
    return [*known, "a.py"] if file == "a.py" else [*known, "Unknown configuration field "]


def read_config(folder: Path) -> Any:
    """Read a.py with overrides.json as flags, as every command but main does; main differs in a global variable."""
    from psp_jax import config_file
    from psp_jax.config import plain
    from psp_jax.train import check_run

    config = config_file.read_config(str(folder / "a.py"), _overrides(folder))
    check_run(config)
    return plain(config)


def _state(step: int) -> Any:
    import jax.numpy as jnp

    from psp_jax.train_step import TrainState

    params, statistics = {"kernel": jnp.full((3, 4), step + 0.1)}, {"mean": jnp.full((4,), 0.2)}
    return TrainState(jnp.asarray(step, jnp.int32), params, statistics, ({"trace": jnp.full((3, 4), 0.3)}, ()), None)


def make_checkpoint(folder: Path) -> list[Path]:
    from psp_jax.checkpoint import Checkpoints

    if not (folder / "checkpoints").exists():
        checkpoints = Checkpoints(folder / "checkpoints", keep_latest=1)
        checkpoints.save(4, _state(4), None, {"interval": []})
        checkpoints.close()
    return files_of(folder / "checkpoints", "*")


def read_checkpoint(folder: Path) -> Any:
    from psp_jax.checkpoint import Checkpoints

    with contextlib.closing(Checkpoints(folder / "checkpoints", keep_latest=1)) as checkpoints:
        return vars(checkpoints.restore(4, _state(0))), checkpoints.notes(4)


def make_tally(folder: Path) -> list[Path]:
    from psp_jax.tally import Tally

    tally = Tally(5, 3)
    tally.add(np.full((3, 3), 7), np.arange(18).reshape(2, 3, 3), np.array([3, 1]))
    tally.save(folder / "partial.npz", OWNER)
    return [folder / "partial.npz"]


def read_tally(folder: Path) -> Any:
    from psp_jax.tally import Tally

    tally = Tally(5, 3)
    if not (words := tally.load(folder / "partial.npz", OWNER)).startswith("going on after 2 of 5"):
        raise Told(words)
    return tally.confusion, tally.images, tally.done


def make_export(folder: Path) -> list[Path]:
    import jax
    import jax.numpy as jnp

    from psp_jax import api
    from psp_jax.checkpoint import save_variables
    from psp_jax.models import variable_shapes
    from psp_jax.workdir import ModelCard, write_json

    if not (folder / "parameters").exists():
        make_workdir(folder)
        card = ModelCard.read(folder)
        shapes = variable_shapes(card.model, card.classes.num_classes)
        variables = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), shapes)
        save_variables(folder / api.PARAMETERS, variables)
        write_json(folder / "export.json", {"step": 3})
        (folder / "config.json").unlink()
    return [*files_of(folder / "parameters", "*"), folder / "export.json", folder / "model.json"]


def read_export(folder: Path) -> Any:
    from psp_jax import api

    model = api.load(folder)
    return model.variables, model.step


def make_bundle(folder: Path) -> list[Path]:
    import jax
    import jax.numpy as jnp

    from psp_jax import bundle, replay
    from psp_jax.checkpoint import Checkpoints

    if not (folder / "checkpoints" / "4").exists():
        make_workdir(folder)
        (folder / "checkpoints" / "something").unlink()
        (folder / bundle.STEP).write_text(json.dumps({"step": 5, "images": ["one", "two"]}))
        image, label = np.full((2, 41, 41, 3), 9.0, np.float32), np.ones((2, 41, 41), np.int32)
        np.savez(folder / bundle.BATCH, image=image, label=label)
        *_, like = replay.begin(replay.open_bundle(folder))
        with contextlib.closing(Checkpoints(folder / "checkpoints", keep_latest=1)) as checkpoints:
            fill = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), like)
            checkpoints.save(4, fill, None)
    return files_of(folder, "*")


def read_bundle(folder: Path) -> Any:
    """Read all that the step is taken with; what the step then finds is no matter of the files."""
    from psp_jax import replay

    bundle = replay.open_bundle(folder)
    *_, like = replay.begin(bundle)
    return bundle.batch, vars(replay.restore(folder, bundle, like))


RUNS = {
    "workdir": Target(make_workdir, read_workdir, 2, names=folder_name),
    "config": Target(make_config, read_config, 2, names=config_names),
    "checkpoint": Target(make_checkpoint, read_checkpoint, 2, exact=("*",), names=folder_name),
    "tally": Target(make_tally, read_tally, exact=("*",)),
    "export": Target(make_export, read_export, 2, exact=("parameters/*",), names=folder_name),
    "bundle": Target(make_bundle, read_bundle, 2, exact=("batch.npz", "checkpoints/*"), names=folder_name),
}
