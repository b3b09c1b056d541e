"""EncNet's head: the encoding against hand values and against the direct sum, its parts, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import abstract, count

from psp_jax.deploy.fold import fold_batch_norm
from psp_jax.models.encnet import EncHead, Encoding, encode

# Far from the origin too, where the expanded form subtracts large numbers.
OFFSETS = pytest.mark.parametrize("offset", [0.0, 3.0])


def test_encoding_by_hand() -> None:
    """One position and two codewords at squared distances 1 and 4, then two positions, of which one counts twice."""
    codewords, scale = jnp.array([[0.0], [3.0]]), jnp.array([-1.0, -0.5])
    share = 1 / (1 + np.exp(-2.0 + 1.0))  # softmax of (-1, -2)
    expected = np.array([[share * 1.0], [(1 - share) * -2.0]])
    one = jnp.ones((1, 1, 1, 1))
    np.testing.assert_allclose(encode(one, codewords, scale)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(encode(jnp.tile(one, (1, 1, 2, 1)), codewords, scale)[0], 2 * expected, rtol=1e-6)
    mask = jnp.array([True, False]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(encode(jnp.tile(one, (1, 1, 2, 1)), codewords, scale, mask)[0], expected, rtol=1e-6)


def direct(x: np.ndarray, c: np.ndarray, s: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, ...]:
    """Value of the definition with every residual [B, N, K, D] and the gradients of sum(g e) by hand, in float64."""
    residuals = x.reshape(len(x), -1, 1, x.shape[-1]) - c
    distances = np.square(residuals).sum(-1)
    weights = np.exp(s * distances - (s * distances).max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    value = np.einsum("bnk,bnkd->bkd", weights, residuals)
    by_weight = np.einsum("bkd,bnkd->bnk", g, residuals)
    by_logit = weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True))
    by_residual = weights[..., None] * g[:, None] + 2 * (by_logit * s)[..., None] * residuals
    return value, by_residual.sum(2).reshape(x.shape), -by_residual.sum((0, 1)), (by_logit * distances).sum((0, 1))


@OFFSETS
def test_encoding_against_the_direct_sum(offset: float) -> None:
    rng = np.random.default_rng(0)
    x, c = rng.normal(offset, 1, (2, 9, 7, 16)), rng.uniform(-1, 1, (5, 16)) / 8 + offset
    s, g = rng.uniform(-1, 0, 5), rng.normal(size=(2, 5, 16))
    x, c, s, g = (v.astype(np.float32) for v in (x, c, s, g))
    value, pullback = jax.vjp(encode, x, c, s)
    expected = direct(*(v.astype(np.float64) for v in (x, c, s, g)))
    for ours, theirs in zip((value, *pullback(jnp.asarray(g))), expected, strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_far_features_give_finite_values_and_gradients() -> None:
    x = 1e4 * jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    codewords, scale = jnp.zeros((3, 8)), jnp.array([-1.0, 0.5, -0.1])
    value, gradients = jax.value_and_grad(lambda *v: encode(*v).sum(), (0, 1, 2))(x, codewords, scale)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_no_tensor_has_positions_codewords_and_channels() -> None:
    x, c, s = jnp.zeros((2, 7, 5, 11)), jnp.zeros((3, 11)), jnp.zeros(3)
    traced = jax.make_jaxpr(jax.grad(lambda *v: encode(*v).sum(), (0, 1, 2)))(x, c, s)
    largest = max(v.aval.size for equation in traced.jaxpr.eqns for v in equation.outvars)
    assert largest <= x.size


def test_initial_codewords_and_scale() -> None:
    params = Encoding(32).init(jax.random.key(0), jnp.zeros((1, 2, 2, 512)))["params"]
    bound = (32 * 512) ** -0.5
    assert 0.99 * bound < np.abs(params["codewords"]).max() <= bound
    assert -1 <= params["scale"].min() < params["scale"].max() <= 0


# As counted in PyTorch-Encoding, with auxiliary head and SE layer.
@pytest.mark.parametrize(
    ("depth", "classes", "lateral", "expected"),
    [(50, 150, False, 36_164_578), (50, 59, True, 43_915_217)],
)
def test_parameter_counts(depth: int, classes: int, lateral: bool, expected: int) -> None:
    variables, outputs = abstract(depth=depth, classes=classes, head="enc", lateral=lateral)
    assert count(variables["params"]) == expected
    assert outputs["se_logits"].shape == (2, classes)
    assert outputs["logits"].shape == (2, 8, 8, classes)


def test_gate_is_on_the_features_and_the_norm_over_codewords() -> None:
    """The module written out in NumPy, from the features that its first convolution gives."""
    head = EncHead(num_classes=3, channels=6, codewords=4, dropout=0.0)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 7))
    variables = head.init(jax.random.key(1), [x], train=True)
    ours, kept = head.apply(
        variables, [x], train=True, mutable=["batch_stats", "intermediates"], capture_intermediates=True
    )
    seen, params = kept["intermediates"], variables["params"]
    features, projected = (np.asarray(seen[name]["__call__"][0], np.float64) for name in ("conv", "project"))
    codewords, scale = (np.asarray(params["encoding"][name], np.float64) for name in ("codewords", "scale"))
    codes = direct(projected, codewords, scale, np.zeros((2, 4, 6)))[0]
    mean, var = codes.mean((0, 2), keepdims=True), codes.var((0, 2), keepdims=True)
    semantics = np.maximum((codes - mean) / np.sqrt(var + 1e-5), 0).mean(1)
    gate, se = (semantics @ params[name]["kernel"] + params[name]["bias"] for name in ("gate", "se"))
    gated = np.maximum(features * (1 + 1 / (1 + np.exp(-gate)))[:, None, None], 0)
    last = params["classifier"]["conv"]
    np.testing.assert_allclose(ours["se_logits"], se, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["logits"], gated @ last["kernel"][0, 0] + last["bias"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept["batch_stats"]["encoding_bn"]["mean"], 0.1 * mean.ravel(), rtol=1e-4, atol=1e-6)


def test_folding_keeps_the_norm_over_codewords() -> None:
    head = EncHead(num_classes=3, channels=6, codewords=4)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 7))
    variables = head.init(jax.random.key(1), [x], train=True)
    variables["batch_stats"] = jax.tree.map(lambda v: v + 0.3, variables["batch_stats"])
    folded = head.apply(fold_batch_norm(variables), [x], train=False)
    for name, value in head.apply(variables, [x], train=False).items():
        np.testing.assert_allclose(folded[name], value, rtol=1e-4, atol=1e-5)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.output_stride=16 has not; set model\.output_stride=8"):
        abstract(head="enc", lateral=True, output_stride=16)
    with pytest.raises(ValueError, match=r"model\.codewords=0 must be at least 1"):
        abstract(head="enc", codewords=0)
