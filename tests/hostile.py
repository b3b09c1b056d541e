"""What tests of hostile files share: a trap that shows whether it was run, and how a refusal has to look."""

import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psp_jax.weights.formats import read_tensors

MARKER = "hostile_code_ran"
COMMAND = f"touch {MARKER}"
WEIGHTS = {
    "conv.weight": np.arange(108, dtype=np.float32).reshape(4, 3, 3, 3) + 1,
    "bn.weight": np.arange(4, dtype=np.float32) + 1,
    "bn.count": np.array(7, np.int64),
}


class Trap:
    """Runs COMMAND where Python's own unpickler reads it."""

    def __reduce__(self) -> Any:
        return os.system, (COMMAND,)


def understated(path: Path, begin: bytes, size: int) -> Path:
    """Let both headers of a zip archive's only entry declare `size` bytes, with the checksum of `begin`."""
    content = bytearray(path.read_bytes())
    for checksum in (14, content.index(b"PK\x01\x02") + 16):
        struct.pack_into("<I", content, checksum, zlib.crc32(begin))
        struct.pack_into("<I", content, checksum + 8, size)
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """Return the one sentence with which `path` is refused; memory, files and the marker are looked at too."""
    files = set(path.parent.iterdir())
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and message.endswith(".") and len(message) < 700
    assert set(path.parent.iterdir()) == files
    assert not list(Path().glob(f"**/{MARKER}"))
    assert peak < 4 * path.stat().st_size + 4_000_000, f"{peak:,} bytes"
    return message
