"""EncNet's head: a learned dictionary encodes the image, and gates the features by it (Zhang et al., CVPR 2018)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from psp_jax.models.batch_norm import BatchNorm
from psp_jax.models.layers import Classifier, ConvBN, torch_bias_init, torch_default_init
from psp_jax.models.valid import Valid, inside

Array = jax.Array


def encode(x: Array, codewords: Array, scale: Array, mask: Array | None = None) -> Array:
    """Sum residuals to codewords over all positions, softly assigned: e_k = sum_i a_ik (x_i - c_k).

    a_ik = softmax over k of s_k |x_i - c_k|^2. Both |x - c|^2 = |x|^2 - 2 x c + |c|^2 and the sum are expanded, so
    that no tensor of positions times codewords times channels exists. Source: PyTorch-Encoding's Encoding layer,
    whose scale has no minus sign before it (it starts negative), and which sums over positions, not averages.

    Args:
      x: f32 [B, h, w, D].
      codewords: f32 [K, D].
      scale: f32 [K].
      mask: bool [B, h, w, 1], which positions count; None is all of them.

    Returns:
      f32 [B, K, D].
    """
    exact = lax.Precision.HIGHEST  # differences of large numbers follow
    products = jnp.einsum("bhwd,kd->bhwk", x, codewords, precision=exact)
    distances = jnp.square(x).sum(-1, keepdims=True) - 2 * products + jnp.square(codewords).sum(-1)
    weights = jax.nn.softmax(scale * distances, axis=-1)
    if mask is not None:
        weights = weights * mask
    return jnp.einsum("bhwk,bhwd->bkd", weights, x, precision=exact) - weights.sum((1, 2))[..., None] * codewords


class Encoding(nn.Module):
    """The encoding layer (Zhang et al., 2017, "Deep TEN"): K codewords and a scale for each, all learned."""

    codewords: int = 32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Map [B, h, w, D], of which the positions in `mask` bool [B, h, w, 1] count, to f32 [B, K, D]."""
        shape = (self.codewords, x.shape[-1])
        bound = (shape[0] * shape[1]) ** -0.5

        def codewords_init(key: Array) -> Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        def scale_init(key: Array) -> Array:
            return jax.random.uniform(key, shape[:1], minval=-1.0, maxval=0.0)

        codewords = self.param("codewords", codewords_init)
        return encode(x.astype(jnp.float32), codewords, self.param("scale", scale_init), mask)


class EncHead(nn.Module):
    """Context encoding module and classifier (section 3 of the paper; PyTorch-Encoding's EncHead).

    Attributes:
      channels: width of the features that are encoded.
      codewords: K, entries of the dictionary.
      lateral: whether the outputs of the second and third stage join the last one's; all must be of one size.
    """

    num_classes: int
    channels: int = 512
    dropout: float = 0.1
    codewords: int = 32
    lateral: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, stages: list[Array], train: bool, valid: Valid = None) -> dict[str, Array]:
        """Map the backbone's four outputs [B, h, w, C], real in their first `valid` i32 [B, 2] rows and columns.

        Returns:
          logits: f32 [B, h, w, classes].
          se_logits: f32 [B, classes], whether each class is anywhere in the image.
        """
        options: dict[str, Any] = {"kernel_init": torch_default_init, "dtype": self.dtype}
        x = ConvBN(self.channels, 3, **options, name="conv")(stages[-1], train, valid)
        if self.lateral:
            levels = [x]
            for stage in (2, 3):
                level = ConvBN(self.channels, 1, **options, name=f"lateral{stage}")
                levels.append(level(stages[stage - 1], train, valid))
            x = ConvBN(self.channels, 3, **options, name="fuse")(jnp.concatenate(levels, axis=-1), train, valid)
        projected = ConvBN(self.channels, 1, **options, name="project")(x, train, valid)
        mask = None if valid is None else inside(valid, x.shape[1:3])
        codes = Encoding(self.codewords, name="encoding")(projected, mask)
        # Batch norm takes the codewords for its channels: statistics are over the images and the width.
        codes = nn.relu(BatchNorm(name="encoding_bn")(codes.swapaxes(1, 2), train))
        semantics = codes.mean(-1)
        gate = nn.sigmoid(self._dense(self.channels, "gate")(semantics))
        x = nn.relu(x + x * gate[:, None, None].astype(x.dtype))
        return {
            "logits": Classifier(self.num_classes, self.dropout, name="classifier")(x, train),
            "se_logits": self._dense(self.num_classes, "se")(semantics),
        }

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            kernel_init=torch_default_init,
            bias_init=torch_bias_init(self.channels),
            precision=lax.Precision.HIGHEST,
            name=name,
        )
