"""A backbone with a segmentation head and an auxiliary head, built from plain configuration values."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from psp_jax.models.aspp import ASPPHead, rates_at
from psp_jax.models.encnet import EncHead
from psp_jax.models.heads import POOLS, FCNHead, PSPHead
from psp_jax.models.resnet import (
    BASIC_DILATIONS,
    BLOCKS,
    FIRST_BLOCK_DILATIONS,
    STAGES,
    STEMS,
    STRIDES_IN,
    ResNet,
)
from psp_jax.models.valid import Valid, strided

Array = jax.Array

HEADS = {"psp": PSPHead, "fcn": FCNHead, "aspp": ASPPHead, "enc": EncHead}
CONVOLUTIONS = ("auto", "native", "rows")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Segmentor(nn.Module):
    """Semantic segmentation network.

    The parameters of `backbone` are meant to start pretrained; `head` and `aux_head` are new and learn faster.
    """

    backbone: ResNet
    head: nn.Module
    aux_head: nn.Module | None = None

    def __call__(self, image: Array, train: bool, valid: Valid = None) -> dict[str, Array]:
        """Map normalised images f32 [B, H, W, 3] to {"logits": f32 [B, h, w, C]}, h = ceil(H / output stride).

        EncNet's head adds "se_logits" f32 [B, C], whether each class is anywhere in the image. When training,
        "aux_logits" of the auxiliary head on the third stage comes with them. `valid` may tell that only the first
        (height, width) of each image are real and the rest is zero: the first logits then are those of the smaller
        images. For evaluation it is i32 [B, 2], so that one compiled program serves all sizes; for training one pair,
        of rows added so that they divide over devices.
        """
        stages = self.backbone(image, train, valid)
        real = strided(valid, self.backbone.output_stride)
        if isinstance(self.head, EncHead):
            outputs = self.head(stages, train, real)
        else:
            outputs = {"logits": self.head(stages[-1], train, real)}
        if self.aux_head is not None and train:
            stride = 4 * math.prod(stride for stride, _ in STAGES[self.backbone.output_stride][:3])
            outputs["aux_logits"] = self.aux_head(stages[-2], train, strided(valid, stride))
        return outputs


def check_model(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, listing what is known, where `settings` (see `build_model`) asks for something unknown."""
    choices: dict[str, Any] = {
        "depth": BLOCKS,
        "stem": STEMS,
        "output_stride": STAGES,
        "first_block_dilation": FIRST_BLOCK_DILATIONS,
        "basic_dilation": BASIC_DILATIONS,
        "stride_in": STRIDES_IN,
        "head": HEADS,
        "pool": POOLS,
        "dtype": DTYPES,
        "convolutions": CONVOLUTIONS,
    }
    for field, known in choices.items():
        if settings[field] not in known:
            listed = ", ".join(str(k) for k in known)
            raise ValueError(f"model.{field}={settings[field]!r} is unknown; choose one of: {listed}.")
    if settings["width"] < 2 or settings["width"] % 2:
        raise ValueError(f"model.width={settings['width']} must be a positive even number of channels.")
    for field in ("head_channels", "aux_channels"):
        if settings[field] < 1:
            raise ValueError(f"model.{field}={settings[field]} must be at least 1.")
    if not 0 <= settings["dropout"] < 1:
        raise ValueError(f"model.dropout={settings['dropout']} must be at least 0 and below 1.")
    if settings["head"] == "fcn" and settings["fcn_convs"] < 1:
        raise ValueError(f"model.fcn_convs={settings['fcn_convs']} must be at least 1.")
    if settings["head"] == "enc":
        if settings["codewords"] < 1:
            raise ValueError(f"model.codewords={settings['codewords']} must be at least 1.")
        if settings["lateral"] and settings["output_stride"] != 8:
            raise ValueError(
                f"model.lateral=True joins stages of one size, which model.output_stride={settings['output_stride']} "
                "has not; set model.output_stride=8."
            )
    if not settings["bins"] or min(settings["bins"]) < 1:
        raise ValueError(f"model.bins={settings['bins']} must name at least one grid size, each at least 1.")


def build_model(settings: Mapping[str, Any], num_classes: int) -> Segmentor:
    """Build the network that `settings` (the fields of `config.model`) describe.

    Raises:
      ValueError: a field has an unknown value; the message lists the known ones.
    """
    check_model(settings)
    dtype = DTYPES[settings["dtype"]]
    common = {"num_classes": num_classes, "dropout": settings["dropout"], "dtype": dtype}
    head_options: dict[str, Any] = {"channels": settings["head_channels"]}
    if settings["head"] == "psp":
        head_options |= {
            "bins": tuple(settings["bins"]),
            "pool": settings["pool"],
            "reduce": settings["reduce"],
            "align_corners": settings["align_corners"],
        }
    elif settings["head"] == "fcn":
        head_options |= {"convs": settings["fcn_convs"], "concat": settings["fcn_concat"]}
    elif settings["head"] == "enc":
        head_options |= {"codewords": settings["codewords"], "lateral": settings["lateral"]}
    elif settings["head"] == "aspp":
        head_options["rates"] = rates_at(settings["output_stride"])
    return Segmentor(
        backbone=ResNet(
            depth=settings["depth"],
            stem=settings["stem"],
            output_stride=settings["output_stride"],
            first_block_dilation=settings["first_block_dilation"],
            basic_dilation=settings["basic_dilation"],
            stride_in=settings["stride_in"],
            width=settings["width"],
            phases=settings["phases"],
            remat=settings["remat"],
            dtype=dtype,
        ),
        head=HEADS[settings["head"]](**common, **head_options),
        aux_head=FCNHead(**common, channels=settings["aux_channels"]) if settings["aux_head"] else None,
    )


def variable_shapes(settings: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Return {"params", "batch_stats"} of the network that `build_model` builds, as shapes and dtypes only."""
    model = build_model(settings, num_classes)
    # No parameter depends on the image size, so the smallest image that every pyramid level accepts will do.
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes: dict[str, Any] = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=True), image)
    return shapes
