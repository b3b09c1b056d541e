"""Training that starts from somebody's weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT, Run, free_address, run_module
from foreign import Tensors, random_tensors, settings_of, shapes_of

import psp_jax
from psp_jax.config import defaults
from psp_jax.weights.initial import check_init, initialise
from psp_jax.weights.tables import to_variables
from psp_jax.workdir import changed_fields

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TINY = {"depth": 10, "width": 8, "stem": "32-32-64", "head_channels": 16, "aux_channels": 8}


def save(path: Path, tensors: Tensors) -> Path:
    np.savez(path, **tensors)
    return path


def start(file: Path, source: str, classes: int = 3, **options: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return zeros of a network of these options and what becomes of them with `file`."""
    settings = settings_of(**TINY | options)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes_of(settings, classes))
    found, words = initialise(zeros, settings, shapes_of, source, file, MEAN, STD)
    return zeros, found, words


def kept(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Return the parts whose every leaf is still what it was."""
    parts = {}
    for collection, tree in before.items():
        for part, leaves in tree.items():
            same = jax.tree.map(lambda a, b: bool((a == b).all()), leaves, after[collection][part])
            parts[part] = parts.get(part, True) and all(jax.tree.leaves(same))
    return {part for part, same in parts.items() if same}


def test_a_backbone_initialises_the_backbone(tmp_path: Path) -> None:
    settings = settings_of(**TINY)
    tensors = random_tensors("timm", settings, 1, "backbone")
    classifier = {"fc.weight": np.ones((1000, 64), np.float32), "fc.bias": np.ones(1000, np.float32)}
    before, after, words = start(save(tmp_path / "r10.npz", tensors | classifier), "timm")
    assert words == "r10.npz (timm): backbone; random: head, aux_head"
    assert kept(before, after) == {"head", "aux_head"}
    theirs = to_variables("timm", tensors, settings, shapes_of(settings, 1, "backbone"))
    for collection in theirs:
        jax.tree.map(np.testing.assert_array_equal, after[collection]["backbone"], theirs[collection]["backbone"])


def test_a_network_initialises_all_but_classifiers_of_other_classes(tmp_path: Path) -> None:
    file = save(tmp_path / "psp.npz", random_tensors("semseg", settings_of(**TINY), 7))
    before, after, words = start(file, "semseg")
    assert words == "psp.npz (semseg): backbone, head, aux_head; random: head.classifier, aux_head.classifier"
    assert not after["params"]["head"]["classifier"]["conv"]["kernel"].any()
    assert after["params"]["head"]["fuse"]["conv"]["kernel"].all()
    before, after, words = start(file, "semseg", classes=7)
    assert words == "psp.npz (semseg): backbone, head, aux_head"
    assert after["params"]["head"]["classifier"]["conv"]["kernel"].all()
    assert kept(before, after) == set()


def test_auxiliary_heads_may_be_missing_on_either_side(tmp_path: Path) -> None:
    file = save(tmp_path / "without.npz", random_tensors("semseg", settings_of(**TINY, aux_head=False), 3))
    before, after, words = start(file, "semseg")
    assert words == "without.npz (semseg): backbone, head; random: aux_head"
    assert kept(before, after) == {"aux_head"}
    file = save(tmp_path / "with.npz", random_tensors("semseg", settings_of(**TINY), 3))
    _, after, _ = start(file, "semseg", aux_head=False)
    assert set(after["params"]) == {"backbone", "head"}


def test_networks_that_do_not_fit_name_the_fields_to_change(tmp_path: Path) -> None:
    backbone = save(tmp_path / "b.npz", random_tensors("timm", settings_of(**TINY), 1, "backbone"))
    network = save(tmp_path / "n.npz", random_tensors("semseg", settings_of(**TINY), 3))
    with pytest.raises(ValueError, match=r"set model\.depth=10 and model\.stem=32-32-64 to start from it"):
        start(backbone, "timm", depth=18, stem="7x7")
    start(backbone, "timm", first_block_dilation="contracted")  # a classification network has no dilation
    with pytest.raises(ValueError, match=r"set model\.first_block_dilation=full to start from it"):
        start(network, "semseg", first_block_dilation="contracted")
    with pytest.raises(ValueError, match=r"set model\.head=psp and model\.head_channels=16 to start"):
        start(network, "semseg", head="fcn", head_channels=8)
    with pytest.raises(ValueError, match=r"set model\.bins=\(1, 2, 3, 6\) to start"):
        start(network, "semseg", bins=(1,))
    with pytest.raises(ValueError, match=r"set model\.pool=average and model\.align_corners=True to start"):
        start(network, "semseg", pool="max", align_corners=False)
    start(backbone, "timm", pool="max", align_corners=False)
    settings = settings_of(width=8, head_channels=16, aux_head=False)
    caffe = save(tmp_path / "c.npz", random_tensors("caffe", settings, 3))
    with pytest.raises(ValueError, match=r"images with the mean \(123\.68, .* choose weights of another source"):
        start(caffe, "caffe", **settings | {"stride_in": "1x1"})


def test_a_configuration_without_weights_is_refused() -> None:
    check_init("random", "")
    with pytest.raises(ValueError, match=r"init\.source='tv' is unknown; choose one of: random, torchvision, timm"):
        check_init("tv", "")
    with pytest.raises(ValueError, match=r"set init\.path to a file or URL, or init\.source=random"):
        check_init("timm", "")
    with pytest.raises(ValueError, match=r"^init\.source=caffe cannot .*; choose one of: random, torchvision"):
        check_init("caffe", "pspnet50.caffemodel")
    check_init("timm", "resnet50.pth", "1762ACC0")
    for wrong in ("1762acc", "sha256:1762acc0", "0" * 65):
        with pytest.raises(ValueError, match=r"^init\.sha256='.*' is not 8 to 64 hexadecimal digits"):
            check_init("timm", "resnet50.pth", wrong)


@pytest.mark.slow
def test_a_run_starts_from_a_backbone_and_goes_on_without_it(finished_run: Run, tmp_path: Path) -> None:
    file = save(tmp_path / "r10.npz", random_tensors("timm", settings_of(**TINY), 1, "backbone"))
    flags = ("--config.init.source=timm", f"--config.init.path={file}", "--config.optimizer.base_lr=0")
    done = finished_run.start(tmp_path / "w", *flags, "--config.train.steps=4", devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"starting in {tmp_path / 'w'} from r10.npz (timm): backbone; random: head, aux_head\n" in done.stdout
    kernel = np.load(file)["layer3.0.conv1.weight"].transpose(2, 3, 1, 0)
    trained = psp_jax.load(tmp_path / "w").variables["params"]["backbone"]["layer3_block0"]["conv1"]["conv"]["kernel"]
    np.testing.assert_array_equal(trained, kernel)  # the rate is 0
    file.unlink()
    shutil.rmtree(tmp_path / "w" / "eval")
    done = finished_run.start(tmp_path / "w", *flags, "--config.train.steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished already at step 4" in done.stdout


def test_runs_of_older_versions_go_on() -> None:
    """Their records lack the fields that came later, and did what the defaults do."""
    config = defaults()
    record = json.loads(config.to_json())
    for section, field in (("model", "stride_in"), ("model", "basic_dilation"), ("init", "source"), ("init", "path")):
        del record[section][field]
    assert changed_fields(record, config) == []
    config.init.source = "timm"
    assert changed_fields(record, config) == ["init.source: 'random' -> 'timm'"]


def test_models_of_older_versions_load(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.workdir, tmp_path / "w")
    card = json.loads((tmp_path / "w" / "model.json").read_text())
    for field in ("stride_in", "basic_dilation", "fcn_convs", "fcn_concat"):
        del card["model"][field]
    (tmp_path / "w" / "model.json").write_text(json.dumps(card))
    assert psp_jax.load(tmp_path / "w").card.model == psp_jax.load(finished_run.workdir).card.model


@pytest.mark.slow
def test_the_papers_run_says_which_file_it_starts_from(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network: the address, and where to put what it gives."""
    monkeypatch.setenv("https_proxy", f"http://{free_address()}")
    monkeypatch.setenv("PSP_JAX_CACHE", str(tmp_path / "cache"))
    data = [flag for flag in finished_run.flags if flag.startswith("--config.data.")]
    flags = ("--config=configs/ade20k.py", "--config.data.name=image_folder", "--config.data.eval_split=val", *data)
    done = run_module("psp_jax.main", *flags, "--config.model.depth=10", "--workdir", tmp_path / "w")
    assert done.returncode == 1
    address = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"
    assert f"{address}gluon_resnet50_v1s-1762acc0.pth" in done.stderr
    assert f"put it at {tmp_path / 'cache'}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_variants_of_the_papers_run_start_from_their_own_file() -> None:
    code: dict[str, Any] = {}
    exec((ROOT / "configs" / "ade20k.py").read_text(), code)
    files = {name: code["get_config"](name).init.path.rpartition("/")[2] for name in code["VARIANTS"]}
    assert files["resnet101"] == "gluon_resnet101_v1s-60fe0cc1.pth"
    assert files["resnet152"] == "gluon_resnet152_v1s-dcc41b81.pth"
    assert (files["resnet269"], code["get_config"]("resnet269").init.source) == ("", "random")


@pytest.mark.slow
def test_a_start_that_lacked_its_file_can_be_repeated_in_the_same_workdir(finished_run: Run, tmp_path: Path) -> None:
    flags = ("--config.init.source=timm", f"--config.init.path={tmp_path / 'missing.npz'}", "--config.train.steps=2")
    done = finished_run.start(tmp_path / "w", *flags)
    assert done.returncode == 1 and "missing.npz" in done.stderr
    done = finished_run.start(tmp_path / "w", "--config.train.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
