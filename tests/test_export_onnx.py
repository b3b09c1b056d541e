"""ONNX: the graph, every operator that it is made of, and ONNX Runtime against the live model."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Run, run_module
from jax import lax
from test_export import SMALL, assert_close, live_scores, random_images, run_documented, write_random_model

import psp_jax
from psp_jax.export import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from psp_jax.deploy import onnx_model  # noqa: E402
from psp_jax.deploy.onnx_graph import Graph, Tensor  # noqa: E402
from psp_jax.deploy.onnx_operators import ELEMENTWISE, UNARY, emit_all  # noqa: E402


def test_onnx_of_a_run(finished_run: Run, tmp_path: Path) -> None:
    flags = ("--workdir", finished_run.workdir, "--format", "onnx", "--output", tmp_path / "out")
    done = run_module("psp_jax.export", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "export.json").read_text())["largest_relative_difference"] < 1e-4

    path = tmp_path / "out" / onnx_model.FILE
    graph_model = onnx.load(path)
    onnx.checker.check_model(graph_model, full_check=True)
    assert [(opset.domain, opset.version) for opset in graph_model.opset_import] == [("", 17)]
    count = Counter(node.op_type for node in graph_model.graph.node)
    # Folded: a convolution with its bias for each of 3 + 4 * 2 + 3 in the backbone, 4 + 1 + 1 in the head.
    assert count["Conv"] == 20
    assert all(len(node.input) == 3 for node in graph_model.graph.node if node.op_type == "Conv")
    moving = {"Concat", "Slice", "Transpose", "MaxPool", "MatMul"}
    assert set(count) == {"Sub", "Div", "Conv", "Relu", "Add", "ArgMax", "Cast"} | moving
    assert count["Add"] == 4  # the residual blocks
    assert count["Transpose"] == 2  # of the image and of the logits
    model = psp_jax.load(finished_run.workdir)
    used = {k: v for k, v in model.variables["params"].items() if k != "aux_head"}
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(used))
    assert 0.95 * parameters < path.stat().st_size < parameters + 40_000
    metadata = {entry.key: json.loads(entry.value) for entry in graph_model.metadata_props}
    assert metadata["classes"]["names"] == ["red", "green", "blue"]
    assert metadata["mean"] == list(model.card.mean)

    images = random_images(3, (41, 41))
    logits, labels = run_documented(onnx_model.__doc__ or "", tmp_path / "out", images, tmp_path)
    assert_close(logits, live_scores(model, images))
    np.testing.assert_array_equal(labels, logits.argmax(-1))
    assert labels.dtype == np.uint8


@pytest.mark.parametrize(
    ("settings", "fold_bn"),
    [
        ({"depth": 50, "stem": "7x7", "align_corners": False, "output_stride": 16, "bins": (1, 2)}, None),
        ({"pool": "max", "bins": (1, 3), "stem": "64-64-128"}, None),
        ({"head": "fcn", "output_stride": 32, "align_corners": False, "remat": True}, False),
        ({"reduce": False, "dtype": "bfloat16", "aux_head": False}, False),
        ({"head": "fcn", "fcn_convs": 2, "fcn_concat": True}, None),
        ({"head": "aspp", "align_corners": False}, None),
        ({"head": "enc", "codewords": 5}, None),
        ({"head": "enc", "lateral": True, "align_corners": False}, False),
    ],
    ids=[
        "bottlenecks",
        "max pool",
        "fcn, not folded",
        "bfloat16, not folded",
        "fcn of three convolutions",
        "aspp",
        "enc",
        "enc with lateral connections, not folded",
    ],
)
def test_onnx_of_every_kind_of_network(settings: dict[str, Any], fold_bn: bool | None, tmp_path: Path) -> None:
    size = (48, 64) if settings.get("align_corners") is False else (49, 65)
    model = write_random_model(tmp_path / "in", size, **(SMALL | settings))
    difference = export(tmp_path / "in", tmp_path / "out", form="onnx", fold_bn=fold_bn)
    assert difference is not None
    assert difference < 1e-5
    nodes = onnx.load(tmp_path / "out" / onnx_model.FILE).graph.node
    needed = {name for node in nodes for name in node.input} | {"logits", "labels"}
    assert all(node.output[0] in needed for node in nodes)
    if settings.get("dtype") != "bfloat16":
        images = random_images(2, size)
        assert_close(onnx_model.run_onnx(tmp_path / "out", images), live_scores(model, images))


def run_in_onnx(function: Callable[..., Any], *inputs: np.ndarray) -> np.ndarray:
    """Run a JAX function of arrays as an ONNX graph whose inputs have any batch."""
    scope = jax.export.SymbolicScope()
    shapes = [jax.export.symbolic_shape(", ".join(["b", *map(str, x.shape[1:])]), scope=scope) for x in inputs]
    specs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, inputs, strict=True)]
    graph = Graph()
    names = [f"input{i}" for i in range(len(inputs))]
    starts = [Tensor(name, tuple(range(x.ndim))) for name, x in zip(names, inputs, strict=True)]
    (result,) = emit_all(graph, jax.jit(function).trace(*specs).jaxpr, [*starts])
    assert isinstance(result, Tensor)
    output = graph.arranged(result, range(len(result.order)))
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", *x.shape[1:]])
        for name, x in zip(names, inputs, strict=True)
    ]
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(function(*inputs)).dtype)
    described = onnx.helper.make_tensor_value_info(output, dtype, [None] * len(result.order))
    model = graph.model(infos, [described], {})
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


X = np.random.default_rng(0).uniform(0.5, 2, (2, 5, 7, 3)).astype(np.float32)
MATRIX = np.random.default_rng(1).standard_normal((4, 7)).astype(np.float32)
KERNEL = np.random.default_rng(2).standard_normal((3, 2, 1, 6)).astype(np.float32)


@pytest.mark.parametrize("primitive", sorted(ELEMENTWISE))
def test_elementwise_operators(primitive: str) -> None:
    function = getattr(lax, primitive)
    operands = [X, X[::-1].copy()]
    np.testing.assert_allclose(run_in_onnx(function, *operands), function(*operands), rtol=1e-5)


@pytest.mark.parametrize("primitive", [*sorted(UNARY), "square", "stop_gradient"])
def test_operators_of_one_operand(primitive: str) -> None:
    function = getattr(lax, primitive)
    np.testing.assert_allclose(run_in_onnx(lambda x: function(x - 1), X), function(X - 1), rtol=1e-5, atol=1e-6)


NHWC = ("NHWC", "HWIO", "NHWC")
MOVING: dict[str, Callable[[Any], Any]] = {
    "rows": lambda x: jnp.einsum("nh,bhwc->bnwc", np.ones((4, 5), np.float32), x),
    "columns": lambda x: jnp.einsum("nw,bhwc->bhnc", MATRIX, x),
    "channels": lambda x: jnp.einsum("bhwc,nc->bnhw", x, MATRIX[:, :3]),
    "channels, matrix transposed": lambda x: jnp.einsum("bhwc,cn->bhwn", x, MATRIX[:3]) - 1.5,
    "concatenate": lambda x: jnp.concatenate([x, lax.slice_in_dim(x.transpose(0, 2, 1, 3), 0, 5, axis=1)], axis=2),
    "slice": lambda x: lax.slice(x, (0, 1, 0, 0), (x.shape[0], 5, 7, 3), (1, 2, 3, 1)).max(2, keepdims=True),
    "max": lambda x: x.max((1, 3)).transpose(1, 0) * 2.0,
    "sum": lambda x: x.transpose(0, 2, 1, 3).sum((1, 3)).transpose(1, 0) * 2.0,
    "product of two": lambda x: jnp.einsum("bhwc,bdhw->bdc", x, x.transpose(0, 3, 1, 2) - 1.0),
    "product with a constant of three axes": lambda x: jnp.einsum(
        "bhwc,wcn->bnh", x, np.stack([MATRIX.T[:, :3]] * 2, 2)
    ),
    "softmax": lambda x: jax.nn.softmax(x.transpose(0, 3, 1, 2), axis=1),
    "argmax": lambda x: x.transpose(0, 3, 1, 2).argmax(1).astype(jnp.uint8),
    "pool": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 0), (0, 1), (0, 0))
    ),
    "relu": lambda x: jax.nn.relu(x - 1) + np.arange(3, dtype=np.float32),
    "grouped convolution": lambda x: lax.conv_general_dilated(
        x, KERNEL, (2, 1), ((2, 1), (0, 3)), rhs_dilation=(2, 1), feature_group_count=3, dimension_numbers=NHWC
    ),
}


@pytest.mark.parametrize("function", MOVING.values(), ids=MOVING.keys())
def test_operators_that_move_axes(function: Callable[[Any], Any]) -> None:
    expected = np.asarray(function(X))
    ours = run_in_onnx(function, X)
    assert ours.dtype == expected.dtype
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.cumsum(x, 1), "no operator for cumsum .*export stablehlo instead"),
        (lambda x: jnp.broadcast_to(x, (4, *x.shape)), "no operator for broadcast_in_dim with shapes"),
    ],
)
def test_unknown_primitives_are_named(function: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_in_onnx(function, X)


def test_biases_merge_only_where_the_convolution_has_no_other_use() -> None:
    kernel, bias = np.ones((1, 1, 3, 3), np.float32), np.arange(3, dtype=np.float32)

    def function(x: Any) -> Any:
        y = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y + bias) * y

    graph = Graph()
    spec = jax.ShapeDtypeStruct(X.shape, X.dtype)
    emit_all(graph, jax.jit(function).trace(spec).jaxpr, [Tensor("x", (0, 1, 2, 3))])
    before = [node.op_type for node in graph.nodes]
    graph.merge_biases()
    assert [node.op_type for node in graph.nodes] == before == ["Transpose", "Conv", "Add", "Mul"]
