"""State dicts that hszhao/semseg and mmsegmentation load: their names, their layout, and how to build the network.

import json, safetensors.torch
signature = json.load(open("DIR/signature.json"))
network = PSPNet(**signature["build"])                           # semseg: model/pspnet.py
network = mmseg.registry.MODELS.build(signature["build"])        # mmsegmentation
network.load_state_dict(safetensors.torch.load_file("DIR/state_dict.safetensors"))

(semseg's network always has an auxiliary head: strict=False loads a run that had none.)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from psp_jax.models.aspp import rates_at
from psp_jax.models.resnet import STAGES
from psp_jax.weights.architecture import recognise
from psp_jax.weights.formats import read_tensors, write_tensors
from psp_jax.weights.tables import from_variables, to_variables
from psp_jax.workdir import ModelCard

Settings = Mapping[str, Any]

FILES = ("state_dict.npz", "state_dict.safetensors")
# What names and shapes tell of a network, in fields of config.model and the number of classes, and what of one head.
TOLD = ("depth", "stem", "width", "head", "head_channels", "aux_head", "classes")
TOLD_OF = {"fcn": ("fcn_convs", "fcn_concat"), "enc": ("codewords", "lateral")}
# What the peer's classes can build, in fields of config.model. semseg fixes everything but depth and classes.
BUILDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "semseg": {
        "head": ("psp",),
        "depth": (50, 101, 152),
        "stem": ("64-64-128",),
        "width": (64,),
        "output_stride": (8,),
        "first_block_dilation": ("full",),
        "stride_in": ("3x3",),
        "head_channels": (512,),
        "bins": ((1, 2, 3, 6),),
        "pool": ("average",),
        "reduce": (True,),
        "aux_channels": (256,),
        "align_corners": (True,),
    },
    "mmseg": {
        "head": ("psp", "fcn", "aspp", "enc"),
        "depth": (18, 34, 50, 101, 152),
        "pool": ("average",),
        "reduce": (True,),
    },
}


def check_peer(peer: str, settings: Settings) -> None:
    """Raise ValueError, naming the field, where `peer` has no network of these settings."""
    for field, known in BUILDS[peer].items():
        value = tuple(settings[field]) if field == "bins" else settings[field]
        if value not in known:
            listed = ", ".join(str(k) for k in known)
            raise ValueError(
                f"{peer} builds no network with model.{field}={value}, only {listed}; export onnx instead."
            )
    dilated_basic = settings["depth"] < 50 and settings["output_stride"] < 32
    if peer == "mmseg" and dilated_basic and settings["basic_dilation"] != "first":
        raise ValueError("mmseg builds basic blocks with model.basic_dilation=first alone; export onnx instead.")
    if peer == "mmseg" and settings["head"] == "psp":
        pooled = _features(settings) // len(settings["bins"])
        if settings["head_channels"] != pooled:
            raise ValueError(
                f"mmseg builds pyramids whose levels are as wide as the head, and here model.head_channels="
                f"{settings['head_channels']} is not {pooled}; export onnx instead."
            )


def _features(settings: Settings) -> int:
    """Return the channels of the last stage."""
    return settings["width"] * 8 * (1 if settings["depth"] < 50 else 4)


def write_peer(directory: Path, peer: str, card: ModelCard, variables: Any) -> None:
    """Write the state dict as .npz and .safetensors: the same tensors twice, for with and without that package.

    Raises:
      ValueError: the peer has no such network.
    """
    check_peer(peer, card.model)
    tensors = from_variables(peer, variables, card.model)
    for name in FILES:
        write_tensors(directory / name, tensors)


def check_peer_files(directory: Path, peer: str, card: ModelCard, variables: Any) -> None:
    """Raise ValueError unless what was written is the network of `card` to an import, and its numbers `variables`.

    Names and shapes are judged without `card`, since reading through the table that wrote would pass with any table.
    """
    tensors = read_tensors(directory / FILES[0])
    found = recognise(peer, tensors)
    theirs = found.settings | {"classes": found.num_classes}
    ours = card.model | {"classes": card.classes.num_classes}
    fields = [*TOLD, *TOLD_OF.get(card.model["head"], ())]
    fields += ["aux_channels"] if card.model["aux_head"] else []
    wrong = [f"{field}={theirs[field]} instead of {ours[field]}" for field in fields if theirs[field] != ours[field]]
    if wrong:
        raise ValueError(
            f"The state dict for {peer} reads back as another network: {', '.join(wrong)}; it was not kept, export "
            "onnx instead."
        )
    back = to_variables(peer, tensors, card.model, variables)
    same = jax.tree.map(lambda one, other: one.tobytes() == np.asarray(other).tobytes(), back, variables)
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"The state dict for {peer} does not read back bit for bit and was not kept; check the disk.")


def peer_signature(peer: str, card: ModelCard) -> dict[str, Any]:
    """Describe the files as JSON values: how the peer builds the network, its input and its classes."""
    return {
        "peer": peer,
        "files": FILES,
        "build": semseg_arguments(card) if peer == "semseg" else mmseg_model(card),
        "input": {"dtype": "float32", "shape": ["batch", 3, "H", "W"], "content": "(RGB of 0 to 255 - mean) / std"},
        "classes": card.classes.as_dict(),
        "mean": card.mean,
        "std": card.std,
    }


def semseg_arguments(card: ModelCard) -> dict[str, Any]:
    """Return the arguments of semseg's PSPNet."""
    return {"layers": card.model["depth"], "classes": card.classes.num_classes, "zoom_factor": 8, "pretrained": False}


