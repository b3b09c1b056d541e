"""SGD with momentum under the poly schedule, new layers learning faster, all in optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def poly_schedule(
    base_lr: float, power: float, total_steps: int, warmup_steps: int = 0, end_lr: float = 0.0
) -> optax.Schedule:
    """Return the learning rate (base_lr - end_lr) * (1 - step / total_steps) ** power + end_lr, step counted from 0.

    Source: Zhao et al. (2017), section 5.1; an `end_lr` above 0 is mmsegmentation's. With `warmup_steps` the rate is
    also multiplied by (step + 1) / warmup_steps until that reaches 1.
    """
    poly = optax.polynomial_schedule(base_lr, end_lr, power, total_steps)
    if not warmup_steps:
        return poly
    return lambda step: poly(step) * jnp.minimum(1.0, (step + 1) / warmup_steps)


def _is_head(path: tuple[Any, ...], _: Any) -> bool:
    return path[0].key != "backbone"


def _is_kernel(path: tuple[Any, ...], _: Any) -> bool:
    return path[-1].key == "kernel"


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    decay_bn_and_bias: bool,
    head_lr_multiplier: float,
) -> optax.GradientTransformation:
    """Return torch's SGD: v = momentum v + (gradient + weight_decay p); p -= rate v.

    Args:
      schedule: rate of the backbone per step.
      momentum: share of the former update that is kept.
      weight_decay: L2 penalty.
      decay_bn_and_bias: whether it also holds batch-norm parameters and biases, as in hszhao/semseg; the paper's
        Caffe network decays kernels only.
      head_lr_multiplier: factor on the rate of every parameter outside `backbone`.
    """

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda p, x: decay_bn_and_bias or _is_kernel(p, x), params)

    def heads(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(_is_head, params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.trace(decay=momentum),
        optax.masked(optax.scale(head_lr_multiplier), heads),
        optax.scale_by_learning_rate(schedule),
    )
