"""The training state and the one definition of a training step."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from psp_jax import parallel
from psp_jax.losses import PLAIN, PixelLoss, segmentation_loss
from psp_jax.models.batch_norm import BatchNorm
from psp_jax.models.column_pairs import ColumnPairs, convolve_pairs
from psp_jax.models.layers import Conv, ConvBN
from psp_jax.models.lowering import NATIVE, Lowering, product
from psp_jax.models.row_convolution import convolve_rows
from psp_jax.parallel import RowSplit

Array = jax.Array
Batch = dict[str, Array]

# RGB statistics of ImageNet on the 0..255 scale, which every published backbone was trained with.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@flax.struct.dataclass
class TrainState:
    """All that training needs to go on, saved in every checkpoint; see `state_shardings` for where it lives.

    `averaged` is the running mean of the parameters, None where none is kept.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    averaged: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated, as the model's `apply` takes it: parameters, averaged where they are, and statistics.

        The running statistics are those that the trained parameters gave, with averaged ones too.
        """
        params = self.params if self.averaged is None else self.averaged
        return {"params": params, "batch_stats": self.batch_stats}


StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def normalize(image: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Map u8 or float RGB 0..255 [..., 3] to f32 of about zero mean and unit variance."""
    return (image.astype(jnp.float32) - jnp.asarray(mean)) / jnp.asarray(std)


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: jax.sharding.Mesh,
    average: bool = False,
) -> TrainState:
    """Initialise parameters, statistics and optimizer; a pure function of `seed`, whatever the devices.

    With `average` the state also holds a running mean of the parameters, which begins with the first ones.
    """

    def init() -> TrainState:
        return init_state(model, optimizer, seed, average)

    return jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init), mesh))()


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Return where each array of the state lives.

    Parameters, their running mean and the optimizer's state are spread over all devices, each of which updates its
    share; step and statistics are on each.
    """
    everywhere = jax.tree.map(lambda _: parallel.replicated(mesh), state)
    spread = {name: getattr(state, name) for name in ("params", "opt_state", "averaged")}
    return replace(everywhere, **parallel.spread_shardings(spread, mesh))


def as_computed(params: Any, dtype: Any) -> Any:
    """Return parameters with the kernels of all `ConvBN` in the dtype that those compute in: what devices exchange."""
    if not isinstance(params, Mapping):
        return params
    if params.keys() == {"conv", "bn"}:
        return {**params, "conv": jax.tree.map(lambda kernel: kernel.astype(dtype), params["conv"])}
    return {name: as_computed(entry, dtype) for name, entry in params.items()}


def init_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int, average: bool) -> TrainState:
    """Return what `create_state` puts on the devices; to be traced."""
    # No parameter depends on the image size, so the smallest image that every pyramid level accepts will do.
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 64, 64, 3)), train=True)
    step, params = jnp.zeros((), jnp.int32), variables["params"]
    averaged = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(step, params, variables["batch_stats"], optimizer.init(params), averaged)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    aux_weight: float,
    align_corners: bool,
    ignore_label: int,
    dropout_seed: int,
    se_weight: float = 0.0,
    pixel_loss: PixelLoss = PLAIN,
    ema_decay: float = 0.0,
    bn_groups: int = 1,
    lowering: Lowering = NATIVE,
    split: RowSplit | None = None,
    gather: Callable[[Any], Any] = lambda tree: tree,
    spread: Callable[[Any], Any] = lambda tree: tree,
) -> StepFunction:
    """Return the pure function (state, global batch) -> (state, metrics) of one optimizer step.

    A batch is {"image": u8 [B, H, W, 3], "label": u8 [B, H, W]}. Dropout follows from `dropout_seed` and the step.
    Batch norm takes its statistics over `bn_groups` equal parts of the batch. Convolutions are computed as `lowering`
    says. With `split` the rows of every image are spread over devices. `gather` makes the parameters to compute with,
    `spread` places gradients as the parameters are. Metrics are scalars: loss, the parts that `segmentation_loss`
    names, grad_norm, state_norm of the new parameters, statistics and running mean (of `ema_decay`), invalid_labels
    (pixels neither void nor of a class), and skipped, 1 where one is invalid or not finite and only the step counts on.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        image, label = normalize(batch["image"], mean, std), batch["label"].astype(jnp.int32)
        rows, valid = label.shape[1], None
        if split is not None:
            image, label = split.extend(image, 0), split.extend(label, ignore_label)
            valid = (rows, label.shape[2])
        rngs = {"dropout": jax.random.fold_in(jax.random.key(dropout_seed), state.step)}

        def loss_fn(params: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
            variables = {"params": gather(params), "batch_stats": state.batch_stats}
            with nn.intercept_methods(functools.partial(_as_trained, bn_groups, lowering, len(image), split)):
                outputs, updates = model.apply(variables, image, True, valid, mutable=["batch_stats"], rngs=rngs)
            loss, parts = segmentation_loss(
                outputs,
                label,
                aux_weight=aux_weight,
                se_weight=se_weight,
                pixel_loss=pixel_loss,
                align_corners=align_corners,
                ignore_label=ignore_label,
                rows=rows,
                constrain=split.constrain if split is not None else lambda x: x,
            )
            invalid = _invalid_labels(label, outputs["logits"].shape[-1], ignore_label)
            return loss, (parts | {"invalid_labels": invalid}, updates["batch_stats"])

        (loss, (parts, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        new, norms = _updated(state, loss, parts, gradients, batch_stats, optimizer, ema_decay, spread)
        return new, {"loss": loss, **parts, **norms}

    return train_step


def _updated(
    state: TrainState,
    loss: Array,
    parts: Mapping[str, Array],
    gradients: Any,
    batch_stats: Any,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    spread: Callable[[Any], Any],
) -> tuple[TrainState, dict[str, Array]]:
    """Return the next state, the former one where a loss, norm or label is not sound, with the norms and `skipped`."""
    gradients = spread(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = TrainState(state.step + 1, params, batch_stats, opt_state, _average(state, params, ema_decay))
    kept = (new.params, new.batch_stats, new.averaged)  # whatever goes wrong in an update shows in their norm
    grad_norm, state_norm = optax.tree.norm(_packed(gradients)), optax.tree.norm(_packed(kept))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(state_norm)
    sound = finite & (parts["invalid_labels"] == 0)
    ours, former = _packed(new), _packed(replace(state, step=new.step))
    chosen = _unpacked([jnp.where(sound, *pair) for pair in zip(ours, former, strict=True)], new)
    skipped = 1.0 - sound.astype(jnp.float32)
    return chosen, {"grad_norm": grad_norm, "state_norm": state_norm, "skipped": skipped}


def _invalid_labels(label: Array, classes: int, ignore_label: int) -> Array:
    """Return how many pixels have a label that the network has no score for, and that is not void: f32 scalar."""
    return (((label < 0) | (label >= classes)) & (label != ignore_label)).sum(dtype=jnp.float32)


def _packed(tree: Any) -> list[Array]:
    """Return the arrays of a tree, its vectors of float32 end to end in a last one, for what is done to each number.

    A network has hundreds of them, of a few hundred numbers each, and a device takes its time for every small array.
    """
    leaves = jax.tree.leaves(tree)
    vectors = [x for x in leaves if _is_vector(x)]
    return [x for x in leaves if not _is_vector(x)] + ([jnp.concatenate(vectors)] if vectors else [])


def _unpacked(packed: list[Array], like: Any) -> Any:
    """Undo `_packed` of a tree with the structure and the shapes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    others, start = iter(packed), 0
    for i, x in enumerate(leaves):
        if _is_vector(x):
            leaves[i] = packed[-1][start : start + x.size]
            start += x.size
        else:
            leaves[i] = next(others)
    return jax.tree.unflatten(structure, leaves)


def _is_vector(x: Array) -> bool:
    return x.ndim == 1 and x.dtype == jnp.float32


def _as_trained(
    bn_groups: int,
    lowering: Lowering,
    images: int,
    split: RowSplit | None,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    """Call a layer of the network as training does: statistics by groups, chosen convolutions, maps in their places."""
    layer = context.module
    if isinstance(layer, BatchNorm):
        return call(*args, **kwargs, groups=bn_groups)
    if isinstance(layer, Conv) and context.method_name == "convolve":
        x, kernel = jax.tree.map(lambda array: array.astype(layer.dtype), args)
        # Maps in phases are a larger batch already.
        by_rows = x.shape[0] == images and x.shape[-1] <= lowering.rows_up_to
        if isinstance(x, ColumnPairs) or (lowering.pairs and layer.path[-2:] == ("stem1", "conv")):
            return convolve_pairs(x, kernel, layer.stride, layer.padding, by_rows)
        if by_rows:
            return convolve_rows(x, kernel, layer.stride, layer.dilation, layer.padding)
        if lowering.products and layer.kernel_size == 1:
            return product(x[:, :: layer.stride, :: layer.stride], kernel[0, 0])
    x = call(*args, **kwargs)
    return jax.tree.map(split.constrain, x) if split is not None and isinstance(layer, ConvBN) else x


def _average(state: TrainState, params: Any, ema_decay: float) -> Any:
    """Return the running mean of the parameters with the new ones in it, None where the state holds none.

    It keeps d = min(ema_decay, (1 + t) / (10 + t)) of itself after t steps, as TensorFlow's ExponentialMovingAverage
    with num_updates: the first parameters soon count little.
    """
    if state.averaged is None:
        return None
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, state.averaged, params)
