"""The network and its training against outputs of hszhao/semseg, computed in float64 for deterministic weights."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.config import defaults
from psp_jax.interpolation import resize
from psp_jax.models import build_model, variable_shapes
from psp_jax.optimizer import poly_schedule, sgd
from psp_jax.train_step import TrainState, make_train_step
from psp_jax.weights.tables import from_variables, names, to_variables

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the stored reference outputs are not beside this clone")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN / "pspnet50_ade20k.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup(golden: dict[str, Any], reference: Any) -> tuple[Any, Any, dict[str, Any]]:
    meta = json.loads(str(golden["meta"]))
    settings = defaults().model
    settings.dropout = 0.0
    model = build_model(settings, meta["classes"])
    shapes = variable_shapes(settings, meta["classes"])
    tensors = {name: reference.fill(name, entry.shape) for name, entry in names("semseg", settings, shapes).items()}
    return model, to_variables("semseg", tensors, settings, shapes), meta


def to_reference(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return {semseg name: tensor} of parameters, or of parameters and statistics."""
    return from_variables("semseg", variables, defaults().model)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_every_tensor_of_the_reference_is_there(golden: dict[str, Any], setup: tuple[Any, Any, Any]) -> None:
    _, variables, _ = setup
    ours = to_reference(variables)
    theirs = {
        str(name): tuple(json.loads(str(shape).replace("(", "[").replace(",)", ")").replace(")", "]")))
        for name, shape in zip(golden["state_names"], golden["state_shapes"], strict=True)
        if not str(name).endswith("num_batches_tracked")
    }
    assert {name: value.shape for name, value in ours.items()} == theirs


def test_eval_logits(golden: dict[str, Any], reference: Any, setup: tuple[Any, Any, Any]) -> None:
    model, variables, meta = setup
    image, _ = reference.batch(meta["seed"], meta["n"], meta["height"], meta["width"], meta["classes"])
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False)["logits"])(variables, image.astype(np.float32))
    full = resize(logits, (meta["height"], meta["width"]), align_corners=True)
    assert relative(np.asarray(full)[:, ::8, ::8], golden["eval_logits_every8"]) < 1e-4


def test_eight_training_steps(golden: dict[str, Any], reference: Any, setup: tuple[Any, Any, Any]) -> None:
    model, variables, meta = setup
    schedule = poly_schedule(meta["base_lr"], meta["power"], meta["steps"])
    optimizer = sgd(
        schedule,
        momentum=meta["momentum"],
        weight_decay=meta["weight_decay"],
        decay_bn_and_bias=True,
        head_lr_multiplier=meta["head_lr_multiplier"],
    )
    train_step = jax.jit(
        make_train_step(
            model,
            optimizer,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            aux_weight=meta["aux_weight"],
            align_corners=True,
            ignore_label=255,
            dropout_seed=0,
        )
    )
    params = jax.tree.map(jnp.asarray, variables["params"])
    state = TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))
    main, aux, states = [], [], []
    for step in range(meta["steps"]):
        image, label = reference.batch(meta["seed"] + step, meta["n"], meta["height"], meta["width"], meta["classes"])
        state, metrics = train_step(state, {"image": image.astype(np.float32), "label": label})
        main.append(float(metrics["main_loss"]))
        aux.append(float(metrics["aux_loss"]))
        states.append(jax.device_get(state) if step in (0, meta["steps"] - 1) else None)

    first, last = states[0], states[-1]
    for ours, key in ((np.array(main), "main_loss"), (np.array(aux), "aux_loss")):
        error = np.abs(ours / golden[key] - 1)
        assert error[0] < 1e-5, key
        assert error.max() < 2e-3, key

    # After one step from rest the momentum buffer is the gradient plus weight decay.
    buffer = first.opt_state[1].trace
    gradients = jax.tree.map(lambda v, p: v - meta["weight_decay"] * p, buffer, variables["params"])
    norms = {name: np.linalg.norm(value) for name, value in to_reference({"params": gradients}).items()}
    expected = zip(golden["grad_names"], golden["grad_norms"], strict=True)
    error = np.array([abs(norms[str(name)] / norm - 1) for name, norm in expected])
    assert np.median(error) < 1e-3
    assert error.max() < 1e-2

    stats = to_reference(first.variables)
    for name, norm in zip(golden["stat_names"], golden["stat_norms"], strict=True):
        if not str(name).endswith("num_batches_tracked"):
            assert abs(np.linalg.norm(stats[str(name)]) / norm - 1) < 1e-5, name

    after = to_reference({"params": last.params})
    for name, norm in zip(golden["param_names"], golden["param_norms_after"], strict=True):
        assert abs(np.linalg.norm(after[str(name)]) / norm - 1) < 1e-2, name
