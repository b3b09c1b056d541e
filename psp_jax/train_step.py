"""The training state and the one definition of a training step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from psp_jax.losses import PLAIN, PixelLoss, segmentation_loss

Array = jax.Array
Batch = dict[str, Array]

# RGB statistics of ImageNet on the 0..255 scale, which every published backbone was trained with.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@flax.struct.dataclass
class TrainState:
    """All that training needs to go on: replicated over the mesh, saved in every checkpoint.

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
    sharding: jax.sharding.Sharding,
    average: bool = False,
) -> TrainState:
    """Initialise parameters, statistics and optimizer; a pure function of `seed`, whatever the devices.

    With `average` the state also holds a running mean of the parameters, which begins with the first ones.
    """

    return jax.jit(lambda: init_state(model, optimizer, seed, average), out_shardings=sharding)()


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
    constrain: Callable[[Array], Array] = lambda x: x,
) -> StepFunction:
    """Return the pure function (state, batch) -> (state, metrics) of one optimizer step.

    The batch is global: {"image": u8 [B, H, W, 3], "label": u8 [B, H, W]}. Dropout is a function of `dropout_seed` and
    the step. `constrain` pins the sharding of maps [B, h, w, C] before the loss (a resize of a map that
    is split by rows loses the split). Metrics are scalars: loss and the parts that `segmentation_loss` names,
    grad_norm, and state_norm of the new parameters, statistics and running mean, whose decay is `ema_decay`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        image = normalize(batch["image"], mean, std)
        label = batch["label"].astype(jnp.int32)
        dropout_key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)

        def loss_fn(params: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
            outputs, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            outputs = {name: constrain(x) if x.ndim == 4 else x for name, x in outputs.items()}
            loss, parts = segmentation_loss(
                outputs,
                label,
                aux_weight=aux_weight,
                se_weight=se_weight,
                pixel_loss=pixel_loss,
                align_corners=align_corners,
                ignore_label=ignore_label,
            )
            return loss, (parts, updates["batch_stats"])

        (loss, (parts, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, **parts, "grad_norm": optax.tree.norm(gradients)}
        averaged = _average(state, params, ema_decay)
        # Whatever else goes wrong in the update shows here: the state that a checkpoint would hold.
        metrics["state_norm"] = optax.tree.norm((params, batch_stats, averaged))
        return TrainState(state.step + 1, params, batch_stats, opt_state, averaged), metrics

    return train_step


def _average(state: TrainState, params: Any, ema_decay: float) -> Any:
    """Return the running mean of the parameters with the new ones in it, None where the state holds none.

    It keeps d = min(ema_decay, (1 + t) / (10 + t)) of itself after t steps, as TensorFlow's ExponentialMovingAverage
    with num_updates: the first parameters soon count little.
    """
    if state.averaged is None:
        return None
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, state.averaged, params)
