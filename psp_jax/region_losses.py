"""Losses of whole regions: the soft Dice loss, and the Lovasz extension of the Jaccard loss."""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def dice_loss(logits: Array, label: Array, ignore_label: int) -> Array:
    """Average, over the classes that the batch holds, 1 - 2 sum(p y) / (sum(p) + sum(y)).

    p is a class's softmax probability, y is 1 on its own pixels and 0 on others; the sums are over all labelled pixels
    of the batch. Source: DiceLoss of segmentation_models.pytorch in multiclass mode, which has no squares and no
    smoothing either, but divides by the number of all classes, so that its scale falls with the classes absent.

    Args:
      logits: f32 [B, H, W, C].
      label: integers [B, H, W].
      ignore_label: value of void pixels and padding, which count nowhere.

    Returns:
      Scalar; 0 where every pixel is void. Under `jax.jit` with a sharded batch all sums are global.
    """
    classes = lax.broadcasted_iota(label.dtype, logits.shape, label.ndim)
    counted = (label != ignore_label)[..., None]
    own = (classes == label[..., None]) & counted
    probability = jax.nn.softmax(logits)
    pixels = own.sum((0, 1, 2), dtype=jnp.int32)
    both = jnp.where(own, probability, 0.0).sum((0, 1, 2))
    either = jnp.where(counted, probability, 0.0).sum((0, 1, 2)) + pixels
    present = pixels > 0
    each = jnp.where(present, 1 - 2 * both / jnp.where(present, either, 1.0), 0.0)
    return each.sum() / jnp.maximum(present.sum(), 1)


def lovasz_softmax(logits: Array, label: Array, ignore_label: int) -> Array:
    """Average, over the classes that the batch holds, the Lovasz extension of the Jaccard loss of its pixels' errors.

    Source: Berman et al., CVPR 2018, section 3.1, over the whole batch (their code's classes="present",
    per_image=False). Classes are taken one after another, since each needs a sort of all pixels; with a sharded batch
    every device sorts all of them.

    Args:
      logits: f32 [B, H, W, C].
      label: integers [B, H, W].
      ignore_label: value of void pixels and padding, which count nowhere.

    Returns:
      Scalar; 0 where every pixel is void.
    """
    counted = label != ignore_label
    probability = jnp.moveaxis(jax.nn.softmax(logits), -1, 0)

    def slopes(item: tuple[Array, Array]) -> Array:
        index, probability = item
        own = (label == index) & counted
        error = jnp.where(counted, jnp.where(own, 1 - probability, probability), -1.0)  # void comes last

        def sorted_slopes() -> Array:
            slope = _jaccard_slopes(error.ravel(), own.ravel()).reshape(label.shape)
            return jnp.where(counted, jnp.where(own, -slope, slope), 0.0)

        return lax.cond(own.any(), sorted_slopes, lambda: jnp.zeros(label.shape))

    # While the order of the errors stays, a class's loss is linear in its probabilities: no gradient through a sort.
    slope = lax.map(slopes, (jnp.arange(len(probability)), lax.stop_gradient(probability)))
    constant = -jnp.minimum(slope, 0.0).sum()  # of own pixels, whose error is 1 - probability
    present = (slope < 0).any((1, 2, 3)).sum()
    return ((slope * probability).sum() + constant) / jnp.maximum(present, 1)


def _jaccard_slopes(error: Array, own: Array) -> Array:
    """Return the derivative of the Lovasz extension of the Jaccard loss by each error, >= 0: f32 [P].

    It is what the Jaccard loss grows by when the pixel joins those that are wrong, the largest error first (algorithm
    1 of the paper). The differences of neighbours are written out, since float32 would lose them over many pixels.

    Args:
      error: f32 [P].
      own: bool [P], whether the pixel is of the class; one of them at least.
    """
    pixels = lax.iota(jnp.int32, error.size)
    _, own, pixels = lax.sort((-error, own, pixels), num_keys=1)
    intersection = own.sum(dtype=jnp.int32) - jnp.cumsum(own, dtype=jnp.int32)
    union = (own.sum(dtype=jnp.int32) + jnp.cumsum(~own, dtype=jnp.int32)).astype(jnp.float32)
    slope = jnp.where(own, 1 / union, intersection / (union * (union - 1)))
    return lax.sort((pixels, slope), num_keys=1)[1]
