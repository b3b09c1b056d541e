"""Heads of mmsegmentation and PyTorch-Encoding: the same tensors give the same outputs, in evaluation and training."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from foreign import MMSEG, Tensors, settings_of, shapes_of
from numpy_heads import State, aspp, enc, fcn

from psp_jax.models import build_model
from psp_jax.weights.architecture import recognise
from psp_jax.weights.tables import from_variables, names, to_variables

CLASSES = 5
# Maps that the widest dilation reaches across, of a narrow ResNet-50.
SIZE = (15, 40)
NARROW = {"width": 4, "head_channels": 12, "aux_channels": 6, "dropout": 0.0}
ENCODING = {"first_block_dilation": "contracted"}
Reference = Callable[..., dict[str, np.ndarray]]
HEADS: dict[str, tuple[str, dict[str, Any], Reference, dict[str, Any]]] = {
    "mmseg FCN": ("mmseg", {"head": "fcn", "fcn_convs": 2, "fcn_concat": True}, fcn, {"convs": 2, "concat": True}),
    "mmseg FCN, one convolution": ("mmseg", {"head": "fcn"}, fcn, {"convs": 1, "concat": False}),
    "mmseg DeepLabV3": ("mmseg", {"head": "aspp"}, aspp, {"dilations": (1, 12, 24, 36)}),
    "mmseg DeepLabV3, stride 16": (
        "mmseg",
        {"head": "aspp", "output_stride": 16},
        aspp,
        {"dilations": (1, 6, 12, 18)},
    ),
    "mmseg EncNet": ("mmseg", {"head": "enc", "codewords": 7}, enc, {"source": "mmseg", "lateral": False}),
    "mmseg EncNet, lateral": ("mmseg", {"head": "enc", "lateral": True}, enc, {"source": "mmseg", "lateral": True}),
    "encoding EncNet": ("encoding", {"head": "enc"}, enc, {"source": "encoding", "lateral": False}),
    "encoding EncNet, lateral": (
        "encoding",
        {"head": "enc", "lateral": True},
        enc,
        {"source": "encoding", "lateral": True},
    ),
}


def soft_tensors(source: str, settings: dict[str, Any]) -> Tensors:
    """Return a network of which every part matters: no codeword takes all, no gate is shut, no ReLU is all or none."""
    rng = np.random.default_rng(0)

    def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("running_mean", "running_var")) and shape == (settings["codewords"],):
            size = np.prod(SIZE) / shape[0]  # of sums over positions, which share the codewords
            return rng.normal(0, size, shape) if name.endswith("mean") else size**2 * rng.uniform(0.5, 1.5, shape)
        if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            return rng.uniform(0.5, 1.5, shape)
        if name.endswith("scale"):
            return rng.uniform(-0.2, 0, shape)
        spread = {".weight": np.sqrt(2 / np.prod(shape[1:])), ".codewords": 1.0}
        return rng.normal(0, next((s for end, s in spread.items() if name.endswith(end)), 0.3), shape)

    table = names(source, settings, shapes_of(settings, CLASSES))
    return {name: fill(name, entry.shape).astype(np.float32) for name, entry in table.items()}


def of_head(variables: dict[str, Any]) -> dict[str, Any]:
    return {collection: tree["head"] for collection, tree in variables.items()}


def assert_close(ours: Any, theirs: np.ndarray) -> None:
    """Within 1e-5 of the largest number."""
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", HEADS)
def test_same_outputs(name: str, train: bool) -> None:
    source, options, reference, arguments = HEADS[name]
    settings = settings_of(**NARROW | (MMSEG if source == "mmseg" else ENCODING) | options)
    tensors = soft_tensors(source, settings)
    # The output stride and the dropout, no tensor tells; everything else is found.
    found = recognise(source, tensors).settings | {field: settings[field] for field in ("output_stride", "dropout")}
    assert found == settings
    variables = to_variables(source, tensors, found, shapes_of(found, CLASSES))
    rng = np.random.default_rng(1)
    # Images of different brightness, or their two means, which batch norm follows in DeepLabV3, are all but the same.
    brightness = np.array([1, 2]).reshape(-1, 1, 1, 1)
    stages = [rng.uniform(0, brightness, (2, c, *SIZE)).astype(np.float32) for c in (16, 32, 64, 128)]

    head = build_model(found, CLASSES).head
    last_axis = [stage.transpose(0, 2, 3, 1) for stage in stages]
    inputs: Any = last_axis if found["head"] == "enc" else last_axis[-1]
    run = jax.jit(lambda v, x: head.apply(v, x, train=train, mutable=["batch_stats"]))
    outputs, after = run(of_head(variables), inputs)
    outputs = outputs if isinstance(outputs, dict) else {"logits": outputs}

    state = State(tensors, train)
    expected = reference(state, [stage.astype(np.float64) for stage in stages], **arguments)
    assert state.taken == {tensor for tensor in tensors if tensor.startswith(("decode_head.", "head."))}
    assert outputs.keys() == expected.keys()
    expected["logits"] = expected["logits"].transpose(0, 2, 3, 1)
    for output, value in expected.items():
        assert_close(outputs[output], value)
    if train and source == "mmseg":  # PyTorch-Encoding's running variance takes the biased estimate
        changed = {"params": {"head": variables["params"]["head"]}, "batch_stats": {"head": after["batch_stats"]}}
        found_after = from_variables(source, changed, found)
        for tensor, value in state.updated.items():
            assert_close(found_after[tensor], value)


@pytest.mark.parametrize("name", ["mmseg FCN", "mmseg DeepLabV3", "mmseg EncNet, lateral"])
def test_every_part_matters(name: str) -> None:
    """The references alone: were a part without influence, the comparison would not see it."""
    source, options, reference, arguments = HEADS[name]
    tensors = soft_tensors(source, settings_of(**NARROW | options))
    stages = [np.random.default_rng(1).uniform(0, 2, (1, c, *SIZE)) for c in (16, 32, 64, 128)]
    whole = reference(State(tensors), stages, **arguments)
    for tensor in tensors:
        if tensor.startswith("decode_head."):
            changed = reference(State(tensors | {tensor: tensors[tensor] * np.float32(1.1)}), stages, **arguments)
            moved = [np.abs(changed[k] - whole[k]).max() / np.abs(whole[k]).max() for k in whole]
            assert max(moved) > 1e-4, tensor


def test_a_head_without_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.fcn_convs=0 must be at least 1"):
        build_model(settings_of(head="fcn", fcn_convs=0), CLASSES)
