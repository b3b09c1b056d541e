"""The compiled training step that a configuration describes: one definition for training, planning and benchmarks."""

import functools
import math
from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from psp_jax import checks, parallel
from psp_jax.losses import PixelLoss
from psp_jax.models.lowering import Lowering
from psp_jax.models.segmentor import DTYPES
from psp_jax.optimizer import poly_schedule, sgd
from psp_jax.train_step import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    StepFunction,
    TrainState,
    as_computed,
    init_state,
    make_train_step,
    state_shardings,
)

# XLA's own conversion of images into a batch for convolutions makes the step of four images a chip take twice as long,
# by the compiler's estimate for v5e; with one or a part of one, `model.convolutions` does better.
TPU_OPTIONS = {
    "xla_tpu_run_space_to_batch": "false",
    "xla_tpu_run_space_to_batch_on_new_platforms": "false",
}


def build_optimizer(config: ConfigDict, steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Return the learning rate of `config.optimizer` over `steps` steps, and the optimizer that follows it."""
    options = config.optimizer
    schedule = poly_schedule(options.base_lr, options.power, steps, options.warmup_steps, options.end_lr)
    optimizer = sgd(
        schedule,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        decay_bn_and_bias=options.decay_bn_and_bias,
        head_lr_multiplier=options.head_lr_multiplier,
    )
    return schedule, optimizer


def build_step(
    config: ConfigDict,
    ignore_label: int,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    pixel_loss: PixelLoss,
) -> StepFunction:
    """Return the jitted training step, which takes over (donates) the state that it is given.

    Args:
      config: checked and complete.
      ignore_label: value of void pixels.
      model: `build_model(config.model, classes)`.
      optimizer: the second result of `build_optimizer`.
      mesh: of `parallel.make_mesh`.
      pixel_loss: that of `config.loss`, with its class weights.
    """
    train_step = make_train_step(
        model,
        optimizer,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        aux_weight=config.train.aux_weight,
        se_weight=config.train.se_weight,
        pixel_loss=pixel_loss,
        ema_decay=config.train.ema_decay,
        align_corners=config.model.align_corners,
        ignore_label=ignore_label,
        dropout_seed=config.seed,
        bn_groups=checks.bn_groups(config),
        lowering=choose_lowering(config, mesh),
        split=parallel.split_rows(
            mesh, config.train.batch_size, checks.crop_size(config)[0], config.model.output_stride
        ),
        gather=functools.partial(_gathered, dtype=DTYPES[config.model.dtype], mesh=mesh),
        spread=functools.partial(parallel.spread, mesh=mesh),
    )
    shardings = (state_shardings(_state_shape(config, model, optimizer), mesh), parallel.replicated(mesh))
    options = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def _gathered(params: Any, dtype: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(as_computed(params, dtype), parallel.replicated(mesh))


def choose_lowering(config: ConfigDict, mesh: Mesh) -> Lowering:
    """Choose how convolutions are computed; `auto` is by rows where a TPU chip has one image or less.

    With more of them it is those of the images themselves alone, of which a register would hold three numbers a lane
    row, and the layers up to the first pooling go by pairs of columns. But rows of several images that are spread over
    the same devices do not make a batch without being gathered. On a CPU `auto` makes products of the 1x1 convolutions;
    strided ones would be gathered where rows are spread.
    """
    single, whole = config.train.batch_size == mesh.shape["data"], mesh.shape["spatial"] == 1
    platform = mesh.devices.flat[0].platform
    if config.model.convolutions == "auto":
        rows = (math.inf if single else 3) if platform == "tpu" and (single or whole) else 0
        return Lowering(rows, products=platform == "cpu" and whole, pairs=platform == "tpu" and not single)
    return Lowering(math.inf if config.model.convolutions == "rows" and (single or whole) else 0)


def abstract_arguments(
    config: ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Batch]:
    """Return shapes, dtypes and shardings of what the training step takes, without an array of them.

    With them the step compiles for devices that are not there.
    """
    state = _state_shape(config, model, optimizer)
    crop, images = checks.crop_size(config), config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((images, *crop, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((images, *crop), "uint8"),
    }

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    feed = dict.fromkeys(batch, parallel.batch_axis_sharding(mesh))
    return placed(state, state_shardings(state, mesh)), placed(batch, feed)


def _state_shape(config: ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation) -> TrainState:
    return jax.eval_shape(lambda: init_state(model, optimizer, config.seed, bool(config.train.ema_decay)))
