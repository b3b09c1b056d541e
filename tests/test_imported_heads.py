"""Heads other than PSP, from a file: imported as they are, as a start for training, and exported again."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from foreign import MMSEG_18, random_tensors, settings_of
from test_export import SMALL, write_random_model
from test_import_weights import save
from test_initial import TINY, kept, start

import psp_jax
from psp_jax.deploy import peers
from psp_jax.export import export
from psp_jax.import_weights import import_weights
from psp_jax.weights.formats import read_tensors
from psp_jax.weights.tables import from_variables

ENC = {"head": "enc", "codewords": 6}
MMSEG_TINY = TINY | {"first_block_dilation": "contracted", "basic_dilation": "first", "align_corners": False}


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("encoding", {"head": "enc", "codewords": 6, "lateral": True, "width": 8}, "ENC head on ResNet-50"),
        ("mmseg", MMSEG_18 | {"head": "fcn", "fcn_convs": 2, "fcn_concat": True, "width": 8}, "FCN head on ResNet-18"),
        ("mmseg", MMSEG_18 | {"head": "aspp", "width": 8, "head_channels": 16}, "ASPP head on ResNet-18"),
    ],
    ids=["encoding EncNet", "mmseg FCN", "mmseg DeepLabV3"],
)
def test_imported_bit_for_bit(source: str, options: dict[str, Any], told: str, tmp_path: Path) -> None:
    settings = settings_of(**{"head_channels": 16, "aux_channels": 8, "first_block_dilation": "contracted"} | options)
    tensors = random_tensors(source, settings, 11)
    assert told in import_weights(source, save(tmp_path / "net.npz", tensors), tmp_path / "imported")
    model = psp_jax.load(tmp_path / "imported")
    assert model.card.model | {"bins": settings["bins"]} == settings
    for name, value in from_variables(source, model.variables, settings).items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_encnet_of_other_classes_starts_with_two_random_layers(tmp_path: Path) -> None:
    file = save(tmp_path / "enc.npz", random_tensors("mmseg", settings_of(**MMSEG_TINY | ENC), 7))
    before, after, words = start(file, "mmseg", **MMSEG_TINY | ENC)
    assert words == ("enc.npz (mmseg): backbone, head, aux_head; random: head.classifier, head.se, aux_head.classifier")
    assert kept(before, after) == set()
    assert not after["params"]["head"]["se"]["kernel"].any()
    assert after["params"]["head"]["encoding"]["codewords"].all()
    with pytest.raises(ValueError, match=r"set model\.codewords=6 and model\.lateral=False to start"):
        start(file, "mmseg", **MMSEG_TINY | ENC | {"codewords": 8, "lateral": True})
    fcn = save(tmp_path / "fcn.npz", random_tensors("mmseg", settings_of(**MMSEG_TINY, head="fcn", fcn_convs=2), 3))
    with pytest.raises(ValueError, match=r"set model\.fcn_convs=2 to start"):
        start(fcn, "mmseg", **MMSEG_TINY, head="fcn")


@pytest.mark.parametrize("head", ["enc", "aspp"])
def test_stablehlo(head: str, tmp_path: Path) -> None:
    write_random_model(tmp_path / "in", (41, 41), **SMALL, head=head)
    difference = export(tmp_path / "in", tmp_path / "out", form="stablehlo", fold_bn=True)
    assert difference is not None
    assert difference < 1e-5


def test_an_export_that_reads_back_with_more_layers_is_not_kept(tmp_path: Path, monkeypatch: Any) -> None:
    options = MMSEG_18 | ENC | {"width": 8, "head_channels": 16}
    model = write_random_model(tmp_path / "in", (40, 40), **options)
    export(tmp_path / "in", tmp_path / "out", form="mmseg")
    tensors = read_tensors(tmp_path / "out" / peers.FILES[0])
    assert tensors["decode_head.enc_module.encoding.0.codewords"].shape == (6, 16)
    transposed = jax.tree.map(np.asarray, model.variables)["params"]["head"]["gate"]["kernel"].T
    np.testing.assert_array_equal(tensors["decode_head.enc_module.fc.0.weight"], transposed)
    monkeypatch.setattr(peers, "from_variables", lambda *_: tensors | {"decode_head.fusion.conv.weight": np.ones(1)})
    with pytest.raises(ValueError, match=r"no layer takes, decode_head\.fusion\.conv\.weight"):
        export(tmp_path / "in", tmp_path / "other", form="mmseg")
    assert not (tmp_path / "other").exists()
