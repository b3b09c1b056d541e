"""State dicts for PyTorch projects: what these compute with them, and which networks they have not."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_export import assert_close, random_images, write_random_model

from psp_jax.config import defaults
from psp_jax.deploy import peers
from psp_jax.export import export
from psp_jax.weights.formats import read_tensors

SHALLOW = {"depth": 18, "width": 8, "stem": "32-32-64", "head_channels": 16, "basic_dilation": "first"}


def test_semseg_state_dict_in_torch(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A narrow PSPNet-50, since the names are the same; the check of the width has a test of its own."""
    torch = pytest.importorskip("torch")
    from torch_peers import semseg_pspnet

    monkeypatch.setitem(peers.BUILDS, "semseg", {"head": ("psp",)})
    model = write_random_model(tmp_path / "in", (65, 57), width=8, head_channels=24, aux_channels=8)
    assert export(tmp_path / "in", tmp_path / "out", form="semseg") is None
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["checked"] == "read back bit for bit" == capsys.readouterr().out.splitlines()[-1]
    assert "largest_relative_difference" not in record
    files = [read_tensors(tmp_path / "out" / name) for name in peers.FILES]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        np.testing.assert_array_equal(value, files[1][name])
    signature = json.loads((tmp_path / "out" / "signature.json").read_text())
    assert signature["build"] == {"layers": 50, "classes": 11, "zoom_factor": 8, "pretrained": False}
    images = model.normalize(random_images(1, (65, 57)))
    state = {name: torch.tensor(value) for name, value in files[0].items()}
    with torch.no_grad():
        theirs = semseg_pspnet(state, torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    assert_close(theirs, np.asarray(model.logits(images)))


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 50, "width": 8, "stem": "32-32-64", "head_channels": 64, "align_corners": False},
        {"depth": 18, "width": 16, "stem": "7x7", "head": "fcn", "head_channels": 24, "basic_dilation": "first"},
        {"depth": 18, "width": 16, "head_channels": 32, "basic_dilation": "first", "first_block_dilation": "full"},
        SHALLOW | {"head": "fcn", "fcn_convs": 2, "fcn_concat": True},
        SHALLOW | {"head": "aspp", "align_corners": False},
        SHALLOW | {"head": "enc", "codewords": 5, "align_corners": False},
        {"depth": 50, "width": 8, "head": "enc", "lateral": True, "head_channels": 16},
    ],
    ids=[
        "ResNetV1c-50 PSPHead",
        "ResNet-18 FCNHead",
        "ResNetV1c-18 PSPHead",
        "ResNetV1c-18 FCNHead, two convolutions",
        "ResNetV1c-18 ASPPHead",
        "ResNetV1c-18 EncHead",
        "ResNetV1c-50 EncHead, lateral",
    ],
)
def test_mmseg_state_dict_in_torch(settings: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch_peers import mmseg_segmentor

    model = write_random_model(tmp_path / "in", (64, 56), **({"first_block_dilation": "contracted"} | settings))
    assert export(tmp_path / "in", tmp_path / "out", form="mmseg") is None
    build = json.loads((tmp_path / "out" / "signature.json").read_text())["build"]
    images = model.normalize(random_images(2, (64, 56)))
    tensors = read_tensors(tmp_path / "out" / "state_dict.safetensors")
    state = {name: torch.tensor(value) for name, value in tensors.items()}
    stem = build["backbone"]["stem_channels"]
    assert state["backbone.layer1.0.conv1.weight"].shape[1] == stem
    assert state["decode_head.conv_seg.weight"].shape[1] == build["decode_head"]["channels"]
    with torch.no_grad():
        theirs = mmseg_segmentor(state, torch.from_numpy(images).permute(0, 3, 1, 2), build)
    assert_close(theirs.permute(0, 2, 3, 1).numpy(), np.asarray(model.logits(images)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "semseg builds no network with model.width=8, only 64; export onnx instead"),
        ({"width": 64, "stem": "7x7"}, "semseg builds no network with model.stem=7x7, only 64-64-128"),
        ({"width": 64, "align_corners": False}, "model.align_corners=False"),
        ({"width": 64, "first_block_dilation": "contracted"}, "model.first_block_dilation=contracted"),
        ({"width": 64, "bins": [1, 2]}, "model.bins="),
        ({"peer": "mmseg", "pool": "max"}, "mmseg builds no network with model.pool=max, only average"),
        ({"peer": "mmseg", "depth": 34}, "mmseg builds basic blocks with model.basic_dilation=first alone"),
        ({"peer": "mmseg", "head_channels": 96}, "model.head_channels=96 is not 64"),
        ({"head": "enc"}, "semseg builds no network with model.head=enc, only psp"),
    ],
)
def test_networks_that_a_peer_does_not_build(changes: dict[str, Any], message: str) -> None:
    full = defaults().model.to_dict()
    peers.check_peer("semseg", full)
    peers.check_peer("mmseg", full)
    settings = full | {"width": 8} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        peers.check_peer(settings.pop("peer", "semseg"), settings)
