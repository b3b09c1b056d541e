"""PyTorch modules built as the sources': against the tables at full size, and against the NumPy references."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from foreign import settings_of, shapes_of  # noqa: E402
from numpy_heads import State  # noqa: E402
from test_heads_of_others import CLASSES, ENCODING, HEADS, NARROW, SIZE, soft_tensors  # noqa: E402
from test_weights_tables import forward  # noqa: E402
from torch_heads import PyTorchEncodingEncHead, loaded  # noqa: E402
from torch_peers import MMSEG_HEADS, encoding_encnet  # noqa: E402

from psp_jax.interpolation import resize  # noqa: E402
from psp_jax.weights.architecture import recognise  # noqa: E402
from psp_jax.weights.tables import names, to_variables  # noqa: E402

PREFIXES = {"mmseg": "decode_head.", "encoding": "head."}
# What mmsegmentation's configurations say of the decode heads: _base_/models/{fcn,deeplabv3,encnet}_r50-d8.py.
MMSEG_BUILDS: dict[str, dict[str, Any]] = {
    "fcn": {"type": "FCNHead", "num_convs": 2, "concat_input": True},
    "aspp": {"type": "ASPPHead", "dilations": (1, 12, 24, 36), "align_corners": False},
    "enc": {"type": "EncHead", "in_index": (1, 2, 3), "num_codes": 32, "add_lateral": False},
}


def torch_head(name: str, classes: int, width: int = 64, channels: int = 512) -> Any:
    source, options, *_ = HEADS[name]
    inputs = (8 * width, 16 * width, 32 * width)
    codes, lateral = options.get("codewords", 32), options.get("lateral", False)
    if source == "encoding":
        return PyTorchEncodingEncHead(inputs, channels, codes, classes, lateral)
    build = MMSEG_BUILDS[options["head"]] | {"channels": channels, "num_classes": classes}
    build |= {"in_channels": inputs if options["head"] == "enc" else inputs[-1]}
    changes = {
        "mmseg FCN, one convolution": {"num_convs": 1, "concat_input": False},
        "mmseg DeepLabV3, stride 16": {"dilations": (1, 6, 12, 18)},
        "mmseg EncNet": {"num_codes": codes},
        "mmseg EncNet, lateral": {"add_lateral": True},
    }
    build |= changes.get(name, {})
    return MMSEG_HEADS[build["type"]](build)


@pytest.mark.parametrize("name", HEADS)
def test_names_and_shapes_at_full_size(name: str) -> None:
    source, options, *_ = HEADS[name]
    settings = settings_of(**options)
    table = names(source, settings, shapes_of(settings, 150))
    with torch.device("meta"):
        state = torch_head(name, 150).state_dict()
    prefix = PREFIXES[source]
    assert {k: entry.shape for k, entry in table.items() if k.startswith(prefix)} == {
        prefix + k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", HEADS)
def test_references_agree(name: str, train: bool) -> None:
    source, options, reference, arguments = HEADS[name]
    settings = settings_of(**NARROW | options)
    tensors, prefix = soft_tensors(source, settings), PREFIXES[source]
    empty = torch_head(name, CLASSES, settings["width"], settings["head_channels"])
    head = loaded(empty, {k: torch.tensor(v) for k, v in tensors.items()}, prefix).train(train)
    rng = np.random.default_rng(1)
    stages = [rng.uniform(0, 2, (2, channels, *SIZE)) for channels in (16, 32, 64, 128)]
    with torch.no_grad():
        found = head([torch.tensor(stage) for stage in stages])
    state = State(tensors, train)
    expected = reference(state, stages, **arguments)
    assert found.keys() == expected.keys()
    for output, value in expected.items():
        np.testing.assert_allclose(found[output], value, rtol=1e-9, atol=1e-9)
    after = head.state_dict()
    for tensor, value in state.updated.items():
        np.testing.assert_allclose(after[tensor.removeprefix(prefix)], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lateral", [False, True], ids=["plain", "lateral"])
def test_encnet_of_encoding_as_a_whole(lateral: bool) -> None:
    settings = settings_of(**NARROW | ENCODING | {"head": "enc", "codewords": 6, "lateral": lateral})
    tensors = soft_tensors("encoding", settings)
    found = recognise("encoding", tensors).settings | {"dropout": 0.0}
    assert found == settings
    variables = to_variables("encoding", tensors, found, shapes_of(found, CLASSES))
    image = np.random.default_rng(2).normal(size=(2, 65, 57, 3)).astype(np.float32)
    state = {name: torch.tensor(value) for name, value in tensors.items()}
    with torch.no_grad():
        theirs = encoding_encnet(state, torch.tensor(image).permute(0, 3, 1, 2), 6, lateral)
    ours = np.asarray(resize(forward(variables, image, found, CLASSES), (65, 57), align_corners=True))
    expected = theirs.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
