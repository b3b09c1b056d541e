"""Raw bytes of weight files as arrays, and the limits that every format shares."""

import numpy as np

# No segmentation network has as many; beyond it a file only wants memory for names and headers.
MAX_TENSORS = 100_000
BFLOAT16 = "bfloat16"
DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


class Unreadable(ValueError):
    """What is wrong with a file of weights: the end of the sentence "Cannot read <path>: ..."."""


def itemsize(dtype: str) -> int:
    """Return the bytes per element of one of `DTYPES` or of bfloat16."""
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def decode(raw: bytes | bytearray | memoryview, dtype: str) -> np.ndarray:
    """Return little-endian `raw` as a read-only array [n] without a copy; bfloat16 becomes float32.

    Args:
      raw: n elements.
      dtype: one of `DTYPES`, or bfloat16.
    """
    if dtype == BFLOAT16:  # NumPy has none; it is the upper half of a float32
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))
    values.flags.writeable = False
    return values
