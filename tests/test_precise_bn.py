"""Batch-norm statistics over training batches: the first layer's against NumPy, all layers' by what they make."""

from typing import Any

import jax
import numpy as np
import pytest

from psp_jax import parallel
from psp_jax.classes import ClassTable
from psp_jax.config import defaults
from psp_jax.data.pipeline import train_batches
from psp_jax.data.transforms import AugmentSettings
from psp_jax.models import build_model
from psp_jax.precise_bn import make_statistics
from psp_jax.progress import track
from psp_jax.workdir import ModelCard

SIDE, BATCH = 48, 8
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)


class Noise:
    """Thirty images of noise, each around a colour of its own."""

    max_size = (50, 60)

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        image = rng.normal(rng.uniform(0, 255, 3), 40, (50, 60, 3)).clip(0, 255).astype(np.uint8)
        return {"image": image, "label": rng.integers(0, 3, (50, 60)).astype(np.uint8), "id": str(index)}

    def ids(self, index: int) -> str:
        return str(index)


def estimate(number: int, spatial: int, **settings: Any) -> tuple[Any, Any, Any, np.ndarray]:
    """A tiny network, its parameters, their statistics over `number` batches on eight devices, and those images."""
    config = defaults()
    config.model.update(depth=10, width=8, stem="7x7", head_channels=8, aux_channels=8, align_corners=False)
    config.model.update(dropout=0.0, **settings)
    config.train.update(batch_size=BATCH, crop_size=(SIDE,))
    config.eval.precise_bn_batches = number
    config.data.num_workers = 0
    classes = ClassTable.from_dict({"name": "noise", "names": ["a", "b", "c"]})
    card = ModelCard(config.model.to_dict(), classes, MEAN, STD, (SIDE, SIDE), (SIDE, SIDE), 64)
    model = build_model(card.model, 3)
    init = jax.jit(lambda key: model.init(key, np.zeros((2, SIDE, SIDE, 3), np.float32), train=True))
    params = init(jax.random.key(0))["params"]
    found = make_statistics(config, card, parallel.make_mesh(-1, spatial), Noise(), track)(params)
    options = {"crop_size": (SIDE, SIDE), "batch_size": BATCH, "seed": config.seed, "num_steps": number}
    batches = train_batches(Noise(), **options, augment=AugmentSettings(**config.augment))
    images = np.concatenate([batch["image"] for batch in batches]).astype(np.float64)
    return model, params, found, (images - MEAN) / STD


def test_first_layer_is_that_of_all_batches_together() -> None:
    _, params, found, images = estimate(3, 2)
    assert len(images) == 3 * BATCH
    kernel = np.asarray(params["backbone"]["stem1"]["conv"]["kernel"], np.float64)  # 7x7, stride 2
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), (1, 2))[:, ::2, ::2]  # [B, h, w, C, 7, 7]
    features = np.einsum("bhwcij,ijcf->bhwf", windows, kernel, optimize=True)
    layer = found["backbone"]["stem1"]["bn"]
    np.testing.assert_allclose(layer["mean"], features.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer["var"], features.var((0, 1, 2)), rtol=1e-4)
    each = features.reshape(3, -1, features.shape[-1]).var(1).mean(0)
    assert np.max(layer["var"] / each) > 1.001  # the batches differ, which a mean of their variances would not show


@pytest.mark.parametrize("settings", [{"remat": True}, {"head": "enc", "lateral": True}], ids=["psp", "enc"])
def test_one_batch_evaluated_is_that_batch_in_training(settings: dict[str, Any]) -> None:
    """The statistics have every layer, in its place: with them, evaluation normalises as training does."""
    model, params, found, images = estimate(1, 1, **settings)
    variables, images = {"params": params, "batch_stats": jax.device_get(found)}, images.astype(np.float32)
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    trained, updates = apply(variables, images, train=True, mutable=("batch_stats",))
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    evaluated = apply(variables, images, train=False)["logits"]
    error = np.linalg.norm(evaluated - trained["logits"]) / np.linalg.norm(trained["logits"])
    assert error < 1e-4
