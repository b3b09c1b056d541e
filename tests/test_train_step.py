"""A training step: its running mean of the parameters, against NumPy, and the steps that change nothing."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from psp_jax import classes, parallel
from psp_jax.checkpoint import Checkpoints
from psp_jax.config import defaults, plain
from psp_jax.models.batch_norm import BatchNorm
from psp_jax.replay import Looks, begin, open_bundle, restore
from psp_jax.train_step import StepFunction, TrainState, _packed, _unpacked, create_state, make_train_step
from psp_jax.workdir import ModelCard

SGD = optax.sgd(0.5)


class Pixelwise(nn.Module):
    """The smallest network that a training step takes."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, valid: None = None) -> dict[str, jax.Array]:
        return {"logits": nn.Dense(3)(BatchNorm()(x, train))}


def start(average: bool, optimizer: optax.GradientTransformation = SGD) -> tuple[TrainState, StepFunction]:
    model = Pixelwise()
    state = create_state(model, optimizer, 0, parallel.make_mesh(devices=jax.devices()[:1]), average)
    step_fn = make_train_step(
        model,
        optimizer,
        mean=(128.0,) * 3,
        std=(64.0,) * 3,
        aux_weight=0.0,
        align_corners=False,
        ignore_label=255,
        dropout_seed=0,
        ema_decay=0.3,
    )
    return state, jax.jit(step_fn, donate_argnums=0)


def batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "image": rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8),
        "label": rng.integers(0, 3, (2, 8, 8)).astype(np.uint8),
    }


def test_running_mean_of_the_parameters() -> None:
    """It begins with the first parameters, keeps 1/10, 2/11, 3/12 and then 0.3 of itself, and changes nothing."""
    (state, step_fn), (plain, _) = start(True), start(False)
    assert plain.averaged is None
    expected: Any = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, state.averaged, expected)
    for step, kept in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        state, _ = step_fn(state, batch(step))
        plain, _ = step_fn(plain, batch(step))
        new = jax.device_get(state.params)
        expected = jax.tree.map(lambda mean, x, kept=kept: kept * mean + (1 - kept) * x, expected, new)
        jax.tree.map(
            lambda ours, x: np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-7), state.averaged, expected
        )
        jax.tree.map(np.testing.assert_array_equal, plain.params, new)
    assert plain.variables["params"] is plain.params
    assert state.variables == {"params": state.averaged, "batch_stats": state.batch_stats}
    assert jnp.abs(state.averaged["Dense_0"]["kernel"] - state.params["Dense_0"]["kernel"]).max() > 1e-4


def broken(state: TrainState, what: str) -> TrainState:
    """The state with a parameter, or the running mean, that is not finite."""
    return state.replace(**{what: jax.tree.map(lambda x: x.at[..., 0].set(jnp.inf), getattr(state, what))})


@pytest.mark.parametrize("what", ["params", "averaged"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(what: str) -> None:
    state, step_fn = start(True)
    state, _ = step_fn(state, batch(0))
    state = broken(state, what)
    before = jax.device_get(state)
    state, metrics = step_fn(state, batch(1))
    assert (metrics["skipped"], state.step) == (1, before.step + 1)
    assert np.isfinite(metrics["loss"]) == (what == "averaged") and not np.isfinite(metrics["state_norm"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state).replace(step=before.step), before)


def test_labels_that_are_no_class_are_counted_and_their_step_changes_nothing() -> None:
    state, step_fn = start(False)
    sound = batch(0)
    before = jax.device_get(state)
    label = np.array(sound["label"])
    label[0, :2, :3], label[1, 0, 0] = 3, 254
    state, metrics = step_fn(state, sound | {"label": label})
    assert (metrics["invalid_labels"], metrics["skipped"], np.isfinite(metrics["loss"])) == (7, 1, True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state).replace(step=before.step), before)
    label[0, :2, :3], label[1, 0, 0] = 2, 255
    state, metrics = step_fn(state, sound | {"label": label})
    assert (metrics["invalid_labels"], metrics["skipped"]) == (0, 0)


def test_steps_after_a_skipped_one_are_those_without_it() -> None:
    """Without dropout, which is a function of the step, and without a running mean, whose decay is."""
    (state, step_fn), (plain, _) = start(False), start(False)
    weights = jax.device_get(state.params)
    state, metrics = step_fn(state, batch(0))
    plain, _ = step_fn(plain, batch(0))
    assert metrics["skipped"] == 0
    bad = batch(1) | {"image": np.full((2, 8, 8, 3), np.nan, np.float32)}
    state, metrics = step_fn(state, bad)
    assert metrics["skipped"] == 1 and np.isnan(metrics["loss"]) and np.isnan(metrics["grad_norm"])
    (state, _), (plain, _) = step_fn(state, batch(2)), step_fn(plain, batch(2))
    assert (state.step, plain.step) == (3, 2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.variables), jax.device_get(plain.variables))
    assert not np.array_equal(state.params["Dense_0"]["kernel"], weights["Dense_0"]["kernel"])


