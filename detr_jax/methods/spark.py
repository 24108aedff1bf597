"""Spark Transformer's statistical top-k: about equally many groups for every token, without a sort."""

import jax

from detr_jax.methods.base import FitMaterial, Score, Wrapper, register, storable
from detr_jax.methods.mgs import MGS
from detr_jax.models import FFNWeights


@storable
class Standardised(Wrapper):
    """A gate's score in standard deviations from the mean of the token's scores.

    For normal scores the threshold is the normal quantile of the density; here it is calibrated.
    """

    of: Score

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return jax.nn.standardize(self.of(ffn, x, tokens), axis=-1)


@register
class Spark(MGS):
    """Statistical top-k over the gates of MGS."""

    name = "stat-topk"
    paper = 'You et al. 2025, "Spark Transformer", arXiv 2506.06644'
    unit = None

    def fit(self, material: FitMaterial) -> Standardised:
        return Standardised(material.gate)
