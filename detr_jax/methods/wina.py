"""WINA, without its rotation: magnitudes of activations times the norms of the weights that they meet."""

from detr_jax.methods.base import register
from detr_jax.methods.teal import TEALHidden, TEALInput


@register
class WINAHidden(TEALHidden):
    """Thresholds on `|h_j| ||W_out[j]||`."""

    name = "wina-hidden"
    paper = 'Chen et al. 2025, "WINA", arXiv 2505.19427'
    weighted = True


@register
class WINAInput(TEALInput):
    """Thresholds on `|x_i| ||W_in[:, i]||`."""

    name = "wina-input"
    paper = WINAHidden.paper
    weighted = True
