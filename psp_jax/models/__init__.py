"""Networks: backbones, heads, and the segmentor that joins them."""

from psp_jax.models.segmentor import HEADS, Segmentor, build_model, check_model, variable_shapes

__all__ = ["HEADS", "Segmentor", "build_model", "check_model", "variable_shapes"]
