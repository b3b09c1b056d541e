"""Shapes, parameter counts and options of the networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from psp_jax.config import defaults
from psp_jax.interpolation import adaptive_average_pools, adaptive_max_pools, bin_edges, resize, resize_weights
from psp_jax.models import build_model
from psp_jax.models.batch_norm import BatchNorm
from psp_jax.models.layers import max_pool


def abstract(size: tuple[int, int] = (64, 64), classes: int = 150, train: bool = True, **options: object) -> tuple:
    settings = defaults().model
    settings.update(options)
    model = build_model(settings, classes)
    image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def apply(x: jax.Array) -> tuple:
        variables = model.init(keys, x, train=True)
        return variables, model.apply(variables, x, train=train, mutable=["batch_stats"], rngs=keys)[0]

    return jax.eval_shape(apply, image)


def count(tree: object) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


# With auxiliary head, at 150, 21 and 19 classes, as counted in hszhao/semseg (269: the same rules, a deeper network).
@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (50, (49_180_908, 49_081_578, 49_080_038)),
        (101, (68_173_036, 68_073_706, 68_072_166)),
        pytest.param(152, (83_816_684, 83_717_354, 83_715_814), marks=pytest.mark.slow),
        pytest.param(269, (125_697_260, 125_597_930, 125_596_390), marks=pytest.mark.slow),
    ],
)
def test_parameter_counts(depth: int, expected: tuple[int, ...]) -> None:
    params = abstract(depth=depth)[0]["params"]
    classifiers = count([params[head]["classifier"] for head in ("head", "aux_head")])
    assert classifiers == (512 + 1) * 150 + (256 + 1) * 150
    per_class = classifiers // 150
    assert [count(params) - (150 - classes) * per_class for classes in (150, 21, 19)] == list(expected)


@pytest.mark.parametrize(
    ("stem", "expected"), [("64-64-128", 23_631_808), ("32-32-64", 23_527_264), ("7x7", 23_508_032)]
)
def test_backbone_parameters_by_stem(stem: str, expected: int) -> None:
    assert count(abstract(stem=stem)[0]["params"]["backbone"]) == expected


@pytest.mark.parametrize("depth", [10, 18, 34, 50])
@pytest.mark.parametrize(("stride", "grid"), [(8, (13, 19)), (16, (7, 10)), (32, (4, 5))])
def test_feature_grid(depth: int, stride: int, grid: tuple[int, int]) -> None:
    _, outputs = abstract(size=(97, 151), depth=depth, output_stride=stride)
    for name in ("logits", "aux_logits"):
        if name == "logits" or stride != 32:  # at stride 32 the third stage is still at 16
            assert outputs[name].shape == (2, *grid, 150)


def test_reference_feature_sizes() -> None:
    for side, features in ((473, 60), (713, 90), (465, 59)):
        assert abstract(size=(side, side), train=False)[1]["logits"].shape == (2, features, features, 150)


@pytest.mark.parametrize("size", [(350, 473), (97, 1031), (1, 1), (512, 512)])
def test_any_input_size(size: tuple[int, int]) -> None:
    logits = abstract(size=size, train=False)[1]["logits"]
    assert logits.shape == (2, -(-size[0] // 8), -(-size[1] // 8), 150)


def test_auxiliary_head_runs_in_training_only() -> None:
    assert set(abstract(train=True)[1]) == {"logits", "aux_logits"}
    assert set(abstract(train=False)[1]) == {"logits"}
    assert set(abstract(train=True, aux_head=False)[1]) == {"logits"}


def test_table_1_variants() -> None:
    """Pooled grids, pooling and dimension reduction (the paper's Table 1) change the fusing convolution's input."""
    widths = {}
    for bins in ((1,), (1, 2, 3, 6)):
        for reduce in (False, True):
            for pool in ("average", "max"):
                variables, outputs = abstract(bins=bins, reduce=reduce, pool=pool)
                assert outputs["logits"].shape == (2, 8, 8, 150)
                widths[bins, reduce] = variables["params"]["head"]["fuse"]["conv"]["kernel"].shape[2]
    assert widths == {
        ((1,), False): 4096,
        ((1,), True): 4096,
        ((1, 2, 3, 6), False): 5 * 2048,
        ((1, 2, 3, 6), True): 4096,
    }


def small_model(**options: object):
    settings = defaults().model
    settings.update({"depth": 50, "width": 8, "head_channels": 8, "aux_channels": 8} | options)
    return build_model(settings, 5)


def test_first_block_dilation_matters_only_where_a_dilated_stage_begins() -> None:
    image = jax.random.normal(jax.random.key(0), (1, 65, 65, 3))
    outputs = {}
    for stride in (8, 32):
        for mode in ("full", "contracted"):
            model = small_model(depth=10, first_block_dilation=mode, output_stride=stride)
            variables = model.init(jax.random.key(1), image, train=True)
            outputs[stride, mode] = np.asarray(model.apply(variables, image, train=False)["logits"])
    assert np.abs(outputs[8, "full"] - outputs[8, "contracted"]).max() > 1e-4
    np.testing.assert_array_equal(outputs[32, "full"], outputs[32, "contracted"])


def test_rematerialisation_and_bfloat16_compute_the_same_network() -> None:
    image = jax.random.normal(jax.random.key(0), (2, 33, 33, 3))
    plain = small_model(depth=10, dropout=0.0)
    variables = jax.jit(lambda key: plain.init(key, image, train=True))(jax.random.key(1))

    def loss(model, params: object) -> jax.Array:
        stats = variables["batch_stats"]
        outputs, _ = model.apply({"params": params, "batch_stats": stats}, image, train=True, mutable=["batch_stats"])
        return jnp.square(outputs["logits"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(plain, p)))(variables["params"])
    remat = small_model(depth=10, dropout=0.0, remat=True)
    value_remat, gradient_remat = jax.jit(jax.value_and_grad(lambda p: loss(remat, p)))(variables["params"])
    np.testing.assert_allclose(value, value_remat, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, gradient_remat)
    half = small_model(depth=10, dropout=0.0, dtype="bfloat16")
    np.testing.assert_allclose(value, jax.jit(lambda p: loss(half, p))(variables["params"]), rtol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 10},
        {"depth": 10, "pool": "max", "align_corners": False, "first_block_dilation": "contracted"},
        {"stem": "7x7", "head": "fcn", "output_stride": 16},
        {"depth": 10, "head": "aspp", "output_stride": 32},
        {"depth": 10, "head": "enc", "codewords": 3, "lateral": True},
    ],
    ids=["average", "max", "bottleneck", "aspp", "enc"],
)
def test_what_lies_beyond_an_image_counts_as_padding(options: dict) -> None:
    """One program with `valid` gives each image the logits that it has alone, at its own size."""
    model = small_model(**options)
    images = np.asarray(jax.random.normal(jax.random.key(0), (2, 73, 66, 3)))
    variables = jax.jit(lambda key: model.init(key, images, train=True))(jax.random.key(1))
    variables["batch_stats"] = jax.tree.map(lambda x: x + 0.3, variables["batch_stats"])  # so that zero is not neutral
    sizes = [(41, 66), (52, 37)]
    padded = np.zeros_like(images)
    for image, target, (height, width) in zip(images, padded, sizes, strict=True):
        target[:height, :width] = image[:height, :width]
    apply = jax.jit(lambda x, valid=None: model.apply(variables, x, train=False, valid=valid)["logits"])
    together = apply(padded, jnp.asarray(sizes))
    for image, found, (height, width) in zip(images, together, sizes, strict=True):
        alone = apply(image[None, :height, :width])[0]
        ours = found[: alone.shape[0], : alone.shape[1]]
        np.testing.assert_allclose(ours, alone, atol=1e-5 * np.abs(alone).max())


def test_channel_dropout_drops_whole_maps() -> None:
    from psp_jax.models.layers import Classifier

    classifier = Classifier(7, dropout=0.5)
    x = jnp.ones((4, 5, 6, 32))
    variables = classifier.init(jax.random.key(0), x, train=False)
    out = classifier.apply(variables, x, train=True, rngs={"dropout": jax.random.key(3)})
    assert np.ptp(np.asarray(out), axis=(1, 2)).max() < 1e-6  # the same at every position of an image
    assert np.ptp(np.asarray(out), axis=0).max() > 1e-3  # and drawn anew for every image


def test_unknown_option_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"model\.depth=51 is unknown; choose one of: 10, 18, 34, 50, 101, 152, 269"):
        abstract(depth=51)
    with pytest.raises(ValueError, match=r"model\.head='pps' is unknown; choose one of: psp, fcn"):
        abstract(head="pps")


def test_resize_align_corners_against_hand_values() -> None:
    x = jnp.array([0.0, 1.0, 4.0]).reshape(1, 1, 3, 1)
    wide = resize(x, (1, 5), align_corners=True)
    np.testing.assert_allclose(wide[0, 0, :, 0], [0, 0.5, 1, 2.5, 4], atol=1e-6)
    half = resize(x, (1, 6), align_corners=False)
    np.testing.assert_allclose(half[0, 0, :, 0], [0, 0.25, 0.75, 1.75, 3.25, 4], atol=1e-6)


def test_resize_weights_sum_to_one() -> None:
    for n_out, n_in in ((473, 60), (60, 6), (60, 1), (1, 60), (17, 97)):
        for align_corners in (True, False):
            np.testing.assert_allclose(resize_weights(n_out, n_in, align_corners).sum(1), 1, atol=1e-6)


def test_adaptive_bins_overlap_as_in_torch() -> None:
    assert bin_edges(7, 3) == [(0, 3), (2, 5), (4, 7)]
    x = jnp.arange(7.0).reshape(1, 7, 1, 1) * jnp.ones((1, 7, 4, 1))
    one, three = adaptive_average_pools(x, (1, 3))
    np.testing.assert_allclose(one, [[[[3]]]], atol=1e-6)
    np.testing.assert_allclose(three[0, :, 0, 0], [1, 3, 5], atol=1e-6)
    np.testing.assert_allclose(adaptive_max_pools(x, (3,))[0][0, :, 0, 0], [2, 4, 6])
    np.testing.assert_allclose(adaptive_average_pools(x[:, :2], (6,))[0][0, :, 0, 0], [0, 0, 0, 1, 1, 1])


def test_batch_norm_statistics_by_hand() -> None:
    x = jnp.array([1.0, 2.0, 3.0, 6.0]).reshape(4, 1, 1, 1)
    bn = BatchNorm()
    variables = bn.init(jax.random.key(0), x, train=True)
    y, updates = bn.apply(variables, x, train=True, mutable=["batch_stats"])
    # mean 3, biased variance 3.5, unbiased 14 / 3; running statistics keep nine tenths of 0 and 1.
    np.testing.assert_allclose(y.ravel(), (np.array([1, 2, 3, 6]) - 3) / np.sqrt(3.5 + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], [0.3], rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], [0.9 + 0.1 * 14 / 3], rtol=1e-6)


def test_batch_norm_of_a_constant_large_input_is_finite() -> None:
    x = jnp.full((2, 33, 33, 1), 1234.567)
    bn = BatchNorm()
    y, updates = bn.apply(bn.init(jax.random.key(0), x, train=True), x, train=True, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    assert float(updates["batch_stats"]["var"][0]) >= 0.9


@pytest.mark.parametrize("size", [(9, 10), (10, 9), (1, 5)])
def test_max_pool_is_the_usual_one(size: tuple[int, int]) -> None:
    """Values and gradients, with many equal values in a window, of which the first takes the gradient."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 4, (2, *size, 3)), jnp.float32)
    expected, pull = jax.vjp(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), x)
    ours, our_pull = jax.vjp(lambda x: max_pool(x, train=True), x)
    np.testing.assert_array_equal(ours, expected)
    weights = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    np.testing.assert_allclose(our_pull(weights)[0], pull(weights)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 10, "output_stride": 32},
        {"depth": 50, "output_stride": 16, "stride_in": "1x1", "remat": True},
        {"depth": 10, "output_stride": 8, "head": "aspp"},
        {"depth": 10, "output_stride": 8, "head": "enc", "lateral": True},
        {"depth": 10, "output_stride": 8, "pool": "max", "first_block_dilation": "contracted"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_rows_that_are_added_change_nothing_when_training(fields: dict) -> None:
    """Neither scores nor statistics, of main and auxiliary head, whatever is below the rows that are real."""
    settings = defaults().model
    settings.update(width=4, head_channels=4, aux_channels=4, dropout=0.0, align_corners=False, bins=(1, 2))
    settings.update(fields)
    model = build_model(settings, 3)
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=True))()
    image = jax.random.normal(jax.random.key(1), (2, 64, 96, 3))
    padded = jnp.pad(image, ((0, 0), (0, 64), (0, 0), (0, 0)))

    def outputs(x: jax.Array, valid: tuple[int, int] | None) -> tuple:
        return model.apply(variables, x, train=True, valid=valid, mutable=["batch_stats"])

    plain, statistics = jax.jit(lambda x: outputs(x, None))(image)
    ours, our_statistics = jax.jit(lambda x: outputs(x, (64, 96)))(padded)
    for name, expected in plain.items():
        rows = expected.shape[1]
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(ours[name][:, :rows], expected, rtol=1e-3, atol=1e-3 * scale, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), our_statistics, statistics)
