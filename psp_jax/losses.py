"""Pixel-wise cross entropy with void pixels, EncNet's loss on the classes present, and the sum that is minimised."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
from jax import lax

from psp_jax.interpolation import resize
from psp_jax.region_losses import dice_loss, lovasz_softmax
from psp_jax.resized_sum import resized_sum

Array = jax.Array

WEIGHTINGS = ("none", "inverse_log_frequency")


@dataclass(frozen=True)
class PixelLoss:
    """What the loss of a map of class scores is made of; the defaults are the plain cross entropy.

    Attributes:
      cross_entropy, dice, lovasz: weights of the cross entropy, of `dice_loss` and of `lovasz_softmax`.
      class_weights: factor of each class's pixels in the cross entropy, in its sum and in its number; () is 1 for all.
      class_weighting: how the class weights are to be made of the training split, before this is of use; none is not.
      label_smoothing: share of the target that is spread evenly over all classes, from 0 to 1.
      ohem_threshold: pixels whose class has at least this probability do not count (online hard example mining); 0 is
        off, usual is 0.7.
      ohem_min_kept: this many pixels an image, on average over the batch, count in any case: the least probable ones.

    Raises:
      ValueError: a value makes no loss.
    """

    cross_entropy: float = 1.0
    dice: float = 0.0
    lovasz: float = 0.0
    class_weights: tuple[float, ...] = ()
    class_weighting: str = "none"
    label_smoothing: float = 0.0
    ohem_threshold: float = 0.0
    ohem_min_kept: int = 0

    def __post_init__(self) -> None:
        parts = {name: getattr(self, name) for name in ("cross_entropy", "dice", "lovasz")}
        for name, weight in parts.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"loss.{name}={weight} is no weight; choose 0 (off) or more.")
        if not any(parts.values()):
            raise ValueError("loss.cross_entropy, loss.dice and loss.lovasz are all 0; give one of them a weight.")
        idle = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        idle = [f"loss.{name}" for name in idle if name not in parts]
        if idle and not self.cross_entropy:
            raise ValueError(f"loss.cross_entropy=0 leaves nothing for {', '.join(idle)} to act on; give it a weight.")
        numbers = all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in self.class_weights)
        if self.class_weights and not (numbers and any(self.class_weights)):
            raise ValueError(
                f"loss.class_weights={self.class_weights} must be finite numbers of at least 0, not all 0; () is none."
            )
        if self.class_weighting not in WEIGHTINGS:
            raise ValueError(
                f"loss.class_weighting={self.class_weighting!r} is unknown; choose one of: {', '.join(WEIGHTINGS)}."
            )
        if self.class_weights and self.class_weighting != "none":
            raise ValueError(
                f"loss.class_weights and loss.class_weighting={self.class_weighting} are both given; choose one."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing={self.label_smoothing} must be at least 0 and below 1.")
        if not 0 <= self.ohem_threshold <= 1:
            raise ValueError(f"loss.ohem_threshold={self.ohem_threshold} is no probability; choose 0 (off) to 1.")
        if self.ohem_min_kept < 0 or (self.ohem_min_kept and not self.ohem_threshold):
            raise ValueError(
                f"loss.ohem_min_kept={self.ohem_min_kept} must be at least 0, and 0 without loss.ohem_threshold."
            )

    def check(self, num_classes: int) -> None:
        """Raise ValueError where the class weights are not as many as the classes."""
        if self.class_weights and len(self.class_weights) != num_classes:
            raise ValueError(
                f"loss.class_weights holds {len(self.class_weights)} numbers; give one for each of the {num_classes} "
                "classes, or () for none."
            )


PLAIN = PixelLoss()


def cross_entropy(logits: Array, label: Array, ignore_label: int, options: PixelLoss = PLAIN) -> Array:
    """Average cross entropy over every pixel of the batch that is not void.

    Class weights and label smoothing are those of torch's `cross_entropy`: with both, the even part weighs each class
    by its own weight, and the sum is divided by the weights of the pixels' classes.

    Args:
      logits: f32 [B, H, W, C].
      label: integers [B, H, W]; pixels equal to `ignore_label` count neither in the sum nor in the number.
      ignore_label: value of void pixels and padding.
      options: class weights, smoothing and mining; the weights of the parts have no effect here.

    Returns:
      Scalar; 0 where every pixel is void. Under `jax.jit` with a sharded batch the sum and the number are global,
      so devices with more valid pixels weigh more (a mean of per-device means would weigh them alike).

    Raises:
      ValueError: `options` names a class weighting, but holds no weights.
    """
    weight, target = _targets(label, logits.shape[-1], ignore_label, options, axis=-1)
    log_sum = jax.nn.logsumexp(logits, -1)
    per_pixel = weight * log_sum - (target * logits).sum(-1)
    counted = label != ignore_label
    if options.ohem_threshold:
        own = jnp.where(_one_hot(label, logits.shape[-1], -1), logits, 0.0).sum(-1)
        counted = hard_pixels(jnp.exp(own - log_sum), counted, options.ohem_threshold, options.ohem_min_kept)
    return jnp.where(counted, per_pixel, 0.0).sum() / _number(label, counted, options)


def resized_cross_entropy(
    scores: Array,
    label: Array,
    ignore_label: int,
    align_corners: bool,
    options: PixelLoss = PLAIN,
    valid: tuple[int, int] | None = None,
    real: tuple[int, int] | None = None,
    constrain: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """Return the `cross_entropy` of class scores f32 [B, h, w, C] at the label's size, at which they are never stored.

    `valid`, `real` and `constrain` are those of `resized_sum`. `options` mine no hard examples, which compares all
    pixels.
    """

    def targets(label: Array) -> tuple[Array, Array]:
        return _targets(label, scores.shape[-1], ignore_label, options, axis=-2)

    total = resized_sum(targets, scores, label, ignore_label, align_corners, valid, real, constrain)
    return total / _number(label, label != ignore_label, options)


def _targets(label: Array, classes: int, ignore_label: int, options: PixelLoss, axis: int) -> tuple[Array, Array]:
    """Return of each pixel the weight of the log of its sum, and the weights of its logits, with classes along `axis`.

    Their difference is the pixel's part of the cross entropy; both are 0 for void pixels.
    """
    if options.class_weighting != "none":
        raise ValueError(f"Make class_weights of class_weighting={options.class_weighting!r} first.")
    counted = label != ignore_label
    # A masked sum picks the label's logit; unlike a gather its gradient is no scatter.
    own = _one_hot(jnp.where(counted, label, -1), classes, axis)
    target = jnp.where(own, 1 - options.label_smoothing, 0.0)
    each = jnp.asarray(options.class_weights or (1.0,) * classes, jnp.float32)
    each = jnp.expand_dims(each, tuple(range(axis + 1, 0)))
    if options.class_weights:
        target = target * each
    if options.label_smoothing:
        target += jnp.where(jnp.expand_dims(counted, axis), each * (options.label_smoothing / classes), 0.0)
    return target.sum(axis) if options.class_weights else counted.astype(jnp.float32), target


def _number(label: Array, counted: Array, options: PixelLoss) -> Array:
    """Return what the sum over pixels is divided by: the number of those counted, or the sum of their weights."""
    if not options.class_weights:
        return jnp.maximum(counted.sum(dtype=jnp.int32), 1)
    classes = jnp.asarray(options.class_weights)
    weight = jnp.where(_one_hot(label, len(classes), -1), classes, 0.0).sum(-1)
    weights = jnp.where(counted, weight, 0.0).sum()
    return jnp.where(weights > 0, weights, 1.0)


def _one_hot(label: Array, classes: int, axis: int) -> Array:
    label = jnp.expand_dims(label, axis)
    shape = (1,) * (label.ndim + axis) + (classes,) + (1,) * (-axis - 1)
    return lax.broadcasted_iota(label.dtype, shape, label.ndim + axis) == label


def hard_pixels(probability: Array, valid: Array, threshold: float, min_kept: int) -> Array:
    """Return which valid pixels are hard: bool [B, H, W].

    Source: online hard example mining (Shrivastava et al., 2016) as in HRNet and mmsegmentation, over the whole batch.

    Args:
      probability: f32 [B, H, W], of each pixel's own class.
      valid: bool [B, H, W].
      threshold: a pixel below this probability is hard.
      min_kept: so are the min_kept * B least probable, and those that are equal to the last of them.
    """
    probability = jnp.where(valid, lax.stop_gradient(probability), 2.0)
    hard = probability < threshold
    if min_kept:
        hard |= probability <= _smallest(probability, min(min_kept * probability.shape[0], probability.size))
    return hard & valid


def _smallest(values: Array, k: int) -> Array:
    """Return the k-th smallest (from 1) of values f32 >= 0, by bisection: no sort of a batch over all devices."""
    bits = lax.bitcast_convert_type(values, jnp.int32)  # which order as the values do

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = (bits <= middle).sum(dtype=jnp.int32) >= k
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low, _ = lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(2**31 - 1)))
    return lax.bitcast_convert_type(low, jnp.float32)


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
    pixel_loss: PixelLoss = PLAIN,
    rows: int | None = None,
    constrain: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, dict[str, Array]]:
    """Return main + aux_weight * auxiliary + se_weight * presence loss, and its parts.

    Source: Zhao et al. (2017), section 3.3; Zhang et al. (2018), section 3.1.

    Args:
      outputs: "logits" and perhaps "aux_logits", f32 [B, h, w, C]; they are resized to the label's size first. Perhaps
        "se_logits", f32 [B, C].
      label: integers [B, H, W].
      pixel_loss: parts of the main and of the auxiliary loss, the same for both; but hard examples are mined for the
        main loss alone, as in its sources.
      rows: of the label that are real; the rest is void, added together with whole rows of features.
      constrain: pins the sharding of class scores [B, H, W, C].

    Returns:
      The loss to minimise, and its parts, each a scalar over the whole batch: "main_loss" and "aux_loss", weighted sums
      of what `pixel_loss` names (aux_loss is 0 without "aux_logits"); of the main one, where they have a weight, also
      "dice_loss" and "lovasz_loss" by themselves; with "se_logits" also "se_loss".
    """
    losses = {"aux_loss": jnp.zeros(())}
    for name, key in (("main_loss", "logits"), ("aux_loss", "aux_logits")):
        if key in outputs:
            parts = pixel_loss if name == "main_loss" else replace(pixel_loss, ohem_threshold=0.0, ohem_min_kept=0)
            losses[name], regions = _map_loss(outputs[key], label, ignore_label, parts, align_corners, rows, constrain)
            losses |= regions if name == "main_loss" else {}
    loss = losses["main_loss"] + aux_weight * losses["aux_loss"]
    if "se_logits" in outputs:
        losses["se_loss"] = presence_loss(outputs["se_logits"], label, ignore_label)
        loss += se_weight * losses["se_loss"]
    return loss, losses


def _map_loss(
    scores: Array,
    label: Array,
    ignore_label: int,
    options: PixelLoss,
    align_corners: bool,
    rows: int | None,
    constrain: Callable[[Array], Array],
) -> tuple[Array, dict[str, Array]]:
    """Return the weighted sum of the parts that `options` names, and those of regions by themselves."""
    canvas, grid = (label.shape[1], label.shape[2]), (scores.shape[1], scores.shape[2])
    valid = (rows or canvas[0], canvas[1])
    real = -(-valid[0] * grid[0] // canvas[0])
    if not (options.dice or options.lovasz or options.ohem_threshold):
        sizes = valid, (real, grid[1])
        entropy = resized_cross_entropy(scores, label, ignore_label, align_corners, options, *sizes, constrain)
        return options.cross_entropy * entropy, {}
    exact = lax.Precision.HIGHEST  # as in `resized_sum`
    logits = constrain(resize(scores, valid, align_corners, exact, valid=(real, grid[1]), canvas=canvas))
    total, regions = jnp.zeros(()), {}
    if options.cross_entropy:
        total += options.cross_entropy * cross_entropy(logits, label, ignore_label, options)
    for name, weight, loss in (("dice_loss", options.dice, dice_loss), ("lovasz_loss", options.lovasz, lovasz_softmax)):
        if weight:
            regions[name] = loss(logits, label, ignore_label)
            total += weight * regions[name]
    return total, regions
