"""Heads of mmsegmentation and PyTorch-Encoding as PyTorch modules, whose state dicts have the names of theirs."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stages = list[Tensor]


class ConvModule(nn.Module):
    """Convolution without bias that keeps the size, batch norm and ReLU, as mmsegmentation names them."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, 1, dilation * (kernel // 2), dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Encoding(nn.Module):
    """Residuals [B, N, K, D] to the codewords, summed as softly assigned."""

    def __init__(self, channels: int, codes: int) -> None:
        super().__init__()
        self.codewords = nn.Parameter(torch.empty(codes, channels))
        self.scale = nn.Parameter(torch.empty(codes))

    def forward(self, x: Tensor) -> Tensor:
        residuals = x.flatten(2).transpose(1, 2).unsqueeze(2) - self.codewords
        shares = torch.softmax(self.scale * residuals.square().sum(3), 2)
        return (shares.unsqueeze(3) * residuals).sum(1)


class FCNHead(nn.Module):
    """mmsegmentation's, built of what its configuration says, as are the next two."""

    def __init__(self, build: dict[str, Any]) -> None:
        super().__init__()
        inputs, channels = build["in_channels"], build["channels"]
        widths = [inputs] + [channels] * build["num_convs"]
        self.convs = nn.Sequential(*(ConvModule(i, o, 3) for i, o in itertools.pairwise(widths)))
        if build["concat_input"]:
            self.conv_cat = ConvModule(inputs + channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, build["num_classes"], 1)
        self.concat = build["concat_input"]

    def forward(self, stages: Stages) -> dict[str, Tensor]:
        x = self.convs(stages[-1])
        return {"logits": self.conv_seg(self.conv_cat(torch.cat([stages[-1], x], 1)) if self.concat else x)}


class ASPPHead(nn.Module):
    """mmsegmentation's."""

    def __init__(self, build: dict[str, Any]) -> None:
        super().__init__()
        inputs, channels, dilations = build["in_channels"], build["channels"], build["dilations"]
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(inputs, channels, 1))
        self.aspp_modules = nn.ModuleList(ConvModule(inputs, channels, 1 if d == 1 else 3, d) for d in dilations)
        self.bottleneck = ConvModule((len(dilations) + 1) * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, build["num_classes"], 1)
        self.align_corners = build["align_corners"]

    def forward(self, stages: Stages) -> dict[str, Tensor]:
        x = stages[-1]
        image = F.interpolate(self.image_pool(x), x.shape[2:], mode="bilinear", align_corners=self.align_corners)
        x = torch.cat([image, *(branch(x) for branch in self.aspp_modules)], 1)
        return {"logits": self.conv_seg(self.bottleneck(x))}


class EncModule(nn.Module):
    """mmsegmentation's: the gated features and the semantics."""

    def __init__(self, channels: int, codes: int) -> None:
        super().__init__()
        self.encoding_project = ConvModule(channels, channels, 1)
        self.encoding = nn.Sequential(Encoding(channels, codes), nn.BatchNorm1d(codes), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        semantics = self.encoding(self.encoding_project(x)).mean(1)
        return F.relu(x + x * self.fc(semantics)[:, :, None, None]), semantics


class EncHead(nn.Module):
    """mmsegmentation's."""

    def __init__(self, build: dict[str, Any]) -> None:
        super().__init__()
        *lateral, inputs = build["in_channels"]
        channels, classes = build["channels"], build["num_classes"]
        self.bottleneck = ConvModule(inputs, channels, 3)
        if build["add_lateral"]:
            self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in lateral)
            self.fusion = ConvModule(3 * channels, channels, 3)
        self.enc_module = EncModule(channels, build["num_codes"])
        self.se_layer = nn.Linear(channels, classes)
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.index, self.lateral = build["in_index"], build["add_lateral"]

    def forward(self, stages: Stages) -> dict[str, Tensor]:
        *levels, last = (stages[i] for i in self.index)
        x = self.bottleneck(last)
        if self.lateral:
            joined = [x, *(conv(level) for conv, level in zip(self.lateral_convs, levels, strict=True))]
            x = self.fusion(torch.cat(joined, 1))
        x, semantics = self.enc_module(x)
        return {"logits": self.conv_seg(x), "se_logits": self.se_layer(semantics)}


def _layer(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class PyTorchEncodingEncHead(nn.Module):
    """PyTorch-Encoding's head of EncNet, whose own widths are 512, 1024, 2048 in and 512 within."""

    def __init__(self, inputs: tuple[int, int, int], channels: int, codes: int, classes: int, lateral: bool) -> None:
        super().__init__()
        self.conv5 = nn.Sequential(*_layer(inputs[2], channels, 3))
        if lateral:
            self.connect = nn.ModuleList(nn.Sequential(*_layer(width, channels, 1)) for width in inputs[:2])
            self.fusion = nn.Sequential(*_layer(3 * channels, channels, 3))
        self.encmodule = nn.Module()
        codes_layer: list[nn.Module] = [Encoding(channels, codes), nn.BatchNorm1d(codes), nn.ReLU()]
        self.encmodule.encoding = nn.Sequential(*_layer(channels, channels, 1), *codes_layer)
        self.encmodule.fc = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())
        self.encmodule.selayer = nn.Linear(channels, classes)
        self.conv6 = nn.Sequential(nn.Dropout(0.0), nn.Conv2d(channels, classes, 1))
        self.lateral = lateral

    def forward(self, stages: Stages) -> dict[str, Tensor]:
        x = self.conv5(stages[3])
        if self.lateral:
            x = self.fusion(torch.cat([x, self.connect[0](stages[1]), self.connect[1](stages[2])], 1))
        semantics = self.encmodule.encoding(x).mean(1)
        x = F.relu(x + x * self.encmodule.fc(semantics)[:, :, None, None])
        return {"logits": self.conv6(x), "se_logits": self.encmodule.selayer(semantics)}


def loaded(head: nn.Module, state: dict[str, Tensor], prefix: str) -> nn.Module:
    """Return `head` in float64 with exactly the tensors of `state` under `prefix`; RuntimeError where they differ."""
    head.load_state_dict({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    return head.double().eval()
