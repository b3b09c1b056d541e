"""The schedule's floor; the rest of the optimizer is checked with the losses."""

import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.build import build_optimizer
from psp_jax.config import defaults
from psp_jax.optimizer import poly_schedule, sgd


@pytest.mark.parametrize(("step", "expected"), [(0, 0.01), (50, 0.00505), (75, 0.002575), (100, 1e-4), (200, 1e-4)])
def test_the_schedule_ends_at_its_floor(step: int, expected: float) -> None:
    """(0.01 - 0.0001) (1 - step / 100) + 0.0001, not the larger of two rates."""
    np.testing.assert_allclose(poly_schedule(0.01, 1.0, 100, end_lr=1e-4)(step), expected, rtol=1e-5)


def test_the_power_bends_what_is_above_the_floor() -> None:
    schedule = poly_schedule(0.01, 0.9, 80_000, end_lr=1e-4)
    np.testing.assert_allclose(schedule(40_000), 0.0099 * 0.5358867 + 1e-4, rtol=1e-5)  # 0.5 ** 0.9 = 0.5358867


def test_a_run_has_the_floor_of_its_configuration() -> None:
    config = defaults()
    config.optimizer.end_lr = 1e-4
    schedule, _ = build_optimizer(config, 100)
    np.testing.assert_allclose([schedule(0), schedule(100)], [0.01, 1e-4], rtol=1e-5)


def test_heads_multiply_the_floor_too() -> None:
    params = {"backbone": {"kernel": jnp.array(1.0)}, "head": {"kernel": jnp.array(1.0)}}
    options = {"momentum": 0.0, "weight_decay": 0.0, "decay_bn_and_bias": True, "head_lr_multiplier": 10.0}
    optimizer = sgd(poly_schedule(0.01, 0.9, 1, end_lr=1e-4), **options)
    state = optimizer.init(params)
    for _ in range(2):  # the second step is at the floor
        updates, state = optimizer.update({"backbone": {"kernel": 1.0}, "head": {"kernel": 1.0}}, state, params)
    np.testing.assert_allclose(updates["backbone"]["kernel"], -1e-4, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"], -1e-3, rtol=1e-5)
