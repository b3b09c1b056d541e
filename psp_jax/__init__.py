"""PSPNet and its relatives for TPU and GPU pods, in JAX.

Python API: `psp_jax.load(directory)` gives a model that labels images (see `psp_jax.api.Model`).
Nothing heavy is imported until it is asked for, so that the data workers stay free of JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psp_jax.api import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from psp_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'psp_jax' has no attribute '{name}'")
