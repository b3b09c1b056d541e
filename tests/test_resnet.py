"""What the weights of other sources need of the residual networks: where they stride, and what they dilate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import settings_of

from psp_jax.models import check_model
from psp_jax.models.resnet import Bottleneck, ResNet
from psp_jax.weights.architecture import CONVENTIONS


def three_by_three(model: ResNet) -> list[tuple[int, int]]:
    """Return (stride, dilation) of each 3x3 convolution of the stages that are dilated, in order."""
    image = jax.ShapeDtypeStruct((1, 65, 65, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    program = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, image)
    convolutions = [e for e in program.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    found = [
        (e.params["window_strides"][0], e.params["rhs_dilation"][0])
        for e in convolutions
        if e.invars[1].aval.shape[:2] == (3, 3)
    ]
    return found[-8:] if model.depth == 18 else found[-9:]


def test_basic_blocks_of_mmsegmentation() -> None:
    """Its BasicBlock dilates the first convolution only, and its ResLayer halves that of a stage's first block."""
    fields = {field: CONVENTIONS["mmseg"][field] for field in ("first_block_dilation", "basic_dilation")}
    found = three_by_three(ResNet(depth=18, width=4, **fields))
    assert found == [(1, 1), (1, 1), (1, 2), (1, 1), (1, 2), (1, 1), (1, 4), (1, 1)]
    both = three_by_three(ResNet(depth=18, width=4))
    assert both == [(1, 2)] * 4 + [(1, 4)] * 4


def test_bottlenecks_of_semseg_and_mmsegmentation() -> None:
    assert three_by_three(ResNet(depth=50, width=4)) == [(1, 2)] * 6 + [(1, 4)] * 3
    contracted = three_by_three(ResNet(depth=50, width=4, first_block_dilation="contracted"))
    assert contracted == [(1, 1)] + [(1, 2)] * 5 + [(1, 2)] + [(1, 4)] * 2


def evaluated(block: Bottleneck, variables: dict, *inputs: jax.Array) -> jax.Array:
    return jax.jit(lambda v, *x: block.apply(v, x[0], False, *x[1:]))(variables, *inputs)


def test_a_stride_in_the_first_convolution_drops_every_other_position_before_it() -> None:
    image = jax.random.normal(jax.random.key(0), (2, 9, 11, 8))
    strided, dense = Bottleneck(4, stride=2, stride_in="1x1"), Bottleneck(4)
    variables = jax.jit(lambda key: strided.init(key, image, train=False))(jax.random.key(1))
    found = evaluated(strided, variables, image)
    np.testing.assert_allclose(found, evaluated(dense, variables, image[:, ::2, ::2]), atol=1e-6)
    usual = evaluated(Bottleneck(4, stride=2), variables, image)
    assert usual.shape == found.shape
    assert np.abs(usual - found).max() > 0.1


def test_a_stride_in_the_first_convolution_keeps_what_lies_beyond_an_image_out() -> None:
    image = jax.random.normal(jax.random.key(0), (1, 12, 12, 16))
    block = Bottleneck(4, stride=2, stride_in="1x1")
    variables = jax.jit(lambda key: block.init(key, image, train=False))(jax.random.key(1))
    variables["params"] = jax.tree.map(lambda x: x + 0.1, variables["params"])  # so that zero is not neutral
    cut = jnp.pad(image[:, :7, :9], ((0, 0), (0, 5), (0, 3), (0, 0)))
    found, alone = evaluated(block, variables, cut, jnp.array([[7, 9]])), evaluated(block, variables, image[:, :7, :9])
    np.testing.assert_allclose(found[:, :4, :5], alone, atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("stride_in", "7x7"), ("basic_dilation", "second")])
def test_unknown_values_are_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"model.{field}='{value}' is unknown; choose one of"):
        check_model(settings_of(**{field: value}))
