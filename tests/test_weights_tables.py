"""Names, shapes and layouts of every source, at full size, both ways."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from foreign import MMSEG, MMSEG_18, Tensors, caffe_network, digest, random_tensors, settings_of, shapes_of

from psp_jax.interpolation import resize
from psp_jax.models import build_model
from psp_jax.models.resnet import BLOCKS
from psp_jax.weights import architecture, tables
from psp_jax.weights.architecture import recognise
from psp_jax.weights.tables import from_variables, names, to_variables

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
PLAIN = {"stem": "7x7", "first_block_dilation": "contracted"}
MMSEG_FCN = MMSEG | {"head": "fcn", "fcn_convs": 2, "fcn_concat": True}
ENCODING = {"first_block_dilation": "contracted"}
# Source, network, classes (0: the backbone alone), and the number of tensors with a digest of names and shapes. Those
# of torchvision 0.29 and timm 1.0 (resnet50s, resnet101c, ...) were taken from the packages, semseg's and mmseg's from
# networks that the references built; the others are the table's own, checked by hand against the sources' code, and of
# the heads other than PSP also in test_torch_heads.py.
NETWORKS: dict[str, tuple[str, dict[str, Any], int, tuple[int, str]]] = {
    "torchvision 18": ("torchvision", PLAIN | {"depth": 18}, 0, (100, "7c8dfadd47d4c1f3")),
    "torchvision 34": ("torchvision", PLAIN | {"depth": 34}, 0, (180, "44c776b9cfee5ede")),
    "torchvision 50": ("torchvision", PLAIN, 0, (265, "f2cb7e91e337274f")),
    "torchvision 101": ("torchvision", PLAIN | {"depth": 101}, 0, (520, "af2bd241ef12fa8f")),
    "torchvision 152": ("torchvision", PLAIN | {"depth": 152}, 0, (775, "a4480a3d9936ee66")),
    "timm 50 v1s": ("timm", {}, 0, (275, "3bd01c8124e8cfe5")),
    "timm 101 v1s": ("timm", {"depth": 101}, 0, (530, "5f50292ca1a02a97")),
    "timm 152 v1s": ("timm", {"depth": 152}, 0, (785, "4209e16193c51dd6")),
    "timm 50 v1c": ("timm", {"stem": "32-32-64"}, 0, (275, "0abb4655f098799f")),
    "timm 101 v1c": ("timm", {"stem": "32-32-64", "depth": 101}, 0, (530, "ff8244362732d39b")),
    "timm 152 v1c": ("timm", {"stem": "32-32-64", "depth": 152}, 0, (785, "9fa84ef133c822df")),
    "timm 50 v1b": ("timm", PLAIN, 0, (265, "f2cb7e91e337274f")),
}
NETWORKS |= {
    "semseg 50 init": ("semseg", {}, 0, (275, "48a4e498f7c85a85")),
    "semseg 50": ("semseg", {}, 150, (309, "228eda7a43b2a293")),
    "mmseg 50": ("mmseg", MMSEG, 150, (309, "880e42d6ce824dff")),
    "mmseg 18": ("mmseg", MMSEG_18, 19, (144, "180da8d2590948c4")),
    "mmseg 50b": ("mmseg", MMSEG | {"stem": "7x7"}, 19, (299, "644ab759dccd6348")),
    "mmseg 50 v1c": ("mmseg", {"stem": "32-32-64"}, 0, (275, "0c1f6acc8bc8a27f")),
    "encoding 50s": ("encoding", ENCODING, 150, (309, "a11627c547295aa2")),
    "encoding 50 fcn": ("encoding", ENCODING | {"stem": "7x7", "head": "fcn"}, 59, (279, "e2b47c8a754a635c")),
    "mmseg 50 fcn": ("mmseg", MMSEG_FCN, 19, (299, "ed1ead388253e1d1")),
    "mmseg 50 aspp": ("mmseg", MMSEG | {"head": "aspp"}, 150, (314, "d815c1258703605a")),
    "mmseg 50 enc": ("mmseg", MMSEG | {"head": "enc"}, 150, (304, "134717995f0f55fc")),
    "encoding 50s enc": ("encoding", ENCODING | {"head": "enc"}, 150, (304, "d9697e27305f875c")),
    "encoding 50s enc lateral": (
        "encoding",
        ENCODING | {"head": "enc", "lateral": True},
        59,
        (319, "0a43fc9ffad8fc0d"),
    ),
    "caffe 50": ("caffe", {"aux_head": False, "stride_in": "1x1"}, 150, (302, "1d184893d46cbf7b")),
    "caffe 101": ("caffe", {"aux_head": False, "depth": 101}, 19, (557, "8338479ef7a981d2")),
}


@pytest.fixture(scope="module")
def semseg() -> Tensors:
    return random_tensors("semseg", settings_of(aux_head=False, width=8, head_channels=64), 150)


def to_ours(source: str, tensors: Tensors, classes: int = 150) -> dict[str, Any]:
    settings = recognise(source, tensors).settings
    return to_variables(source, tensors, settings, shapes_of(settings, classes))


def forward(variables: dict[str, Any], image: np.ndarray, settings: dict[str, Any], classes: int = 150) -> np.ndarray:
    network = build_model(settings, classes)
    return np.asarray(jax.jit(lambda v, x: network.apply(v, x, train=False)["logits"])(variables, image))


def assert_identical(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_those_of_the_source(name: str) -> None:
    source, options, classes, expected = NETWORKS[name]
    settings = settings_of(**options)
    table = names(source, settings, shapes_of(settings, classes or 1, "all" if classes else "backbone"))
    assert digest((name, entry.shape) for name, entry in table.items()) == expected


@pytest.mark.parametrize("name", [name for name in NETWORKS if "101" not in name and "152" not in name])
def test_recognised_and_mapped_both_ways_bit_for_bit(name: str) -> None:
    source, options, classes, _ = NETWORKS[name]
    settings, parts = settings_of(**options), "all" if classes else "backbone"
    tensors = random_tensors(source, settings, classes or 1, parts)
    spare = {"fc.weight": np.ones((1000, 8), np.float32), "layer1.0.bn1.num_batches_tracked": np.zeros((), np.int64)}
    found = recognise(source, tensors | spare)
    assert found.num_classes == (classes or None)
    assert found.parts == parts
    fields = settings if classes else ("depth", "stem", "width", "stride_in")
    assert found.settings == {field: settings[field] for field in fields}
    like = shapes_of(settings, classes or 1, parts)
    variables = to_variables(source, tensors | ({} if source == "caffe" else spare), found.settings, like)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda x: x.shape, like)
    back = from_variables(source, variables, found.settings)
    assert back.keys() == tensors.keys()
    for tensor, value in back.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, tensors[tensor], err_msg=tensor)


def test_depths_are_those_that_the_network_has() -> None:
    basic = {depth: blocks for depth, blocks in BLOCKS.items() if depth < 50}
    assert {depth: blocks for blocks, depth in architecture._BASIC.items()} == basic
    deep = {depth: blocks for depth, blocks in BLOCKS.items() if depth >= 50}
    assert {depth: blocks for blocks, depth in architecture._BOTTLENECK.items()} == deep


def test_heads_of_encoding() -> None:
    """As its PSP and FCNHead are written: nn.Sequential of pyramid, convolution, norm, ReLU, dropout, classifier."""
    table = names("encoding", settings_of(), shapes_of(settings_of(), 150))
    found = {name.rpartition(".")[0] for name in table if not name.startswith("pretrained.")}
    levels = {f"head.conv5.0.conv{i}.{j}" for i in range(1, 5) for j in range(2)}
    assert found == levels | {f"head.conv5.{i}" for i in (1, 2, 5)} | {f"auxlayer.conv5.{i}" for i in (0, 1, 4)}
    table = names("encoding", settings_of(head="fcn"), shapes_of(settings_of(head="fcn"), 150))
    assert {name.rpartition(".")[0] for name in table if name.startswith("head.")} == {
        f"head.conv5.{i}" for i in (0, 1, 4)
    }


@pytest.mark.skipif(not GOLDEN.exists(), reason="the stored reference outputs are not beside this clone")
@pytest.mark.parametrize(("source", "file"), [("semseg", "pspnet50_ade20k"), ("mmseg", "mmseg_pspnet50_ade20k")])
def test_logits_of_the_reference(source: str, file: str) -> None:
    """State dict of the reference in, its evaluation logits out: the whole way that an imported file goes."""
    code: dict[str, Any] = {}
    exec((GOLDEN / "fill.py").read_text(), code)
    with np.load(GOLDEN / f"{file}.npz", allow_pickle=False) as golden:
        meta, expected = json.loads(str(golden["meta"])), golden["eval_logits_every8"]
        listed = zip(golden["state_names"], golden["state_shapes"], strict=True)
        shapes = {str(name): tuple(json.loads(str(shape))) for name, shape in listed}
    tensors = {name: code["fill"](name, shape) for name, shape in shapes.items()}
    found = recognise(source, tensors)
    assert found.num_classes == meta["classes"]
    variables = to_variables(source, tensors, found.settings, shapes_of(found.settings, meta["classes"]))
    image, _ = code["batch"](meta["seed"], meta["n"], meta["height"], meta["width"], meta["classes"])
    logits = forward(variables, image.astype(np.float32), found.settings)
    full = resize(logits, (meta["height"], meta["width"]), align_corners=found.settings["align_corners"])
    sampled = np.asarray(full)[:, ::8, ::8]
    assert np.linalg.norm(sampled - expected) / np.linalg.norm(expected) < 1e-4


def test_caffe_network_is_the_network_of_semseg(semseg: Tensors) -> None:
    caffe = caffe_network(semseg)
    found, settings = recognise("caffe", caffe), recognise("semseg", semseg).settings
    assert (found.mean, found.std) == ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0))
    assert found.settings == settings | {"stride_in": "1x1"}
    ours, theirs = to_ours("semseg", semseg), to_ours("caffe", caffe)
    assert_identical(theirs, ours)
    image = np.random.default_rng(0).normal(size=(1, 41, 41, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        forward(theirs, image, found.settings | {"stride_in": "3x3"}), forward(ours, image, settings)
    )


def test_caffe_files_may_hold_the_auxiliary_classifier_and_vectors_of_four_axes(semseg: Tensors) -> None:
    caffe = caffe_network(semseg)
    caffe["conv6/1"] = caffe["conv6/1"].reshape(1, 1, 1, -1)
    caffe["conv_aux/0"], caffe["conv_aux/1"] = np.ones((150, 128, 3, 3), np.float32), np.ones(150, np.float32)
    assert_identical(to_ours("caffe", caffe), to_ours("semseg", semseg))
    caffe["conv_more/0"] = np.ones((150, 8, 1, 1), np.float32)
    with pytest.raises(ValueError, match="no layer takes, conv_aux/0, conv_aux/1, conv_more/0;"):
        to_ours("caffe", caffe)


def test_refusals_name_the_tensors(semseg: Tensors) -> None:
    def refused(expected: str, **changes: np.ndarray | None) -> None:
        changed = {**semseg, **{name.replace("__", "."): value for name, value in changes.items()}}
        with pytest.raises(ValueError, match=expected) as caught:
            to_ours("semseg", {name: value for name, value in changed.items() if value is not None})
        assert "\n" not in str(caught.value)

    some = np.ones(3, np.float32)
    refused(r"it lacks layer3\.1\.bn2\.bias; choose", layer3__1__bn2__bias=None)
    refused(r"it lacks cls\.4\.weight;", cls__4__weight=None)
    refused(
        r"it lacks layer3\.1\.bn2\.bias; it has, and no layer takes, layer3\.1\.norm2\.bias; choose",
        layer3__1__bn2__bias=None,
        layer3__1__norm2__bias=some,
    )
    refused(r"no layer takes, a, b, c, d and 1 more;", a=some, b=some, c=some, d=some, e=some)
    refused(r"no layer takes, a\\nb;", **{"a\nb": some})
    refused(r"of another shape are cls\.4\.bias \(3\) instead of \(150\);", cls__4__bias=some)
    refused(r"ppm\.features\.3\.1\.weight holds int32", ppm__features__3__1__weight=np.ones((64, 256, 1, 1), np.int32))
    refused(r"cls\.4\.bias holds values that are not finite", cls__4__bias=np.full(150, np.nan, np.float32))
    refused(r"cls\.1\.running_var is a variance", cls__1__running_var=np.full(64, -1, np.float32))
    refused(r"layer0\.0\.weight has 1 axes", layer0__0__weight=some)
    refused(r"no layer takes, layer0\.1\._running_iter;", layer0__1___running_iter=some)
    hollow = np.zeros((64, 0, 3, 3), np.float32)
    refused(r"layer0\.0\.weight has the impossible shape \(64, 0, 3, 3\)", layer0__0__weight=hollow)
    wide = np.broadcast_to(np.float32(1), (1 << 20, 1, 1, 1))
    refused(r"cls\.0\.weight has the impossible shape \(1048576, 1, 1, 1\)", cls__0__weight=wide)
    refused(r"of another shape are layer2\.0\.conv2\.weight \(3\)", layer2__0__conv2__weight=some)


@pytest.mark.parametrize("source", ["semseg", "caffe"])
def test_shapes_are_told_without_memory_for_them(source: str) -> None:
    settings = settings_of(aux_head=False)
    small = shapes_of(settings, 150)
    huge = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(tuple(n << 30 for n in leaf.shape), leaf.dtype), small)
    found = names(source, settings, huge)
    for name, entry in names(source, settings, small).items():
        kept = source == "caffe" and entry.layout == "row"
        assert found[name].shape == tuple(n if kept and n == 1 else n << 30 for n in entry.shape)


def test_an_empty_vector_is_not_brought_into_the_shape_of_one_number() -> None:
    entry = tables.Entry("params", ("head", "classifier", "conv", "bias"), "vector", (1,))
    assert tables._reshaped(np.zeros((1, 0), np.float32), entry).shape == (1, 0)


MMSEG_ENC_18 = MMSEG_18 | {"head": "enc", "width": 8, "head_channels": 16, "codewords": 6}
CODEWORDS = "decode_head.enc_module.encoding.0.codewords"


@pytest.mark.parametrize(
    ("options", "change", "expected"),
    [
        (MMSEG_ENC_18, {CODEWORDS: (6,)}, r"0\.codewords has 1 axes instead of 2; get the file anew"),
        (MMSEG_ENC_18, {CODEWORDS: (0, 16)}, r"0\.codewords has the impossible shape \(0, 16\)"),
        (MMSEG_ENC_18, {CODEWORDS: (1 << 20, 1)}, r"0\.codewords has the impossible shape \(1048576, 1\)"),
        (MMSEG_ENC_18, {CODEWORDS: (5, 16)}, r"of another shape are .*0\.scale \(6\) instead of \(5\)"),
        (MMSEG_ENC_18, {"decode_head.se_layer.weight": None}, r"it lacks decode_head\.se_layer\.weight; choose"),
        (MMSEG_ENC_18, {"decode_head.fusion.x": (1,)}, r"no layer takes, decode_head\.fusion\.x"),
        (MMSEG_ENC_18, {"decode_head.lateral_convs.0.x": (1,)}, r"it lacks .*lateral_convs"),
        (
            MMSEG_18 | {"head": "fcn", "width": 8, "head_channels": 16},
            {f"decode_head.convs.{i}.conv.weight": (16, 16, 3, 3) for i in range(1, 4000)},
            r"it lacks decode_head\.convs\.1\.bn\.",
        ),
        (
            MMSEG_18 | {"head": "aspp", "width": 8, "head_channels": 16},
            {"decode_head.aspp_modules.4.conv.weight": (16, 64, 3, 3)},
            r"no layer takes, decode_head\.aspp_modules\.4\.conv\.weight",
        ),
    ],
)
def test_heads_with_parts_that_do_not_fit(options: Any, change: dict[str, Any], expected: str) -> None:
    tensors = random_tensors("mmseg", settings_of(**options), 4)
    new = {name: np.broadcast_to(np.float32(1), shape) for name, shape in change.items() if shape}
    tensors = {name: value for name, value in (tensors | new).items() if change.get(name, ()) is not None}
    with pytest.raises(ValueError, match=expected) as caught:
        to_ours("mmseg", tensors, 4)
    assert len(str(caught.value)) < 700


def test_numbers_of_many_digits_count_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"no ResNet of torchvision .* \(0, 0, 0, 0\) basic blocks") as caught:
        recognise("torchvision", {f"layer1.{'9' * digits}.x": np.ones(1, np.float32) for digits in (4, 4000, 5000)})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("source", "more", "expected"),
    [
        ("mmseg", "decode_head.sep_bottleneck.0.x", "DepthwiseSeparableASPPHead, which is not imported here yet"),
        ("encoding", "head.aspp.b0.0.weight", "DeepLabV3Head, which fuses by a 1x1 .*, which is not imported here yet"),
        ("timm", "layer1.0.downsample.2.weight", "ResNet-D, which averages .*, which is not imported here yet"),
        ("torchvision", "backbone.conv1.weight", r"no ResNet of torchvision .* \(0, 0, 0, 0\) basic blocks"),
        ("caffe", "conv1/0", "no ResNet of caffe"),
    ],
)
def test_networks_that_cannot_be_built_are_told_apart(source: str, more: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        recognise(source, {more: np.ones((1, 1, 1, 1), np.float32)})


def test_what_has_no_counterpart_is_not_exported() -> None:
    settings = settings_of(head="fcn")
    with pytest.raises(ValueError, match=r"semseg has no place for head\.conv\."):
        names("semseg", settings, shapes_of(settings, 5))
    for source, options, missing in (
        ("semseg", {"head": "enc"}, "conv"),
        ("caffe", {"head": "enc", "aux_head": False}, "conv"),
        ("encoding", {"head": "aspp"}, "branch0"),
        ("encoding", {"head": "fcn", "fcn_convs": 2}, "conv1"),
        ("encoding", {"head": "fcn", "fcn_concat": True}, "fuse"),
    ):
        settings = settings_of(**options)
        with pytest.raises(ValueError, match=rf"{source} has no place for head\.{missing}\."):
            names(source, settings, shapes_of(settings, 5))
    settings = settings_of(depth=18, aux_head=False)
    with pytest.raises(ValueError, match="ResNet-18 has no counterpart in caffe"):
        names("caffe", settings, shapes_of(settings, 5))
    settings = settings_of(bins=(1, 2, 3), aux_head=False)
    with pytest.raises(ValueError, match="pyramids of caffe have"):
        names("caffe", settings, shapes_of(settings, 5))
