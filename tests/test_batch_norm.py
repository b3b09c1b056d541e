"""The gradient of batch normalisation that is written down, against that of the definition, differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psp_jax.models.batch_norm import BatchNorm
from psp_jax.models.valid import inside


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("valid", [None, (4, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient(groups: int, valid: tuple[int, int] | None, relu: bool) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1, 2, (4, 5, 6, 3)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=x.shape), jnp.float32) * inside(valid or (5, 6), (5, 6))
    params = {"scale": jnp.array([0.7, 1.3, -0.4]), "bias": jnp.array([0.3, -1.0, 0.1])}
    statistics = {"mean": jnp.zeros(3), "var": jnp.ones(3)}

    def ours(x: jax.Array, params: dict) -> tuple[jax.Array, jax.Array]:
        layer, variables = BatchNorm(relu=relu), {"params": params, "batch_stats": statistics}
        y, _ = layer.apply(variables, x, True, valid, groups, mutable=["batch_stats"])
        return (y * weight).sum(), y

    def defined(x: jax.Array, params: dict) -> tuple[jax.Array, jax.Array]:
        parts = []
        for group in jnp.split(x, groups):
            real = group if valid is None else group[:, : valid[0], : valid[1]]
            y = (group - real.mean((0, 1, 2))) / jnp.sqrt(real.var((0, 1, 2)) + 1e-5)
            parts.append(y * params["scale"] + params["bias"])
        y = jnp.concatenate(parts)
        y = jnp.maximum(y, 0) if relu else y
        return (y * weight).sum(), y

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, params) for f in (ours, defined))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
