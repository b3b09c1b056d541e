"""Hostile files of torch: whatever a pickle asks for, nothing is run, and one sentence says why it is refused."""

import io
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import weight_files
from hostile import COMMAND, MARKER, WEIGHTS, Trap, refusal
from weight_files import Global, Made, Storage, tensor, view

from psp_jax.weights import pickles
from psp_jax.weights.formats import read_tensors

ONE = Storage("0", np.ones(8, np.float32))


def test_the_trap_works_where_pickles_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Trap()))
    assert Path(MARKER).exists()


RUN = Made("os.system", COMMAND)
HOSTILE_VALUES: dict[str, tuple[Any, str]] = {
    "os.system as the whole": (Trap(), "names 'posix.system', which .* not run"),
    "os.system as a tensor": ({"state_dict": {"a": RUN}}, "'os.system'"),
    "os.system beside the weights": ({"state_dict": {"a": tensor(np.ones(2), "0")}, "hook": RUN}, "'os.system'"),
    "eval": (Made("builtins.eval", "1"), "'builtins.eval'"),
    "exec of Python 2": (Made("__builtin__.execfile", "x"), "'builtins.execfile'"),
    "import": (Made("builtins.__import__", "os"), "'builtins.__import__'"),
    "Popen": (Made("subprocess.Popen", ("touch", MARKER)), "'subprocess.Popen'"),
    "pickle in a pickle": (Made("pickle.loads", pickle.dumps(Trap())), "'pickle.loads'"),
    "runpy": (Made("runpy.run_path", "x.py"), "'runpy.run_path'"),
    "state of a class": (Made("shutil.rmtree", state={"x": 1}), "'shutil.rmtree'"),
    "getattr as a tensor": ({"a": Made("builtins.getattr", Global("torch.hub"), "load")}, "entry 'a' .* 'builtins.get"),
    "unknown function as a tensor": ({"a": Made("torch.hub.load", "x", "y")}, "'a' is of the class 'torch.hub.load'"),
    "a whole model": (Made("models.PSPNet", state={}), "class 'models.PSPNet', not a state dict"),
    "a list": ([tensor(np.ones(2), "0")], "class 'list', not a state dict"),
    "nothing": ({}, "has 0 entries"),
    "no tensors": ({"epoch": 3}, "'epoch' is of the class 'int'"),
    "number as a name": ({3: tensor(np.ones(2), "0")}, "'3'"),
    "lines in a name": ({"a\nb\x1b[31m": 1}, "not a tensor"),
    "long name": ({"a" * 10_000: 1}, "not a tensor"),
    "nested weights": ({"state_dict": {"state_dict": {"state_dict": {}}}}, "class 'dict', not a tensor"),
    "complex": (
        {"a": tensor(np.ones(2), "0", kind="ComplexFloatStorage")},
        "'torch.ComplexFloatStorage', which is not",
    ),
    "wrong dtype": (
        {"a": tensor(np.ones(2), "0", kind="FloatStorage", count=8)},
        "needs 8 elements|ends within its tensors",
    ),
    "beyond the data": ({"a": view(ONE, 0, (3, 3), (3, 1))}, r"shape \(3, 3\) reaches beyond"),
    "offset beyond the data": ({"a": view(ONE, 8, (1,), (1,))}, "reaches beyond"),
    "negative offset": ({"a": view(ONE, -1, (1,), (1,))}, "no proper shape"),
    "negative stride": ({"a": view(ONE, 0, (2,), (-1,))}, "no proper shape"),
    "negative size": ({"a": view(ONE, 0, (-2,), (1,))}, "no proper shape"),
    "text as a size": ({"a": view(ONE, 0, "23", (1, 1))}, "no proper shape"),
    "unequal dimensions": ({"a": view(ONE, 0, (2, 2), (1,))}, "no proper shape"),
    "ninety dimensions": ({"a": view(ONE, 0, (1,) * 90, (1,) * 90)}, "too many dimensions"),
    "sizes that take long to multiply": ({"a": view(ONE, 0, (1 << 62,) * 1000, (0,) * 1000)}, "too many dimensions"),
    "sizes of many digits": ({"a": view(ONE, 0, (1 << 9999,), (0,))}, "no proper shape"),
    "terabytes of one element": ({"a": view(ONE, 0, (1 << 40,), (0,))}, "repeats elements"),
    "more bytes than numbers": ({"a": view(ONE, 0, (1 << 62, 1 << 62), (0, 0))}, "repeats elements"),
    "many views": ({str(i): view(ONE, 0, (10_000, 8), (0, 1)) for i in range(100)}, "repeats elements"),
    "no storage": ({"a": view(5, 0, (1,), (1,))}, "in a 'int'"),
    "too few arguments": ({"a": Made("torch._utils._rebuild_tensor_v2", ONE)}, "damaged .TypeError"),
    "pairs that are none": ({"a": Made("collections.OrderedDict", [1, 2])}, "of something else than pairs"),
}


