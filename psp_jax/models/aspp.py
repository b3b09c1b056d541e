"""The head of DeepLabV3: atrous spatial pyramid pooling (Chen et al., 2017, "Rethinking Atrous Convolution")."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from psp_jax.interpolation import adaptive_average_pools, resize_into
from psp_jax.models.layers import Classifier, ConvBN, torch_default_init
from psp_jax.models.valid import Valid

Array = jax.Array


def rates_at(output_stride: int) -> tuple[int, ...]:
    """Return the dilations of the 3x3 convolutions: 12, 24, 36 at output stride 8, half of it at 16 (section 4.2)."""
    return tuple(rate * 8 // output_stride for rate in (12, 24, 36))


class ASPPHead(nn.Module):
    """Image pooling, a 1x1 and dilated 3x3 convolutions side by side, a 3x3 convolution over all, and classifier.

    Source: mmsegmentation's `ASPPHead`, in its order of concatenation: the paper fuses by a 1x1 convolution instead.

    Attributes:
      rates: dilations of the 3x3 convolutions.
      channels: width of every branch and of the convolution that fuses them.
    """

    num_classes: int
    channels: int = 512
    dropout: float = 0.1
    rates: tuple[int, ...] = rates_at(8)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array, train: bool, valid: Valid = None) -> Array:
        """Map features [B, h, w, C], real in their first `valid` rows and columns, to logits f32 [B, h, w, classes]."""
        options: dict[str, Any] = {"kernel_init": torch_default_init, "dtype": self.dtype}
        size = (features.shape[1], features.shape[2])
        (pooled,) = adaptive_average_pools(features, (1,), valid)
        pooled = ConvBN(self.channels, 1, **options, name="image")(pooled, train)
        pooled = resize_into(pooled, size, valid, True)
        branches = [pooled, ConvBN(self.channels, 1, **options, name="branch0")(features, train, valid)]
        # By number, not by rate: weights of one output stride serve in a network of another, as in the paper.
        for i, rate in enumerate(self.rates, start=1):
            branch = ConvBN(self.channels, 3, dilation=rate, **options, name=f"branch{i}")
            branches.append(branch(features, train, valid))
        x = jnp.concatenate(branches, axis=-1)
        x = ConvBN(self.channels, 3, **options, name="fuse")(x, train, valid)
        return Classifier(self.num_classes, self.dropout, name="classifier")(x, train)
