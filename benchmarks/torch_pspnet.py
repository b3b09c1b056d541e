"""The peer of the benchmarks: PSPNet and its training step in plain PyTorch, as hszhao/semseg builds and trains it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, relu: bool = True) -> nn.Module:
    """Convolution without bias, batch norm and, unless `relu` is off, ReLU."""
    pad = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, width, 1),
            conv_bn(width, width, 3, stride, dilation),
            conv_bn(width, 4 * width, 1, relu=False),
        )
        same = inputs == 4 * width and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, 4 * width, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class PSPNet(nn.Module):
    """PSPNet with auxiliary head at output stride 8; returns the training loss."""

    def __init__(self, classes: int, blocks: tuple[int, ...], aux_weight: float = 0.4) -> None:
        super().__init__()
        self.aux_weight = aux_weight
        self.stem = nn.Sequential(conv_bn(3, 64, 3, 2), conv_bn(64, 64, 3), conv_bn(64, 128, 3), nn.MaxPool2d(3, 2, 1))
        stages, inputs = [], 128
        for stage, (count, stride, dilation) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            width = 64 * 2**stage
            layers = []
            for i in range(count):
                layers.append(Bottleneck(inputs, width, stride if i == 0 else 1, dilation))
                inputs = 4 * width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), conv_bn(2048, 512, 1)) for bins in (1, 2, 3, 6)
        )
        self.head = nn.Sequential(conv_bn(4096, 512, 3), nn.Dropout2d(0.1), nn.Conv2d(512, classes, 1))
        self.aux = nn.Sequential(conv_bn(1024, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1))

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        """Map images [B, 3, H, W] and labels i64 [B, H, W] to main + aux_weight * auxiliary cross entropy."""
        x = self.stem(image)
        for stage in self.stages[:3]:
            x = stage(x)
        features = self.stages[3](x)
        size = features.shape[2:]
        levels = [F.interpolate(level(features), size, mode="bilinear", align_corners=True) for level in self.levels]
        main = self.head(torch.cat([features, *levels], 1))
        losses = []
        for logits in (main, self.aux(x)):
            full = F.interpolate(logits.float(), label.shape[1:], mode="bilinear", align_corners=True)
            losses.append(F.cross_entropy(full, label, ignore_index=255))
        return losses[0] + self.aux_weight * losses[1]


def make_step(
    classes: int, blocks: tuple[int, ...], device: str, bfloat16: bool, compiled: bool
) -> Callable[..., Tensor]:
    """Return (image f32 [B, 3, H, W], label i64 [B, H, W]) -> loss, which takes one step of SGD.

    With `bfloat16`: autocast and channels_last; with `compiled`: torch.compile. Neither: eager float32, with TF32
    allowed where the device has it, as the official code runs.
    """
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    network = PSPNet(classes, blocks).to(device).train()
    if bfloat16:
        network = network.to(memory_format=torch.channels_last)
    backbone = [*network.stem.parameters(), *network.stages.parameters()]
    heads = [*network.levels.parameters(), *network.head.parameters(), *network.aux.parameters()]
    groups = [{"params": backbone, "lr": 0.01}, {"params": heads, "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
    model = torch.compile(network) if compiled else network

    def step(image: Tensor, label: Tensor) -> Tensor:
        if bfloat16:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bfloat16):
            loss = model(image, label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