@pytest.mark.parametrize("case", HOSTILE_VALUES)
@pytest.mark.parametrize("write", [weight_files.write_zip, weight_files.write_legacy])
def test_hostile_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, write: Any) -> None:
    monkeypatch.chdir(tmp_path)
    value, message = HOSTILE_VALUES[case]
    path = write(tmp_path / "a.pth", value)
    with pytest.raises(ValueError, match=message):
        read_tensors(path)
    refusal(path)


def binput(size: int) -> bytes:
    return b"\x80\x02}r" + struct.pack("<I", size) + b"."


HOSTILE_PICKLES: dict[str, bytes] = {
    "INST": b"(S'touch hostile_code_ran'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x16\x00\x00\x00touch hostile_code_rano.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x16touch hostile_code_ran\x85R.",
    "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n]X\x04\x00\x00\x00truea\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93)}\x92.",
    "EXT1": b"\x80\x02\x82\x01.",
    "PERSID": b"Pos\n.",
    "a call of a number": b"\x80\x02K\x05)R.",
    "a module": b"\x80\x02(X\x06\x00\x00\x00modulecos\nsystem\ntQ.",
    "a whole module": b"\x80\x02(X\x06\x00\x00\x00modulecmodels\nNet\ntQ.",
    "empty stack": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
    "memo that is not there": b"\x80\x02h\x05.",
    "memo of gigabytes": binput(0x7FFFFFFF),
    "bytes of exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "bytearray of exabytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.",
    "text of terabytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "negative long": b"\x80\x02\x8b" + struct.pack("<i", -5) + b".",
    "frame of terabytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"].",
    "number of many digits": b"I" + b"9" * 5000 + b"\n.",
    "lists in lists": b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b".",
    "tuples as a key": b"\x80\x02})" + b"\x85" * 30_000 + b"K\x01s.",
    "odd items": b"\x80\x02}(K\x01u.",
    "itself": b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
    "no end": b"\x80\x02}",
    "unknown instruction": b"\x80\x02\xff.",
    "out of band": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(weight_files.write_zip(tmp_path / "a.pth", {}, data=HOSTILE_PICKLES[case]))
    (tmp_path / "b.pth").write_bytes(HOSTILE_PICKLES[case])
    refusal(tmp_path / "b.pth")


PAIRS = b"NN\x86q\x010](" + b"h\x01" * 1000 + b"e\x85q\x020ccollections\nOrderedDict\nq\x030"
ID = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x00"
# What a few bytes more can make take its time again and again.
LABORIOUS: dict[str, tuple[bytes, str]] = {
    "long pairs": (
        b"ccollections\nOrderedDict\n](" + b"N" * 1000 + b"eq\x010](" + b"h\x01" * 1000 + b"e\x85R",
        "something else than pairs",
    ),
    "one list of pairs again and again": (PAIRS + b"h\x03h\x02R0" * 101 + b"N", "more items than weights need"),
    "many arguments": (b"ccollections\ndefaultdict\n(" + b"N" * 1000 + b"tR", "other arguments than it takes"),
    "long persistent id": (ID + b"N" * 1000 + b"tQ", "describes a storage in a way"),
    "long name": (b"cmodels\n" + b"x" * 1001 + b"\n", "a name that is too long"),
}


@pytest.mark.parametrize("case", LABORIOUS)
def test_laborious_pickles(tmp_path: Path, case: str) -> None:
    content, message = LABORIOUS[case]
    assert message in refusal(weight_files.write_zip(tmp_path / "a.pth", {}, data=b"\x80\x02" + content + b"."))


def test_numbers_of_one_hash_are_no_keys() -> None:
    content = pickle.dumps({number * (2**61 - 1): None for number in range(1, 4)})
    found = pickles.read_pickle(io.BytesIO(content), {}, lambda identity: None)
    assert isinstance(found, dict) and all(isinstance(key, pickles.Named) for key in found)


def test_too_many_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_STEPS", 1000)
    path = weight_files.write_zip(tmp_path / "a.pth", {}, data=b"\x80\x02" + b"]" * 2000 + b".")
    assert "its pickle has more than 1,000 instructions" in refusal(path)


def test_legacy_files(tmp_path: Path) -> None:
    good = weight_files.state_dict(WEIGHTS)
    assert "not one of torch.save" in refusal(weight_files.write_legacy(tmp_path / "a.pth", good, magic=5))
    assert "big-endian" in refusal(weight_files.write_legacy(tmp_path / "a.pth", good, little_endian=False))
    path = weight_files.write_legacy(tmp_path / "a.pth", good)
    content, count = path.read_bytes(), struct.pack("<q", 108)
    for wrong in (-1, 1 << 62, 109):
        path.write_bytes(content.replace(count, struct.pack("<q", wrong)))
        refusal(path)


def test_the_instructions_of_the_samples_are_what_they_say() -> None:
    for case in ("INST", "OBJ", "STACK_GLOBAL", "NEWOBJ", "NEWOBJ_EX", "EXT1", "PERSID"):
        assert case in {opcode.name for opcode, _, _ in pickletools.genops(HOSTILE_PICKLES[case])}
