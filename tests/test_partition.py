"""What the compiled training step exchanges between devices, where they share the rows of an image."""

import math
import re

import jax
import numpy as np
import pytest
from train_steps import CLASSES, configuration

from psp_jax import build, parallel
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model


def compiled_text(**fields: object) -> str:
    """The step for two images of 113 rows, four devices to each: every one has 32 rows, 4 of features."""
    config = configuration({"model.align_corners": True, "train.crop_size": [113], "train.batch_size": 2, **fields})
    mesh = parallel.make_mesh(2, 4)
    model = build_model(config.model, CLASSES)
    _, optimizer = build.build_optimizer(config, 10)
    step = build.build_step(config, 255, model, optimizer, mesh, PixelLoss())
    return step.lower(*build.abstract_arguments(config, model, optimizer, mesh)).compile().as_text()


@pytest.mark.parametrize(
    ("convolutions", "images"),
    [("native", 2), pytest.param("rows", 2, marks=pytest.mark.slow), pytest.param("rows", 4, marks=pytest.mark.slow)],
)
def test_no_map_is_gathered(convolutions: str, images: int) -> None:
    """Halo rows move and parameters are gathered, but nothing of a map, be it the class scores."""
    text = compiled_text(**{"model.convolutions": convolutions, "train.batch_size": images})
    assert "collective-permute" in text
    assert not re.search(r" all-to-all(-start)?\(", text)
    gathered = re.findall(r"(?:f32|bf16|u8|s32)\[([\d,]+)\]\S* all-gather\(.*dimensions=\{(\d)\}", text)
    assert gathered
    # Along the batch or the rows; kernels [k, k, C, D] are cut along their channels.
    assert not [shape for shape, axis in gathered if shape.count(",") == 3 and axis in "01"]
    # Rows of several images that are spread over the same devices are no batch without being gathered.
    assert ("convolve/stack" in text) == ((convolutions, images) == ("rows", 2))
    # Each device holds a share of the parameters.
    assert [shape for shape, axis in gathered if shape.startswith("3,3,") and axis in "23"]


def test_parameters_and_optimizer_are_shared_out() -> None:
    """Each device holds an eighth of every kernel that divides, of its momentum and of its running mean."""
    config = configuration({"train.ema_decay": 0.9})
    mesh = parallel.make_mesh()
    model = build_model(config.model, CLASSES)
    _, optimizer = build.build_optimizer(config, 10)
    state, _ = build.abstract_arguments(config, model, optimizer, mesh)

    def elements(tree: object, whole: bool) -> int:
        shapes = [x.shape if whole else x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree) if x.ndim == 4]
        return sum(map(math.prod, shapes))

    for tree in (state.params, state.opt_state, state.averaged):
        assert 1 / 8 <= elements(tree, False) / elements(tree, True) < 1 / 8 + 0.02


def test_shares_of_the_batch() -> None:
    """One process feeds all of it, however its devices are arranged; rows of devices stay neighbours."""
    mesh = parallel.make_mesh(2, 4)
    assert [[device.id for device in row] for row in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert parallel.share(parallel.batch_axis_sharding(mesh)) == (0, 1)
    assert parallel.share(parallel.all_devices_sharding(mesh)) == (0, 1)
    rows = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(parallel.to_global({"x": rows}, parallel.batch_axis_sharding(mesh))["x"], rows)


@pytest.mark.parametrize(("rows", "spatial", "expected"), [(473, 1, None), (473, 4, 480), (473, 8, 512), (64, 2, 64)])
def test_rows_are_added_until_every_map_divides(rows: int, spatial: int, expected: int | None) -> None:
    split = parallel.split_rows(parallel.make_mesh(-1, spatial), 16, rows, 8)
    assert (split and split.rows) == expected
