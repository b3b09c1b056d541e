"""Segmentation heads: from a backbone's last features to class logits at the same resolution."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from psp_jax.interpolation import adaptive_average_pools, adaptive_max_pools, resize_into, resize_matrices
from psp_jax.models.layers import Classifier, ConvBN, torch_default_init
from psp_jax.models.valid import Valid

Array = jax.Array

POOLS = {"average": adaptive_average_pools, "max": adaptive_max_pools}


class FCNHead(nn.Module):
    """3x3 convolutions and classifier: with one, the paper's baseline, and the auxiliary head on the third stage.

    Attributes:
      convs: 3x3 convolutions one after another.
      concat: whether one more takes both their input and their output. mmsegmentation's FCN has this and two `convs`.
    """

    num_classes: int
    channels: int = 512
    dropout: float = 0.1
    convs: int = 1
    concat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array, train: bool, valid: Valid = None) -> Array:
        """Map features [B, h, w, C], real in their first `valid` rows and columns, to logits f32 [B, h, w, classes]."""
        options: dict[str, Any] = {"kernel_init": torch_default_init, "dtype": self.dtype}
        x = features
        for i in range(self.convs):
            x = ConvBN(self.channels, 3, **options, name=f"conv{i or ''}")(x, train, valid)
        if self.concat:
            joined = jnp.concatenate([features, x], axis=-1)
            x = ConvBN(self.channels, 3, **options, name="fuse")(joined, train, valid)
        return Classifier(self.num_classes, self.dropout, name="classifier")(x, train)


class PSPHead(nn.Module):
    """Pyramid pooling module and classifier (Zhao et al., 2017, section 3.2).

    Attributes:
      bins: sizes of the pooled grids; (1, 2, 3, 6) in the paper, (1,) in the global-pooling rows of its Table 1.
      pool: "average" or "max".
      reduce: whether a 1x1 convolution brings each pooled map to C / len(bins) channels ("DR" in Table 1).
      channels: width of the 3x3 convolution that fuses features and context.
      align_corners: how the pooled maps are resized; True in the paper's code and hszhao/semseg.
    """

    num_classes: int
    channels: int = 512
    dropout: float = 0.1
    bins: tuple[int, ...] = (1, 2, 3, 6)
    pool: str = "average"
    reduce: bool = True
    align_corners: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array, train: bool, valid: Valid = None) -> Array:
        """Map features [B, h, w, C], real in their first `valid` rows and columns, to logits f32 [B, h, w, classes]."""
        size = (features.shape[1], features.shape[2])
        levels = []
        for bins, x in zip(self.bins, POOLS[self.pool](features, self.bins, valid), strict=True):
            if self.reduce:
                width = features.shape[-1] // len(self.bins)
                x = ConvBN(width, 1, kernel_init=torch_default_init, dtype=self.dtype, name=f"level{bins}")(x, train)
            levels.append(x)
        fuse = ConvBN(self.channels, 3, kernel_init=torch_default_init, dtype=self.dtype, name="fuse")
        if train:
            coarse = [(x, resize_matrices((x.shape[1], x.shape[2]), size, valid, self.align_corners)) for x in levels]
            x = fuse(features, train, valid, coarse)
        else:  # with operations that every format of export has
            resized = [resize_into(x, size, valid, self.align_corners) for x in levels]
            x = fuse(jnp.concatenate([features, *resized], axis=-1), train, valid)
        return Classifier(self.num_classes, self.dropout, name="classifier")(x, train)
