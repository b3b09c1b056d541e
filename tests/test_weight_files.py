"""Every format gives back the tensors that were written: by torch, safetensors and NumPy, or byte by byte."""

import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import weight_files
from safetensors.numpy import load_file, save_file
from weight_files import Made, Storage, field, state_dict, tensor, view

from psp_jax.weights.formats import read_tensors, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "conv1.weight": RNG.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "bn1.weight": RNG.normal(size=4),
    "bn1.bias": RNG.normal(size=4).astype(np.float16),
    "bn1.num_batches_tracked": np.array(7, np.int64),
    "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "mask": np.array([True, False, True]),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        assert found[name].shape == values.shape


def training(weights: Any) -> dict[str, Any]:
    """What training programs put beside the weights: an optimizer and objects of their own classes."""
    buffer = Made("mmengine.logging.history_buffer.HistoryBuffer", state={"_log_history": Made("numpy.ndarray", (0,))})
    names = Made("builtins.set", ["a"])
    best = Made("numpy.core.multiarray.scalar", Made("numpy.dtype", "f8"), b"12345678")
    hub = {"loss": buffer, (1, 2): names, "methods": OrderedDict(mean=Made("builtins.getattr", buffer, "mean"))}
    group = {"lr": 0.1, "params": [0, 1], "nesterov": False, "big": -(1 << 70), "dampening": None, "ids": {1, 2}}
    sgd = {"state": {0: {"momentum_buffer": tensor(np.ones(3), "900")}}, "param_groups": [group]}
    when = Made("datetime.datetime", b"1234567890")
    return {"meta": {"epoch": 3, "time": when, "best": best}, "message_hub": hub, "optimizer": sgd, **weights}


@pytest.mark.parametrize("write", [weight_files.write_zip, weight_files.write_legacy])
@pytest.mark.parametrize("wrap", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts(tmp_path: Path, write: Any, wrap: str, prefix: str) -> None:
    weights = state_dict({prefix + name: values for name, values in TENSORS.items()})
    path = write(tmp_path / "a.pth", training({wrap: weights}) if wrap else weights)
    assert_same(read_tensors(path), TENSORS)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path: Path, protocol: int) -> None:
    saved = training({"state_dict": OrderedDict(state_dict(TENSORS))})
    content, _ = weight_files.pickled(saved, protocol)
    assert_same(read_tensors(weight_files.write_zip(tmp_path / "a.pth", saved, data=content)), TENSORS)


def test_a_pickle_of_text(tmp_path: Path) -> None:
    """Protocol 0, in which torch cannot name its storages, so that there are no tensors."""
    saved = {"list": [(), (1, 2), -5, True, 1 << 70], "text": "ä\n", "pi": 3.14, "set": Made("builtins.set", [1])}
    path = weight_files.write_zip(tmp_path / "a.pth", {}, data=weight_files.pickled(saved, 0)[0])
    with pytest.raises(ValueError, match="its entry 'list' is of the class 'list', not a tensor"):
        read_tensors(path)


def test_only_a_prefix_of_every_name_is_removed(tmp_path: Path) -> None:
    tensors = {"module.a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    assert_same(read_tensors(weight_files.write_zip(tmp_path / "a.pth", state_dict(tensors))), tensors)


@pytest.mark.parametrize("write", [weight_files.write_zip, weight_files.write_legacy])
def test_views_of_one_storage(tmp_path: Path, write: Any) -> None:
    values = np.arange(24, dtype=np.float32)
    storage = Storage("0", values)
    hooks = Made("collections.OrderedDict")
    tensors = {
        "part": view(storage, 6, (2, 3), (3, 1)),
        "transposed": view(storage, 0, (4, 6), (1, 4)),
        "stepped": view(storage, 1, (3,), (5,)),
        "repeated": view(storage, 2, (4,), (0,)),
        "old": Made("torch._utils._rebuild_tensor", storage, 23, (), ()),
        "parameter": Made("torch._utils._rebuild_parameter", view(storage, 0, (2,), (1,)), True, hooks),
        "variable": Made("torch.nn.parameter.Parameter", view(storage, 3, (2,), (1,)), state=(True, False, None)),
    }
    expected = {
        "part": values[6:12].reshape(2, 3),
        "transposed": values.reshape(6, 4).T,
        "stepped": values[[1, 6, 11]],
        "repeated": values[[2, 2, 2, 2]],
        "old": values[23],
        "parameter": values[:2],
        "variable": values[3:5],
    }
    assert_same(read_tensors(write(tmp_path / "a.pth", tensors)), expected)


def test_a_view_in_the_oldest_way(tmp_path: Path) -> None:
    storage = Storage("0", np.arange(9, dtype=np.float32))
    storage.identity = lambda legacy: ("storage", storage.kind, "0", "cpu", 9, ("1", 4, 3))  # type: ignore[method-assign]
    path = weight_files.write_legacy(tmp_path / "a.pth", {"a": view(storage, 1, (2,), (1,))})
    assert_same(read_tensors(path), {"a": np.array([5, 6], np.float32)})


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38, np.inf], np.float32)
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    path = weight_files.write_zip(tmp_path / "a.pth", {"a": tensor(upper, "0", kind="BFloat16Storage")})
    assert_same(read_tensors(path), {"a": (upper.astype(np.uint32) << 16).view(np.float32)})


