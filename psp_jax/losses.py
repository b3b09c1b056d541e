"""Pixel-wise cross entropy with void pixels, EncNet's loss on the classes present, and the sum that is minimised."""

import jax
import jax.numpy as jnp
from jax import lax

from psp_jax.interpolation import resize

Array = jax.Array


def cross_entropy(logits: Array, label: Array, ignore_label: int) -> Array:
    """Average cross entropy over every pixel of the batch that is not void.

    Args:
      logits: f32 [B, H, W, C].
      label: integers [B, H, W]; pixels equal to `ignore_label` count neither in the sum nor in the number.
      ignore_label: value of void pixels and padding.

    Returns:
      Scalar; 0 where every pixel is void. Under `jax.jit` with a sharded batch the sum and the number are global,
      so devices with more valid pixels weigh more (a mean of per-device means would weigh them alike).
    """
    classes = lax.broadcasted_iota(label.dtype, (*label.shape, logits.shape[-1]), label.ndim)
    # A masked sum picks the label's logit; unlike a gather its gradient is no scatter.
    picked = jnp.where(classes == label[..., None], logits, 0.0).sum(-1)
    valid = label != ignore_label
    per_pixel = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    return per_pixel.sum() / jnp.maximum(valid.sum(dtype=jnp.int32), 1)


def presence_loss(logits: Array, label: Array, ignore_label: int) -> Array:
    """Average, over images and classes, the binary cross entropy of telling which classes a crop holds.

    Source: the semantic encoding loss of EncNet (Zhang et al., CVPR 2018, section 3.1).

    Args:
      logits: f32 [B, C].
      label: integers [B, H, W]; a class is present where any pixel has it, however few.
      ignore_label: value of void pixels and padding; never a class.

    Returns:
      Scalar; under `jax.jit` presence is over whole crops and the mean over all images, however they are sharded.
    """
    classes = jnp.arange(logits.shape[-1])
    named = (label[..., None] == classes) & (label != ignore_label)[..., None]
    present = named.any((1, 2)).astype(jnp.float32)
    return (jax.nn.softplus(logits) - logits * present).mean()


def segmentation_loss(
    outputs: dict[str, Array],
    label: Array,
    *,
    aux_weight: float,
    align_corners: bool,
    ignore_label: int,
    se_weight: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Return main + aux_weight * auxiliary + se_weight * presence loss, and its parts.

    Source: Zhao et al. (2017), section 3.3; Zhang et al. (2018), section 3.1.

    Args:
      outputs: "logits" and perhaps "aux_logits", f32 [B, h, w, C]; they are resized to the label's size first. Perhaps
        "se_logits", f32 [B, C].
      label: integers [B, H, W].

    Returns:
      The loss to minimise, and {"main_loss", "aux_loss"} and, with "se_logits", "se_loss", each a scalar over the whole
      batch; aux_loss is 0 without "aux_logits".
    """
    losses = {"aux_loss": jnp.zeros(())}
    for name, key in (("main_loss", "logits"), ("aux_loss", "aux_logits")):
        if key in outputs:
            # The class scores stay exact in float32; the default on TPU would round them to bfloat16.
            logits = resize(outputs[key], (label.shape[1], label.shape[2]), align_corners, lax.Precision.HIGHEST)
            losses[name] = cross_entropy(logits, label, ignore_label)
    loss = losses["main_loss"] + aux_weight * losses["aux_loss"]
    if "se_logits" in outputs:
        losses["se_loss"] = presence_loss(outputs["se_logits"], label, ignore_label)
        loss += se_weight * losses["se_loss"]
    return loss, losses
