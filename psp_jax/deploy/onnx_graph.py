"""A growing ONNX graph whose values remember the order of their axes, so that few transpositions are left in it."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

# Old enough for the runtimes in use, new enough for every operator here; IR 8 is what came with it.
OPSET = 17
IR_VERSION = 8


@dataclass(frozen=True)
class Constant:
    """A value known while exporting; `name` is the parameter that it comes from, if it does."""

    array: np.ndarray
    name: str = ""


@dataclass(frozen=True)
class Tensor:
    """A computed value.

    Attributes:
      name: in the ONNX graph.
      order: order[k] is the JAX axis that its k-th ONNX axis holds: (0, 3, 1, 2) where JAX's [B, H, W, C] is stored as
        [B, C, H, W].
    """

    name: str
    order: tuple[int, ...]


Value = Constant | Tensor


class Graph:
    """Nodes and constants, in the order of the computation."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._transposed: dict[tuple[str, tuple[int, ...]], str] = {}
        self._number = itertools.count()  # of nodes ever made: some go again

    def add(self, operator: str, inputs: Sequence[str], order: Sequence[int], **attributes: Any) -> Tensor:
        """Append a node and return its one output."""
        name = f"{operator.lower()}_{next(self._number)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return Tensor(name, tuple(order))

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """Add a constant and return its name; two of one name get numbers."""
        name = name or "constant"
        if name in self.constants:
            name = f"{name}_{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(array)
        return name

    def arranged(self, value: Value, order: Sequence[int]) -> str:
        """Return the name of `value` with its axes in this order; constants without axes stay as they are."""
        order = tuple(order)
        if isinstance(value, Constant):
            array = value.array
            return self.constant(array.transpose(order) if array.ndim else array, value.name)
        if value.order == order:
            return value.name
        key = (value.name, order)
        if key not in self._transposed:
            perm = [value.order.index(axis) for axis in order]
            self._transposed[key] = self.add("Transpose", [value.name], order, perm=perm).name
        return self._transposed[key]

    def merge_biases(self) -> None:
        """Make a constant that is added to a convolution's output, one number a channel, the convolution's bias."""
        uses = Counter(name for node in self.nodes for name in node.input)
        convolutions = {node.output[0]: node for node in self.nodes if node.op_type == "Conv" and len(node.input) == 2}
        kept = []
        for node in self.nodes:
            source = convolutions.get(node.input[0])
            bias = self.constants.get(node.input[-1])
            if node.op_type == "Add" and source and bias is not None and uses[node.input[0]] == 1:
                channels = self.constants[source.input[1]].shape[0]
                if bias.shape == (1, channels, 1, 1):
                    self.constants[node.input[1]] = bias.reshape(channels)
                    source.input.append(node.input[1])
                    source.output[0] = node.output[0]
                    continue
            kept.append(node)
        self.nodes = kept

    def rename(self, old: str, new: str) -> None:
        """Give a computed value another name."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new

    def drop_unused(self, outputs: Sequence[str]) -> None:
        """Leave out the nodes that no output needs, such as EncNet's scores of the classes present."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if node.output[0] in needed:
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]

    def model(
        self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto], metadata: dict[str, str]
    ) -> ModelProto:
        """Return the finished model; constants that no node uses are left out."""
        used = {name for node in self.nodes for name in node.input}
        weights = [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in used]
        graph = helper.make_graph(self.nodes, "psp_jax", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="psp_jax")
        helper.set_model_props(model, metadata)
        return model
