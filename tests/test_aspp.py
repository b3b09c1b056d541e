"""DeepLabV3's head: its branches, rates and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import count, small_model

from psp_jax.config import defaults
from psp_jax.models import variable_shapes
from psp_jax.models.aspp import ASPPHead


@pytest.mark.parametrize(("stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))])
def test_rates_follow_the_output_stride(stride: int, rates: tuple[int, ...]) -> None:
    assert small_model(head="aspp", output_stride=stride).head.rates == rates


def test_parameter_count() -> None:
    """The head of mmsegmentation's deeplabv3_r50-d8, counted by hand: each batch norm has 2 x 512."""
    settings = defaults().model
    settings.head = "aspp"
    head = variable_shapes(settings, 150)["params"]["head"]
    branches = 2 * 2048 * 512 + 3 * 9 * 2048 * 512
    assert count(head) == branches + 9 * 5 * 512 * 512 + 6 * 2 * 512 + 513 * 150


def test_against_a_direct_computation() -> None:
    """Value by value in NumPy float64: taps at the rate's distance, the image's mean everywhere, then the fusion."""
    head = ASPPHead(num_classes=3, channels=4, rates=(1, 2))
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 6, 7)))
    variables = head.init(jax.random.key(1), x, train=True)
    rng = np.random.default_rng(2)
    variables = jax.tree.map(lambda v: v + rng.uniform(0, 0.5, v.shape).astype(np.float32), variables)
    params, stats = variables["params"], variables["batch_stats"]

    def conv_bn(name: str, x: np.ndarray, rate: int = 1) -> np.ndarray:
        kernel = np.asarray(params[name]["conv"]["kernel"], np.float64)
        pad = rate * (kernel.shape[0] // 2)
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        height, width = x.shape[1:3]
        y = sum(
            padded[:, i * rate : i * rate + height, j * rate : j * rate + width] @ kernel[i, j]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        )
        norm, running = params[name]["bn"], stats[name]["bn"]
        y = (y - running["mean"]) / np.sqrt(running["var"] + 1e-5) * norm["scale"] + norm["bias"]
        return np.maximum(np.asarray(y, np.float64), 0)

    image = np.broadcast_to(conv_bn("image", x.mean((1, 2), keepdims=True)), (2, 5, 6, 4))
    branches = [image, conv_bn("branch0", x), conv_bn("branch1", x, 1), conv_bn("branch2", x, 2)]
    fused = conv_bn("fuse", np.concatenate(branches, -1))
    last = params["classifier"]["conv"]
    expected = fused @ np.asarray(last["kernel"], np.float64)[0, 0] + np.asarray(last["bias"])
    ours = head.apply(variables, jnp.asarray(x), train=False)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_half_the_rates_see_the_same_weights() -> None:
    """Names tell the branch, not its rate, so that a network of stride 16 can be evaluated at stride 8."""
    trees = []
    for stride in (8, 16):
        settings = defaults().model
        settings.update(depth=10, head="aspp", output_stride=stride)
        trees.append(jax.tree.map(lambda x: x.shape, variable_shapes(settings, 5)["params"]["head"]))
    assert trees[0] == trees[1]
