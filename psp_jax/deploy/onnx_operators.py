"""ONNX operators for the JAX primitives that the networks here are made of in inference.

Written here because jax2onnx (0.17.1) drops the explicit padding of flax's max_pool, which gives other scores without
any error, and pins orbax-checkpoint below 0.11.37.
"""

import string
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from onnx import helper

from psp_jax.deploy.onnx_graph import Constant, Graph, Tensor, Value

# Primitives that only hold others, and the parameter that they hold them in.
CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
ELEMENTWISE = {
    "add": "Add",
    "div": "Div",
    "max": "Max",
    "mul": "Mul",
    "sub": "Sub",
}
UNARY = {
    "exp": "Exp",
    "logistic": "Sigmoid",
}
# The second operand that changes nothing.
NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}


def emit_all(graph: Graph, closed: ClosedJaxpr, inputs: list[Value]) -> list[Value]:
    """Add the operators of a traced function to `graph`, and return its outputs.

    What depends on constants alone is computed here and now.

    Raises:
      ValueError: a primitive that has no operator here; names it.
    """
    jaxpr = closed.jaxpr
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= zip(jaxpr.constvars, (Constant(np.asarray(c)) for c in closed.consts), strict=True)

    def read(variable: Any) -> Value:
        return Constant(np.asarray(variable.val)) if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            inner = params[CALLS[name]]
            inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            outputs = emit_all(graph, inner, operands)
        elif len(known := [operand for operand in operands if isinstance(operand, Constant)]) == len(operands):
            origin = next((constant.name for constant in known if constant.name), "")
            array = equation.primitive.bind(*(constant.array for constant in known), **params)
            outputs = [Constant(np.asarray(array), origin)]
        else:
            shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
            outputs = [_emit(graph, name, params, operands, shapes)]
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(variable) for variable in jaxpr.outvars]


