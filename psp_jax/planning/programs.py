"""Compiles what a run executes, the training step and the evaluation, and asks the compiler what it costs."""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from psp_jax import checks, parallel, protocols
from psp_jax.build import abstract_arguments, build_optimizer, build_step
from psp_jax.classes import ClassTable
from psp_jax.inference import TILE, counted, make_eval_step, make_forward
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model, variable_shapes
from psp_jax.planning.program_text import Cost, program_cost
from psp_jax.sliding import make_scorer, make_sliding_step
from psp_jax.train_step import IMAGENET_MEAN, IMAGENET_STD
from psp_jax.workdir import ModelCard


@dataclass(frozen=True)
class Program:
    """What the compiler tells of a program, for each chip.

    Attributes:
      seconds: that the compiler took.
      memory: bytes by kind; {} where it does not fit the chip.
      refusal: the compiler's own words where it does not fit.
      flops: the compiler's count, which includes the zeros that it computes with.
      cost: cycles and collectives; cycles are 0 where the compiler does not estimate them (CPU, GPU).
      text: the program.
    """

    seconds: float
    memory: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    flops: float = 0.0
    cost: Cost = field(default_factory=Cost)
    text: str = ""

    @property
    def total(self) -> int | None:
        """Bytes of a chip's memory in use at most; None where it does not fit."""
        return sum(self.memory.values()) if self.memory else None


def compile_training(config: ConfigDict, classes: ClassTable, steps: int, mesh: Mesh) -> Program:
    """Compile the step that training runs."""
    step, (state, batch) = _training_step(config, classes, steps, mesh)
    kinds = {
        "parameters": state.params,
        "batch statistics": state.batch_stats,
        "optimizer state": state.opt_state,
        "averaged parameters": state.averaged,
        "batch": batch,
    }
    return _compiled(step, (state, batch), kinds)


def training_flops(config: ConfigDict, classes: ClassTable, steps: int) -> float:
    """Return the operations of a step for the whole batch, before any compiler has changed it.

    A multiply-add is two. Neither what a convolution multiplies with the zeros around an image counts, nor what is
    computed again to save memory (model.remat).
    """
    config = config.copy_and_resolve_references()
    config.model.update(convolutions="native", phases=False, remat=False)
    step, arguments = _training_step(config, classes, steps, parallel.make_mesh(1, 1, jax.devices("cpu")[:1]))
    return float(step.lower(*arguments).cost_analysis()["flops"])


def _training_step(config: ConfigDict, classes: ClassTable, steps: int, mesh: Mesh) -> tuple[Any, tuple[Any, Any]]:
    loss = PixelLoss(**config.loss)
    if loss.class_weighting != "none":  # made of the labels when a run begins; of these only the number matters here
        loss = replace(loss, class_weights=(1.0,) * classes.num_classes, class_weighting="none")
    loss.check(classes.num_classes)
    model = build_model(config.model, classes.num_classes)
    _, optimizer = build_optimizer(config, steps)
    step = build_step(config, classes.ignore_label, model, optimizer, mesh, loss)
    return step, abstract_arguments(config, model, optimizer, mesh)


@dataclass(frozen=True)
class Evaluation:
    """The evaluation's program for images of one size.

    Attributes:
      program: what each chip runs.
      images: that all chips together evaluate with one run of it.
      turns: how often each of its loops turns for such an image: over batches of windows, if there are any, and tiles.
      windows: of an image; 1 where it is scored as a whole.
    """

    program: Program
    images: int
    turns: Sequence[int]
    windows: int

    @property
    def cycles(self) -> int:
        """Estimated cycles of one run; 0 where there is no estimate, or the compiler made other loops of these."""
        cost = self.program.cost
        if len(cost.loops) != len(self.turns):
            return 0
        return cost.cycles + sum((n - 1) * turn for n, turn in zip(self.turns, cost.loops, strict=True))