def test_a_replayed_step_tells_which_layers_and_gradients_are_not_finite() -> None:
    """Batch norm comes before the bias that is broken: its output is finite, and no gradient is."""
    for broken_bias in (False, True):
        looks = Looks()
        state, step_fn = start(False, looks.gradients(SGD))
        names = ["BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_0/kernel"]
        if broken_bias:
            state.params["Dense_0"]["bias"] = jnp.full((3,), jnp.nan)
        with nn.intercept_methods(looks.layer):
            step_fn(state, batch(0))
        layers, gradients = (["Dense_0", "the network"], names) if broken_bias else ([], [])
        assert looks.told() == {"layers, from the image on": layers, "gradients": gradients}


def test_vectors_are_packed_and_unpacked() -> None:
    tree = {"bias": jnp.arange(3.0), "kernel": jnp.ones((2, 3)), "count": jnp.zeros((), jnp.int32)}
    tree |= {"scale": jnp.arange(5.0), "ids": jnp.arange(2)}
    packed = _packed(tree)
    assert sorted(x.shape for x in packed) == [(), (2,), (2, 3), (8,)]
    doubled = jax.tree.map(lambda x: 2 * x, tree)
    jax.tree.map(np.testing.assert_array_equal, _unpacked([2 * x for x in packed], tree), doubled)
    alone = {"kernel": jnp.ones((2, 3))}
    assert _unpacked(_packed(alone), alone)["kernel"].shape == (2, 3)


def bundle_of(folder: Path) -> dict[str, Any]:
    """Write all of a bundle but its checkpoint, and return the values of its .json files by name."""
    config = defaults()
    config.model.update(depth=10, width=8, stem="32-32-64", head_channels=16, aux_channels=8)
    config.train.update(steps=12, batch_size=2, crop_size=(41, 41))
    settings = plain(config)
    table = classes.get("camvid")
    ModelCard(settings["model"], table, (1.0,) * 3, (1.0,) * 3, (41, 41), (41, 41), 512).write(folder)
    values = {
        "config.json": {"config": settings, "resolved": {"steps": 12, "class_weights": [1.0] * 11}},
        "step.json": {"step": 5, "images": ["one", "two"]},
        "model.json": json.loads((folder / "model.json").read_text()),
    }
    for name, value in values.items():
        (folder / name).write_text(json.dumps(value))
    np.savez(folder / "batch.npz", image=np.zeros((2, 41, 41, 3), np.float32), label=np.ones((2, 41, 41), np.int32))
    return values


def test_a_damaged_bundle_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no batch\.npz; give the folder"):
        open_bundle(tmp_path)
    values = bundle_of(tmp_path)
    assert (open_bundle(tmp_path).step, open_bundle(tmp_path).pixel_loss.class_weights) == (5, (1.0,) * 11)
    sound = {name: (tmp_path / name).read_bytes() for name in (*values, "batch.npz")}
    record, other = values["config.json"], io.BytesIO()
    np.savez(other, image=np.zeros((2, 41, 40, 3), np.float32), label=np.ones((2, 41, 41), np.int32))

    def changed(section: str, **fields: Any) -> bytes:
        config = record["config"] | {section: record["config"][section] | fields}
        return json.dumps(record | {"config": config}).encode()

    for name, broken_file in (
        ("batch.npz", sound["batch.npz"][:200]),
        ("batch.npz", sound["batch.npz"].replace(b"label", b"lapel")),
        ("batch.npz", other.getvalue()),
        ("step.json", b"{}"),
        ("step.json", b'{"step": [], "images": []}'),
        ("step.json", b'{"step": 13, "images": []}'),
        ("step.json", b'{"step": 5, "images": [5]}'),
        ("config.json", b"[]"),
        ("config.json", b'{"config": {}}'),
        ("config.json", b"{"),
        ("config.json", changed("model", width=16)),
        ("config.json", changed("train", batch_size=2**40)),
        ("config.json", changed("optimizer", momentum="much")),
        ("config.json", json.dumps(record | {"resolved": {"steps": 12, "class_weights": [1.0] * 10}}).encode()),
        ("config.json", json.dumps(record | {"resolved": {"steps": "12", "class_weights": []}}).encode()),
        ("model.json", b"{}"),
        ("model.json", sound["model.json"].replace(b'"width": 8', b'"width": 9')),
    ):
        for file, content in (sound | {name: broken_file}).items():
            (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{tmp_path} is damaged .*; copy it anew from its run"):
            open_bundle(tmp_path)


def test_a_bundle_with_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    bundle_of(tmp_path)
    bundle = open_bundle(tmp_path)
    *_, like = begin(bundle)
    with pytest.raises(ValueError, match=r"checkpoints does not hold the state of step 4 whole; copy .* anew"):
        restore(tmp_path, bundle, like)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_latest=1)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    checkpoints.save(4, state, None)
    checkpoints.close()
    assert restore(tmp_path, bundle, like).step == 0
    other = like.replace(opt_state=())
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/checkpoints is not of the run in config\.json \(.{{10,330}}\); co"
    ):
        restore(tmp_path, bundle, other)
