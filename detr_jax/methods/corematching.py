"""CoreMatching: one set of groups for all tokens of an image."""

from detr_jax.methods.base import FitMaterial, register
from detr_jax.methods.mgs import MGS
from detr_jax.methods.wrappers import Pooled


@register
class CoreMatching(MGS):
    """The groups of highest mean probability over an image's tokens, by the gates of MGS."""

    name = "core"
    paper = 'Wang et al. 2025, "CoreMatching", arXiv 2505.19235'
    decides = "image"
    unit = "probability"

    def fit(self, material: FitMaterial) -> Pooled:
        return Pooled(material.gate, odds=True)
