"""Dilated residual networks (He et al., 2016; Yu and Koltun, 2016), the backbone of every model here."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from psp_jax.models.layers import ConvBN, max_pool
from psp_jax.models.phases import divides, from_phases, grown, to_phases
from psp_jax.models.valid import Valid, strided, zero_beyond

Array = jax.Array

# Residual blocks per stage. 269 is the deepest of the paper's Table 3; 10 is for small data and tests.
BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    269: (3, 30, 48, 8),
}
# (kernel, width, stride) of the convolutions before the max pool; widths count in units of ResNet.width / 64.
STEMS = {
    "64-64-128": ((3, 64, 2), (3, 64, 1), (3, 128, 1)),  # the paper's and hszhao/semseg's
    "32-32-64": ((3, 32, 2), (3, 32, 1), (3, 64, 1)),  # mmsegmentation's ResNetV1c
    "7x7": ((7, 64, 2),),  # torchvision's
}
# (stride, dilation) of the four stages per output stride.
STAGES = {
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
}
FIRST_BLOCK_DILATIONS = ("full", "contracted")
BASIC_DILATIONS = ("both", "first")
STRIDES_IN = ("3x3", "1x1")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-10/18/34)."""

    width: int
    stride: int = 1
    dilations: tuple[int, int] = (1, 1)
    dtype: Any = jnp.float32
    expansion = 1

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Valid = None) -> Array:
        """Map [B, H, W, C], real in its first `valid` rows and columns, to [B, H / stride, W / stride, width]."""
        first, second = self.dilations
        y = ConvBN(self.width, 3, self.stride, first, dtype=self.dtype, name="conv1")(x, train, valid)
        after = strided(valid, self.stride)
        y = ConvBN(self.width, 3, 1, second, relu=False, dtype=self.dtype, name="conv2")(y, train, after)
        if x.shape != y.shape:
            x = ConvBN(self.width, 1, self.stride, relu=False, dtype=self.dtype, name="downsample")(x, train, valid)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (ResNet-50 and deeper); `stride_in` says which strides."""

    width: int
    stride: int = 1
    dilations: tuple[int, int] = (1, 1)
    stride_in: str = "3x3"
    dtype: Any = jnp.float32
    expansion = 4

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Valid = None) -> Array:
        """Map [B, H, W, C], real in its first `valid` rows and columns, to [B, H / stride, W / stride, 4 width]."""
        features = self.expansion * self.width
        reduce, spatial = (self.stride, 1) if self.stride_in == "1x1" else (1, self.stride)
        y = ConvBN(self.width, 1, reduce, dtype=self.dtype, name="conv1")(x, train, valid)
        valid_y = strided(valid, reduce)
        y = ConvBN(self.width, 3, spatial, self.dilations[0], dtype=self.dtype, name="conv2")(y, train, valid_y)
        y = ConvBN(features, 1, relu=False, dtype=self.dtype, name="conv3")(y, train, strided(valid_y, spatial))
        if x.shape != y.shape:
            x = ConvBN(features, 1, self.stride, relu=False, dtype=self.dtype, name="downsample")(x, train, valid)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet whose last stages trade stride for dilation, so that the features stay dense.

    Attributes:
      depth: a key of `BLOCKS`.
      stem: a key of `STEMS`.
      output_stride: input pixels per feature position: 8 (the paper's), 16 or 32.
      first_block_dilation: dilation of the first block of a dilated stage: "full", that of the stage (the paper,
        hszhao/semseg), or "contracted", that of the stage before (torchvision, mmsegmentation). Weights trained
        with one lose accuracy in the other without any error.
      basic_dilation: the 3x3 convolutions of a basic block that are dilated: "both", or "first" (mmsegmentation).
      stride_in: the convolution of a bottleneck that strides: "3x3", or "1x1" (the paper's Caffe network on ADE20K).
      width: channels of the first stage's 3x3 convolutions; 64 in every published network.
      phases: run dilated blocks on the phases of their map, where sizes divide; see `psp_jax.models.phases`. The same
        function, other compiled programs.
      remat: recompute each block's activations in the backward pass instead of storing them.
    """

    depth: int = 50
    stem: str = "64-64-128"
    output_stride: int = 8
    first_block_dilation: str = "full"
    basic_dilation: str = "both"
    stride_in: str = "3x3"
    width: int = 64
    phases: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Valid = None) -> list[Array]:
        """Map images [B, H, W, 3] to the outputs of the four stages, the last [B, h, w, 8 or 32 width].

        Where only the first `valid` i32 [B, 2] rows and columns of each image are real and the rest zero, the outputs
        are those of the smaller images, with numbers around that mean nothing.
        """
        for i, (kernel, width, stride) in enumerate(STEMS[self.stem], start=1):
            x = ConvBN(width * self.width // 64, kernel, stride, dtype=self.dtype, name=f"stem{i}")(x, train, valid)
            valid = strided(valid, stride)
        x, valid = max_pool(zero_beyond(x, valid), train), strided(valid, 2)
        basic = self.depth < 50
        block_class: Any = BasicBlock if basic else Bottleneck
        options: dict[str, Any] = {"dtype": self.dtype} | ({} if basic else {"stride_in": self.stride_in})
        if self.remat:
            # A pair of `valid` is known while tracing, and must stay so.
            static = (2,) if isinstance(valid, Array) else (2, 3)
            block_class = nn.remat(block_class, static_argnums=static)
        outputs = []
        stages = zip(BLOCKS[self.depth], STAGES[self.output_stride], strict=True)
        previous, grid = 1, 1
        for stage, (blocks, (stride, dilation)) in enumerate(stages):
            for i in range(blocks):
                first = previous if i == 0 and self.first_block_dilation == "contracted" else dilation
                second = 1 if self.basic_dilation == "first" and basic else dilation
                if grid > 1 and not first == second == grid:
                    x, valid, grid = from_phases(x, grid), grown(valid, grid), 1
                if self.phases and grid == 1 and first == second and divides(x, valid, first):
                    x, valid, grid = to_phases(x, first), strided(valid, first), first
                block = block_class(
                    self.width * 2**stage,
                    stride if i == 0 else 1,
                    (first // grid, second // grid),
                    **options,
                    name=f"layer{stage + 1}_block{i}",
                )
                x = block(x, train, valid)
                valid = strided(valid, stride if i == 0 else 1)
            previous = dilation
            outputs.append(from_phases(x, grid))
        return outputs