def _emit(graph: Graph, name: str, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Add one primitive; `shapes` are those of the operands and of the result in JAX."""
    if name in ELEMENTWISE:
        return elementwise(graph, ELEMENTWISE[name], operands, shapes)
    if name in UNARY:
        return unary(graph, UNARY[name], operands)
    if name in OPERATORS:
        return OPERATORS[name](graph, params, operands, shapes)
    known = ", ".join(sorted([*ELEMENTWISE, *UNARY, *OPERATORS]))
    raise ValueError(f"The ONNX export has no operator for {name} (it has: {known}); export stablehlo instead.")


def refuse(name: str, what: str) -> ValueError:
    """Return the error for a known primitive with parameters that have no operator here."""
    return ValueError(f"The ONNX export has no operator for {name} with {what}; export stablehlo instead.")


def elementwise(graph: Graph, operator: str, operands: list[Value], shapes: list[Any]) -> Tensor:
    """Operate position by position, in the order of axes of the first operand that is computed."""
    first, last = operands[0], operands[-1]
    if isinstance(first, Tensor) and isinstance(last, Constant) and shapes[0] == shapes[-1]:
        if operator in NEUTRAL and (last.array == NEUTRAL[operator]).all():
            return first
        if operator == "Max" and last.array.ndim == 0 and last.array == 0:
            return graph.add("Relu", [first.name], first.order)
    order = next(operand.order for operand in operands if isinstance(operand, Tensor))
    return graph.add(operator, [graph.arranged(operand, order) for operand in operands], order)


def unary(graph: Graph, operator: str, operands: list[Value]) -> Tensor:
    """Map each number by itself."""
    (x,) = operands
    assert isinstance(x, Tensor)
    return graph.add(operator, [x.name], x.order)


def square(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Multiply with itself."""
    (x,) = operands
    assert isinstance(x, Tensor)
    return graph.add("Mul", [x.name, x.name], x.order)


def stop_gradient(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Change nothing."""
    (x,) = operands
    assert isinstance(x, Tensor)
    return x


def convolution(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Convolve as Conv does, [B, C, H, W] by [out, in, h, w], whatever the orders in JAX."""
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise refuse("conv_general_dilated", "lhs_dilation or batch groups")
    numbers = params["dimension_numbers"]
    return graph.add(
        "Conv",
        [graph.arranged(operands[0], numbers.lhs_spec), graph.arranged(operands[1], numbers.rhs_spec)],
        numbers.out_spec,
        strides=params["window_strides"],
        pads=[low for low, _ in params["padding"]] + [high for _, high in params["padding"]],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )


def max_pool(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Take the maximum over windows; what lies beyond the edge does not count, as in JAX."""
    window, padding = params["window_dimensions"], params["padding"]
    plain = [axis for axis, length in enumerate(window) if length == 1][:2]
    if len(plain) < 2 or set(params["base_dilation"]) | set(params["window_dilation"]) != {1}:
        raise refuse("reduce_window_max", f"windows {window} and dilations")
    spatial = [axis for axis in range(len(window)) if axis not in plain]
    order = (*plain, *spatial)
    return graph.add(
        "MaxPool",
        [graph.arranged(operands[0], order)],
        order,
        kernel_shape=[window[axis] for axis in spatial],
        strides=[params["window_strides"][axis] for axis in spatial],
        pads=[padding[axis][side] for side in range(2) for axis in spatial],
    )


def product(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Multiply one axis with a constant matrix, where it stands: our resizes and pools; other products by Einsum.

    The result has in JAX the axes of the first operand, then those of the second, without the ones summed over.
    """
    contracting, batch = params["dimension_numbers"]
    constant = [i for i, operand in enumerate(operands) if isinstance(operand, Constant) and operand.array.ndim == 2]
    if len(constant) != 1 or any(batch) or len(contracting[0]) != 1:
        return einsum(graph, params, operands, shapes)
    side = constant[0]
    x, matrix, axis = operands[1 - side], operands[side], contracting[1 - side][0]
    assert isinstance(x, Tensor) and isinstance(matrix, Constant)
    rows = matrix.array if contracting[side][0] == 1 else matrix.array.T  # [new, summed over]
    kept = [k for k in range(len(x.order)) if k != axis]
    numbers = {k: i + (side == 0) for i, k in enumerate(kept)} | {axis: 0 if side == 0 else len(kept)}
    order = x.order if axis in x.order[-2:] else (*(k for k in x.order if k != axis), axis)
    name, after = graph.arranged(x, order), [numbers[k] for k in order]
    if order[-1] == axis:
        return graph.add("MatMul", [name, graph.constant(rows.T, "matrix")], after)
    return graph.add("MatMul", [graph.constant(rows, "matrix"), name], after)


def einsum(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Multiply and sum as dot_general does: first the axes that both have come out, then the first's, the second's."""
    contracting, batch = params["dimension_numbers"]
    letters = iter(string.ascii_letters)
    first = [next(letters) for _ in shapes[0]]
    shared = dict(zip((*contracting[1], *batch[1]), (first[k] for k in (*contracting[0], *batch[0])), strict=True))
    second = [shared.get(k) or next(letters) for k in range(len(shapes[1]))]
    out = [first[k] for k in batch[0]]
    out += [letter for letter in (*first, *second) if (letter in first) != (letter in second)]
    names, terms = [], []
    for operand, axes in zip(operands, (first, second), strict=True):
        order = operand.order if isinstance(operand, Tensor) else tuple(range(len(axes)))
        names.append(graph.arranged(operand, order))
        terms.append("".join(axes[k] for k in order))
    return graph.add("Einsum", names, range(len(out)), equation=f"{','.join(terms)}->{''.join(out)}")


def transpose(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Rename the axes; nothing moves."""
    (x,) = operands
    assert isinstance(x, Tensor)
    return Tensor(x.name, tuple(params["permutation"].index(axis) for axis in x.order))


def concatenate(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Join along an axis, in the order of axes of the first operand that is computed."""
    order = next(operand.order for operand in operands if isinstance(operand, Tensor))
    names = [graph.arranged(operand, order) for operand in operands]
    return graph.add("Concat", names, order, axis=order.index(params["dimension"]))


def _without(order: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """Return the order of axes that is left when `axes` are gone and the others are counted anew."""
    return [axis - sum(gone < axis for gone in axes) for axis in order if axis not in axes]


def reduce_max(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Take the maximum over axes, which go."""
    (x,), axes = operands, params["axes"]
    assert isinstance(x, Tensor)
    places = [x.order.index(axis) for axis in axes]
    return graph.add("ReduceMax", [x.name], _without(x.order, axes), axes=places, keepdims=0)


def reduce_sum(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Add up over axes, which go."""
    (x,), axes = operands, params["axes"]
    assert isinstance(x, Tensor)
    places = graph.constant(np.array([x.order.index(axis) for axis in axes], np.int64), "axes")
    return graph.add("ReduceSum", [x.name, places], _without(x.order, axes), keepdims=0)


def argmax(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Find the first of the largest values along an axis, which goes."""
    (x,), axes = operands, params["axes"]
    assert isinstance(x, Tensor)
    found = graph.add("ArgMax", [x.name], _without(x.order, axes), axis=x.order.index(axes[0]), keepdims=0)
    return convert(graph, {"new_dtype": params["index_dtype"]}, [found], shapes)


def convert(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Convert to another dtype."""
    (x,) = operands
    assert isinstance(x, Tensor)
    return graph.add("Cast", [x.name], x.order, to=helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"])))


def cut(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Take a range of some axes."""
    (x,) = operands
    assert isinstance(x, Tensor)
    starts, limits, steps = params["start_indices"], params["limit_indices"], params["strides"] or (1,) * len(x.order)
    # Whole axes are left out: the batch has no length that is known now.
    axes = [a for a in range(len(x.order)) if (starts[a], limits[a], steps[a]) != (0, shapes[0][a], 1)]
    places = [x.order.index(axis) for axis in axes]
    ranges = [[starts[a] for a in axes], [limits[a] for a in axes], places, [steps[a] for a in axes]]
    return graph.add("Slice", [x.name, *(graph.constant(np.array(r, np.int64), "range") for r in ranges)], x.order)


def add_axes(graph: Graph, params: dict[str, Any], operands: list[Value], shapes: list[Any]) -> Tensor:
    """Add axes of length 1, all that inference asks of broadcast_in_dim."""
    (x,), dimensions, after = operands, params["broadcast_dimensions"], shapes[-1]
    assert isinstance(x, Tensor)
    new = [axis for axis in range(len(after)) if axis not in dimensions]
    if any(after[axis] != 1 for axis in new) or tuple(after[axis] for axis in dimensions) != tuple(shapes[0]):
        raise refuse("broadcast_in_dim", f"shapes {shapes[0]} to {after}")
    axes = graph.constant(np.arange(len(new)), "axes")
    return graph.add("Unsqueeze", [x.name, axes], (*new, *(dimensions[axis] for axis in x.order)))


OPERATORS: dict[str, Callable[[Graph, dict[str, Any], list[Value], list[Any]], Tensor]] = {
    "argmax": argmax,
    "broadcast_in_dim": add_axes,
    "concatenate": concatenate,
    "conv_general_dilated": convolution,
    "convert_element_type": convert,
    "dot_general": product,
    "reduce_max": reduce_max,
    "reduce_sum": reduce_sum,
    "reduce_window_max": max_pool,
    "slice": cut,
    "square": square,
    "stop_gradient": stop_gradient,
    "transpose": transpose,
}
