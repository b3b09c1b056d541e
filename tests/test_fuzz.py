"""Damaged input of every kind is read or refused in one sentence that names it: never another exception, or a hang."""

import json
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, environment
from fuzz import LONGEST, SECONDS, Late, Target, Told, damaged, damaged_json, digest, outcome
from fuzz_targets import TARGETS
from reliability_log import record

from psp_jax.data.decode import decode_image

SHORT, LONG = 66, 1200
PYTHON_BYTES, PROCESS_BYTES = 64_000_000, 6_000_000_000  # of Python's own for one input, and of the process at its peak


def fuzz(folder: Path, first: int, last: int) -> list[dict]:
    """Try inputs in a process of its own, which a fault of a decoder may end, and return what became of them."""
    command = [sys.executable, "tests/fuzz.py", str(folder / "fuzz"), str(first), str(last)]
    found, lines = [], queue.Queue()
    with (folder / "stderr").open("w+b") as words:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=words, text=True
        )

        def read() -> None:
            for line in process.stdout:
                lines.put(json.loads(line))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while (row := lines.get(timeout=SECONDS + 180)) is not None:  # the first also imports
                found.append(row)
        finally:
            process.kill()
        words.seek(0)
        assert process.wait() == 0, f"after input {first + len(found) - 1}: {words.read()[-2000:]}"
    return found


def check(rows: list[dict], count: int) -> None:
    *inputs, last = rows
    for row in inputs:
        record("input", **{key: row[key] for key in ("input", "target", "outcome", "exact")})
    broken = [row for row in inputs if row["outcome"] == "broken"]
    assert not broken, json.dumps(broken, indent=1)
    assert len(inputs) == count and {row["outcome"] for row in inputs} == {"read", "refused"}
    assert max(row["peak_bytes"] for row in inputs) < PYTHON_BYTES
    assert last["process_peak_bytes"] < PROCESS_BYTES


def test_some_damaged_inputs(tmp_path: Path) -> None:
    rows = fuzz(tmp_path, 0, SHORT)
    check(rows, SHORT)
    assert {row["target"] for row in rows[:-1]} == set(TARGETS)


@pytest.mark.soak
def test_many_damaged_inputs(tmp_path: Path) -> None:
    check(fuzz(tmp_path, SHORT, LONG), LONG - SHORT)


def test_damage_is_a_function_of_its_number() -> None:
    data = bytes(range(256)) * 4
    once, again = ([damaged(data, random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert once == again
    assert len(set(once)) > 30 and sum(one == data for one in once) < 3
    text = json.dumps({"a": [1, 2, {"b": None}], "c": "d"})
    texts = [damaged_json(text, random.Random(seed)) for seed in range(50)]
    assert len(set(texts)) > 20 and texts == [damaged_json(text, random.Random(seed)) for seed in range(50)]


def refuse(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda folder: 3, "read"),
        (lambda folder: 4, "broken: another value, and a checksum would have told"),
        (lambda folder: decode_image(b"", str(folder / "a.png")), "refused"),
        (lambda folder: decode_image(b"", "something"), "broken: without a name of ['a.png']"),
        (lambda folder: decode_image(b"", "a.png" * LONGEST), "broken: 5129 characters"),
        (lambda folder: decode_image(b"", "\na.png"), "broken: not a sentence"),
        (lambda folder: (folder / "a.png").read_bytes(), "broken: not a sentence"),  # a raw errno
        (lambda folder: refuse(ValueError("a.png is damaged; replace it.")), "broken: a traceback"),  # of no own module
        (lambda folder: refuse(MemoryError("a.png")), "broken: a traceback"),
        (lambda folder: refuse(Late("a.png")), "broken: a traceback"),
        (lambda folder: refuse(Told("a.png is damaged; starting anew")), "refused"),
    ],
)
def test_what_counts_as_refused(read: Callable[[Path], Any], expected: str, tmp_path: Path) -> None:
    result, words = outcome(Target(lambda _: [], read), tmp_path, "a.png", digest(3))
    assert result == expected.partition(":")[0]
    assert words.startswith(expected.partition(": ")[2])


def test_a_digest_tells_any_value_from_another() -> None:
    values = [{"a": np.arange(4)}, {"b": np.arange(4)}, {"a": np.arange(4.0)}, {"a": np.arange(4).reshape(2, 2)}]
    values += [{"a": [0, 1, 2, 3]}, {"a": b"0123"}, {"a": "0123"}, {"a": jnp.arange(1, 5)}]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(values[0]) == digest({"a": np.arange(4)})