def test_only_the_weights_are_read(tmp_path: Path) -> None:
    """A damaged momentum buffer does not matter, since it is not read."""
    weights = training({"state_dict": state_dict(TENSORS)})
    path = weight_files.write_zip(tmp_path / "a.pth", weights)
    momentum, place = np.ones(3).tobytes(), path.read_bytes()
    assert place.count(momentum) == 1
    path.write_bytes(place.replace(momentum, np.zeros(3).tobytes()))
    assert_same(read_tensors(path), TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(tmp_path: Path, zipped: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed, files of its format are written by hand")
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    model = torch.nn.ModuleDict({"module": layers})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    weights, base = model.state_dict(), torch.arange(24.0)
    weights["module.view"] = base[2:14].reshape(3, 4).T
    weights["module.half"] = base.half()
    weights["module.bfloat16"] = base.bfloat16() / 3
    weights["module.parameter"] = torch.nn.Parameter(base[:2])
    weights["module.double"] = base.double()
    weights["module.byte"] = base.byte()
    weights["module.bool"] = base > 3
    path = tmp_path / "a.pth"
    saved = {"epoch": 1, "state_dict": weights, "optimizer": optimizer.state_dict()}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    expected = {
        name.removeprefix("module."): (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for name, value in torch.load(path, weights_only=False)["state_dict"].items()
    }
    assert_same(read_tensors(path), expected)


def test_a_caffemodel(tmp_path: Path) -> None:
    layers = {
        "conv1_1_3x3_s2": [RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)],
        "conv1_1_3x3_s2/bn": [RNG.normal(size=(1, 4, 1, 1)).astype(np.float32) for _ in range(4)],
        "conv6": [RNG.normal(size=(5, 4, 1, 1)).astype(np.float32), np.arange(5, dtype=np.float32)],
    }
    path = weight_files.write_caffemodel(tmp_path / "net.caffemodel", layers)
    expected = {f"{name}/{index}": blob for name, blobs in layers.items() for index, blob in enumerate(blobs)}
    assert_same(read_tensors(path), expected)


def test_older_ways_of_caffe(tmp_path: Path) -> None:
    """The layers of V1, a shape as num, channels, height, width, unpacked dimensions, doubles, unknown fields."""
    values = np.arange(6, dtype=np.float32)
    sizes = b"".join(field(1, size) for size in (2, 3))
    shape = b"".join(field(number, size) for number, size in ((1, 1), (2, 6), (3, 1), (4, 1)))
    unknown = b"\x0d1234" + b"\x11" + bytes(8) + field(900, b"text")
    content = field(2, field(4, b"old") + field(6, shape + field(5, values.tobytes())) + unknown)
    content += field(100, field(1, b"new") + field(7, field(7, sizes) + field(8, values.astype("<f8").tobytes())))
    (tmp_path / "net.caffemodel").write_bytes(content + unknown)
    found = read_tensors(tmp_path / "net.caffemodel")
    assert_same(found, {"old/0": values.reshape(1, 6, 1, 1), "new/0": values.reshape(2, 3)})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_numpy(tmp_path: Path, save: Any) -> None:
    tensors = {**TENSORS, "fortran": np.asfortranarray(TENSORS["bytes"])}
    save(tmp_path / "a.npz", **tensors, big=np.arange(3, dtype=">f4"))
    assert_same(read_tensors(tmp_path / "a.npz"), {**tensors, "big": np.arange(3, dtype=np.float32)})


def test_files_of_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    assert_same({name: found[name] for name in TENSORS}, TENSORS)
    assert len(found) == len(TENSORS)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_written_files(tmp_path: Path, suffix: str) -> None:
    nan = np.array([np.nan, -0.0], np.float32)
    tensors = {**TENSORS, "file": nan, "a/b": np.ones((2, 3), np.float32, order="F")[:, ::2]}
    path = tmp_path / "made" / f"a{suffix}"
    write_tensors(path, tensors)
    write_tensors(path, tensors)  # replaces it
    found = read_tensors(path)
    assert_same({name: found[name] for name in tensors}, tensors)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    theirs = np.load(path) if suffix == ".npz" else load_file(path)
    np.testing.assert_array_equal(theirs["a/b"], tensors["a/b"])


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"written to \.npz or \.safetensors, not to .*a\.pth"):
        write_tensors(tmp_path / "a.pth", TENSORS)
    with pytest.raises(ValueError, match="The tensor 'c' has the dtype complex128; write one of float64"):
        write_tensors(tmp_path / "a.npz", {"c": np.ones(1, complex)})
    monkeypatch.setattr("psp_jax.weights.formats._same", lambda one, other: False)
    with pytest.raises(ValueError, match=r"a\.npz did not read back as it was written"):
        write_tensors(tmp_path / "a.npz", TENSORS)
    assert not list(tmp_path.iterdir())


def test_without_safetensors_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.safetensors: .* missing, run pip install 'psp-jax\[weights\]'"):
        read_tensors(tmp_path / "a.safetensors")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file .*a\.pth"):
        read_tensors(tmp_path / "a.pth")