def compile_evaluation(config: ConfigDict, classes: ClassTable, size: tuple[int, int], mesh: Mesh) -> Evaluation:
    """Compile what evaluates images of original `size` (height, width) by the protocol of `config.eval`."""
    options, crop = config.eval, checks.crop_size(config)
    sides = options.base_size, checks.eval_window(config), options.stride, crop
    protocol = protocols.choose(options.protocol, options.scales, *sides)
    canvas, base_size = checks.eval_size(config), 512  # the protocol knows its own base size
    card = ModelCard(config.model.to_dict(), classes, IMAGENET_MEAN, IMAGENET_STD, canvas, crop, base_size)
    forward = make_forward(build_model(config.model, classes.num_classes), card.mean, card.std)
    height, width = (math.ceil(side / TILE) for side in size)  # in tiles
    example: dict[str, Any] = {
        "image": np.zeros((height * TILE, width * TILE, 3), np.uint8),
        "label": np.zeros((height * TILE, width * TILE), np.uint8),
        "size": np.zeros(2, np.int32),
        "index": np.zeros((), np.int32),
    }
    step: Any
    if protocol is None:
        images, sharding = options.batch_size, parallel.image_sharding(mesh, options.batch_size)
        step = make_eval_step(
            forward, num_classes=classes.num_classes, canvas=canvas, align_corners=config.model.align_corners
        )
        example |= {"image": np.zeros((*canvas, 3), np.uint8), "valid": np.zeros(2, np.int32)}
        windows, turns = 1, [height * width]
    else:
        images, sharding = mesh.size, parallel.all_devices_sharding(mesh)
        ((fixed, _),) = protocols.grouped(protocol, [size])
        scorer = make_scorer(card, forward, fixed, [size], options.window_batch)
        step = make_sliding_step(scorer, mesh)
        example |= scorer.plan(size)
        windows = int(example["count"])
        turns = [math.ceil(windows / options.window_batch), height * width]
    batch = {name: _abstract(np.broadcast_to(x, (images, *np.shape(x))), sharding) for name, x in example.items()}
    shapes = variable_shapes(card.model, classes.num_classes)
    variables = jax.tree.map(lambda x: _abstract(x, parallel.replicated(mesh)), shapes)
    kinds = {"parameters": variables["params"], "batch statistics": variables["batch_stats"], "batch": batch}
    return Evaluation(_compiled(counted(step, mesh, sharding), (variables, batch), kinds), images, turns, windows)


def _abstract(array: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _compiled(function: Any, arguments: tuple[Any, ...], kinds: dict[str, Any]) -> Program:
    """Compile a jitted function for abstract arguments, which `kinds` names the parts of."""
    lowered = function.lower(*arguments)
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Program(time.monotonic() - start, refusal=_refusal(str(error)))
    seconds, text = time.monotonic() - start, compiled.as_text()
    parts = {kind: shard_bytes(tree) for kind, tree in kinds.items()}
    found = memory_by_kind(compiled.memory_analysis(), parts)
    flops = compiled.cost_analysis()["flops"]
    return Program(seconds, found, flops=float(flops), cost=program_cost(text), text=text)


def _refusal(message: str) -> str:
    """Return the sentence of the compiler that tells the sizes."""
    line = message.splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
    return re.sub(r" ?HLO module: .*", "", re.sub(r"^E\d+: \w+: ", "", line))


def shard_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of arrays, abstract ones too; None in it has none."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_by_kind(analysis: Any, parts: dict[str, int]) -> dict[str, int]:
    """Return what a chip's memory holds while a program runs, in bytes by kind; kinds that take nothing are left out.

    Args:
      analysis: `compiled.memory_analysis()`.
      parts: bytes of the arguments by kind, as arrays. On a TPU, where arrays are made of tiles, they take more; an
        argument that is not used takes nothing.
    """
    found = parts | {
        "padding, less what is not used": analysis.argument_size_in_bytes - sum(parts.values()),
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,  # the state takes the old one's place
        "activations and other temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    return {kind: size for kind, size in found.items() if size}


def largest_count(total: Callable[[int], int | None], first: int, limit: int) -> int:
    """Return the largest number of images that takes at most `limit` bytes, 0 if not even one does.

    Memory grows about linearly, so that each two sizes tell where to look next; at most eight are asked for.

    Args:
      total: bytes for a number of images, None where they do not fit; dear.
      first: the number to begin with.
      limit: bytes.
    """
    sizes: dict[int, int] = {}
    over, count = 0, first  # the smallest number known not to fit, 0 where none is
    for _ in range(8):
        size = total(count)
        if size is None or size > limit:
            over = count
        else:
            sizes[count] = size
        best = max(sizes, default=0)
        if over == best + 1:
            break
        if len(sizes) < 2:
            count = (best + over) // 2 if over else 2 * best
            continue
        below = sorted(sizes)[-2]
        growth = max((sizes[best] - sizes[below]) / (best - below), 1)
        count = best + int((limit - sizes[best]) / growth)
        if count == best:
            break
        if over and count >= over:
            count = (best + over) // 2
    return max(sizes, default=0)
