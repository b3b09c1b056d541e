"""A model as one ONNX file, which ONNX Runtime and other runtimes run.

import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("DIR/model.onnx")
image = np.zeros([1, *session.get_inputs()[0].shape[1:]], np.float32)  # RGB, 0 to 255
logits, labels = session.run(None, {"image": image})
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]

from psp_jax.deploy.onnx_graph import Constant, Graph, Tensor, Value
from psp_jax.deploy.onnx_operators import emit_all
from psp_jax.deploy.program import abstract_image, make_program, signature
from psp_jax.workdir import ModelCard

FILE = "model.onnx"


def write_onnx(directory: Path, card: ModelCard, variables: Any, size: tuple[int, int]) -> None:
    """Trace the program, write it as ONNX with the parameters inside, and check it by ONNX's own rules.

    The graph is made from the traced JAX program: each primitive becomes a standard operator, with [B, C, H, W] between
    the convolutions. Adaptive pooling and resizing are products with constant matrices.

    Raises:
      ValueError: the network holds a primitive that has no operator here.
    """
    traced = jax.jit(make_program(card, size)).trace(variables, abstract_image(size))
    graph = Graph()
    parameters = [
        Constant(np.asarray(value), jax.tree_util.keystr(path, simple=True, separator="."))
        for path, value in jax.tree_util.tree_leaves_with_path(variables)
    ]
    results = emit_all(graph, traced.jaxpr, [*parameters, Tensor("image", (0, 1, 2, 3))])
    graph.merge_biases()
    described = signature(card, size)
    for result, output in zip(results, described["outputs"], strict=True):
        graph.rename(_in_jax_order(graph, result), output["name"])
    graph.drop_unused([output["name"] for output in described["outputs"]])
    inputs, outputs = ([_value_info(v) for v in values] for values in ([described["input"]], described["outputs"]))
    metadata = {key: json.dumps(described[key]) for key in ("classes", "mean", "std")}
    path = directory / FILE
    onnx.save(graph.model(inputs, outputs, metadata), path)
    onnx.checker.check_model(path, full_check=True)


def run_onnx(directory: Path, image: np.ndarray) -> np.ndarray:
    """Return ONNX Runtime's logits f32 [B, H, W, C] of the written model on the CPU for `image` f32 [B, H, W, 3]."""
    session = onnxruntime.InferenceSession(directory / FILE, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image})[0]


def _in_jax_order(graph: Graph, value: Value) -> str:
    assert isinstance(value, Tensor)
    return graph.arranged(value, range(len(value.order)))


def _value_info(described: dict[str, Any]) -> onnx.ValueInfoProto:
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(described["dtype"]))
    return onnx.helper.make_tensor_value_info(described["name"], dtype, described["shape"])