def mmseg_model(card: ModelCard) -> dict[str, Any]:
    """Return `model` of a configuration of mmsegmentation 1.x."""
    settings, features = card.model, _features(card.model)
    norm = {"type": "BN", "requires_grad": True}
    common = {
        "num_classes": card.classes.num_classes,
        "norm_cfg": norm,
        "dropout_ratio": settings["dropout"],
        "align_corners": settings["align_corners"],
    }
    last = {"in_channels": features, "in_index": 3, "channels": settings["head_channels"]}
    aux = {"type": "FCNHead", "num_convs": 1, "concat_input": False}
    aux |= {"in_channels": features // 2, "in_index": 2, "channels": settings["aux_channels"]}
    stem_channels = {"64-64-128": 128, "32-32-64": 64, "7x7": 64}[settings["stem"]] * settings["width"] // 64
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": card.mean,
            "std": card.std,
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
        },
        "backbone": {
            "type": "ResNet" if settings["stem"] == "7x7" else "ResNetV1c",
            "depth": settings["depth"],
            "stem_channels": stem_channels,
            "base_channels": settings["width"],
            "strides": [stride for stride, _ in STAGES[settings["output_stride"]]],
            "dilations": [dilation for _, dilation in STAGES[settings["output_stride"]]],
            "contract_dilation": settings["first_block_dilation"] == "contracted",
            "style": "caffe" if settings["stride_in"] == "1x1" else "pytorch",
            "norm_cfg": norm,
        },
        "decode_head": common | last | mmseg_head(settings),
        **({"auxiliary_head": common | aux} if settings["aux_head"] else {}),
        "test_cfg": {"mode": "whole"},
    }


def mmseg_head(settings: Settings) -> dict[str, Any]:
    """Return what is special of a decode head of mmsegmentation."""
    if settings["head"] == "psp":
        return {"type": "PSPHead", "pool_scales": settings["bins"]}
    if settings["head"] == "fcn":
        return {"type": "FCNHead", "num_convs": settings["fcn_convs"], "concat_input": settings["fcn_concat"]}
    if settings["head"] == "aspp":
        return {"type": "ASPPHead", "dilations": [1, *rates_at(settings["output_stride"])]}
    features = _features(settings)
    return {
        "type": "EncHead",
        "in_channels": [features // 4, features // 2, features],
        "in_index": [1, 2, 3],
        "num_codes": settings["codewords"],
        "add_lateral": settings["lateral"],
    }
