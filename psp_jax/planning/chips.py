"""Facts about TPU chips, and the topologies that the TPU compiler makes programs for without one."""

import os
from dataclasses import dataclass
from typing import Any

_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


@dataclass(frozen=True)
class Chip:
    """One kind of chip; JAX shows each as one device, also where it has two cores.

    Attributes:
      hbm: bytes of its memory that a program may use; less than is built in, since the system keeps some.
      peak: bfloat16 operations a second.
      clock: cycles a second.
      links: bytes a second that leave it over all its links to other chips.
      topologies: shapes of the slices that are on offer.
      options: for the compiler, where a chip would not be one device otherwise.
    """

    hbm: int
    peak: float
    clock: float
    links: float
    topologies: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


def _gib(number: float) -> int:
    return round(number * 2**30)


# hbm: what libtpu 0.0.52 allows when it refuses a program. peak and links: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e
# (half of the "bidirectional" bandwidth); the links of v4 are six of 50 GB/s in arXiv:2304.01433, table 4. clock: peak
# by the operations of a cycle, 2 for each cell of 8, 4 and 8 matrix units of 128 x 128 and 4 of 256 x 256; for a large
# matrix product the compiler expects 0.93, 0.88, 0.90 and 0.70 of them.
CHIPS = {
    "v4": Chip(_gib(30.75), 275e12, 1.05e9, 300e9, _CUBE, (("chip_config_name", "megacore"),)),
    "v5e": Chip(_gib(15.75), 197e12, 1.5e9, 200e9, _PLANE),
    "v5p": Chip(_gib(95.73), 459e12, 1.75e9, 600e9, _CUBE),
    "v6e": Chip(_gib(31.24), 918e12, 1.75e9, 400e9, _PLANE),
}


def chip_of(topology: str) -> Chip:
    """Return the chip of a topology such as v5e:4x4.

    Raises:
      ValueError: there is no such topology; the sentence lists all.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or shape not in CHIPS[kind].topologies:
        known = "; ".join(f"{name}: {' '.join(chip.topologies)}" for name, chip in CHIPS.items())
        raise ValueError(f"The topology {topology} is unknown; choose local or CHIP:SHAPE of {known}.")
    return CHIPS[kind]


def topology_devices(topology: str) -> list[Any]:
    """Return the devices of a topology, on which nothing can run but for which programs compile.

    Raises:
      ValueError: an unknown topology, or no libtpu.
    """
    chip = chip_of(topology)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError(f"The topology {topology} needs libtpu: pip install 'psp-jax[plan]'.") from None
    # libtpu looks for a TPU when it is loaded, and complains where there is none. Its lock, which lets one process of a
    # machine hold the TPU, has no purpose where none is used: two plans can be made at a time.
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(topology, "tpu", **dict(chip.options)).devices)
