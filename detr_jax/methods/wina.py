"""WINA, without its rotation: magnitudes of activations times the norms of the weights that they meet."""

from dataclasses import dataclass
from typing import ClassVar

from detr_jax.methods.base import register
from detr_jax.methods.teal import TEALHidden, TEALInput


@register
@dataclass(frozen=True)
class WINAHidden(TEALHidden):
    """Thresholds on |h_j| ||W_out[j]||."""

    name: ClassVar = "wina-hidden"
    paper: ClassVar = 'Chen et al. 2025, "WINA", arXiv 2505.19427'
    weighted: ClassVar = True


@register
@dataclass(frozen=True)
class WINAInput(TEALInput):
    """Thresholds on |x_i| ||W_in[:, i]||."""

    name: ClassVar = "wina-input"
    paper: ClassVar = WINAHidden.paper
    weighted: ClassVar = True
