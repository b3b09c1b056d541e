"""How hszhao/semseg, mmsegmentation and PyTorch-Encoding run state dicts, in plain PyTorch operations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_heads import ASPPHead, EncHead, FCNHead, PyTorchEncodingEncHead, loaded

MMSEG_HEADS = {"FCNHead": FCNHead, "ASPPHead": ASPPHead, "EncHead": EncHead}
State = dict[str, Tensor]


def conv_bn(state: State, conv: str, bn: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Convolution without bias and batch norm."""
    kernel = state[f"{conv}.weight"]
    x = F.conv2d(x, kernel, None, stride, dilation * (kernel.shape[-1] - 1) // 2, dilation)
    mean, var, weight, bias = (state[f"{bn}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)


def block(state: State, name: str, x: Tensor, stride: int, dilation: int) -> Tensor:
    """Residual block; of mmsegmentation's basic blocks only the first convolution is dilated."""
    if f"{name}.conv3.weight" in state:
        y = F.relu(conv_bn(state, f"{name}.conv1", f"{name}.bn1", x))
        y = F.relu(conv_bn(state, f"{name}.conv2", f"{name}.bn2", y, stride, dilation))
        y = conv_bn(state, f"{name}.conv3", f"{name}.bn3", y)
    else:
        y = F.relu(conv_bn(state, f"{name}.conv1", f"{name}.bn1", x, stride, dilation))
        y = conv_bn(state, f"{name}.conv2", f"{name}.bn2", y)
    if f"{name}.downsample.0.weight" in state:
        x = conv_bn(state, f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
    return F.relu(x + y)


def stages(state: State, prefix: str, x: Tensor, contracted: bool) -> list[Tensor]:
    """The four stages at output stride 8."""
    outputs = []
    for stage, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4)), start=1):
        start = f"{prefix}layer{stage}."
        blocks = {name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)}
        for i in range(len(blocks)):
            first = max(dilation // 2, 1) if contracted and i == 0 else dilation
            x = block(state, f"{prefix}layer{stage}.{i}", x, stride if i == 0 else 1, first)
        outputs.append(x)
    return outputs


def pyramid(state: State, convs: list[tuple[str, str]], x: Tensor, align_corners: bool) -> Tensor:
    """The feature maps and what the levels make of them, joined."""
    levels = [x]
    for bins, (conv, bn) in zip((1, 2, 3, 6), convs, strict=True):
        y = F.relu(conv_bn(state, conv, bn, F.adaptive_avg_pool2d(x, bins)))
        levels.append(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=align_corners))
    return torch.cat(levels, 1)


def semseg_pspnet(state: State, image: Tensor) -> Tensor:
    """Logits [B, C, H, W] of hszhao/semseg's PSPNet (model/pspnet.py, zoom_factor 8) for images [B, 3, H, W]."""
    x = image
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        x = F.relu(conv_bn(state, f"layer0.{i}", f"layer0.{i + 1}", x, stride))
    x = stages(state, "", F.max_pool2d(x, 3, 2, 1), contracted=False)[-1]
    convs = [(f"ppm.features.{i}.1", f"ppm.features.{i}.2") for i in range(4)]
    x = F.relu(conv_bn(state, "cls.0", "cls.1", pyramid(state, convs, x, align_corners=True)))
    x = F.conv2d(x, state["cls.4.weight"], state["cls.4.bias"])
    return F.interpolate(x, image.shape[2:], mode="bilinear", align_corners=True)


def mmseg_segmentor(state: State, image: Tensor, build: dict[str, Any]) -> Tensor:
    """Logits [B, C, H, W] of mmsegmentation's EncoderDecoder; `build` is its `model`."""
    x, backbone, head = image, build["backbone"], build["decode_head"]
    if backbone["type"] == "ResNetV1c":
        for i, stride in ((0, 2), (3, 1), (6, 1)):
            x = F.relu(conv_bn(state, f"backbone.stem.{i}", f"backbone.stem.{i + 1}", x, stride))
    else:
        x = F.relu(conv_bn(state, "backbone.conv1", "backbone.bn1", x, 2))
    outputs = stages(state, "backbone.", F.max_pool2d(x, 3, 2, 1), backbone["contract_dilation"])
    if head["type"] == "PSPHead":
        names = [f"decode_head.psp_modules.{i}.1" for i in range(4)]
        x = pyramid(state, [(f"{name}.conv", f"{name}.bn") for name in names], outputs[-1], head["align_corners"])
        x = F.relu(conv_bn(state, "decode_head.bottleneck.conv", "decode_head.bottleneck.bn", x))
        x = F.conv2d(x, state["decode_head.conv_seg.weight"], state["decode_head.conv_seg.bias"])
    else:
        module = loaded(MMSEG_HEADS[head["type"]](head), state, "decode_head.")
        x = module([output.double() for output in outputs])["logits"].float()
    return F.interpolate(x, image.shape[2:], mode="bilinear", align_corners=head["align_corners"])


def encoding_encnet(state: State, image: Tensor, codes: int, lateral: bool) -> Tensor:
    """Logits [B, C, H, W] of PyTorch-Encoding's EncNet on a `resnet50s`."""
    x, start = image, "pretrained."
    for conv, bn, stride in (("conv1.0", "conv1.1", 2), ("conv1.3", "conv1.4", 1), ("conv1.6", "bn1", 1)):
        x = F.relu(conv_bn(state, start + conv, start + bn, x, stride))
    outputs = stages(state, start, F.max_pool2d(x, 3, 2, 1), contracted=True)
    widths = tuple(output.shape[1] for output in outputs[1:])
    classes, channels = state["head.conv6.1.weight"].shape[:2]
    head = loaded(PyTorchEncodingEncHead(widths, channels, codes, classes, lateral), state, "head.")
    x = head([output.double() for output in outputs])["logits"].float()
    return F.interpolate(x, image.shape[2:], mode="bilinear", align_corners=True)
