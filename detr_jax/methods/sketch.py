"""What neurons contribute, guessed from a sketch of the first matrix product; needs the inputs' covariance only."""

from dataclasses import field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.methods.base import FitMaterial, Traits, group_sums, register, storable
from detr_jax.methods.grouping import group_count
from detr_jax.methods.topk import ByRank
from detr_jax.methods.wrappers import Pooled, truncated_svd
from detr_jax.models import FFNWeights


@storable
class Sketch:
    """The sum over a group's neurons of about h_j ||W_out[j]||, with W_in as a product of rank r.

    Ours; per token it is a rough guess, averaged over the tokens of an image (`Pooled`) a good one.
    """

    traits = Traits("statistics", "group", "both")

    down: jax.Array
    """(d, r) float32."""
    up: jax.Array
    """(r, F) float32; `(down @ up).T` is about W_in."""
    bias: jax.Array
    """(F,) float32, b_in and what the sketch leaves out on average."""
    norms: jax.Array
    """(F,) float32, ||W_out[j]||."""
    group_size: int = field(metadata={"static": True})

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x.astype(jnp.float32) @ self.down @ self.up + self.bias)
        return group_sums(hidden * self.norms, group_count(hidden.shape[-1], self.group_size))

    def cost(self, d_model: int, features: int) -> float:
        return float(self.down.shape[1] * (d_model + features))


def sketch(ffn: FFNWeights, mean: np.ndarray, covariance: np.ndarray, rank: int, group_size: int) -> Sketch:
    """The sketch of rank r whose first product is closest to the FFN's on inputs of a mean and covariance.

    The matrix A of rank r that minimises E ||(W_in - A)(x - E x)||^2 is the truncated singular value decomposition of
    W_in C^(1/2), times C^(-1/2).

    `mean` (d,) and `covariance` C (d, d) are those of the FFN's inputs; raises as `truncated_svd`.
    """
    d_model = ffn.w_in.shape[1]
    if mean.shape != (d_model,) or covariance.shape != (d_model, d_model):
        raise ValueError(f"an FFN of {d_model} channels does not fit a covariance of shape {covariance.shape}")
    w_in = np.asarray(ffn.w_in, np.float64)
    # A ridge, so that directions in which the sample did not vary have an inverse.
    ridge = 1e-4 * max(np.trace(covariance) / d_model, np.finfo(np.float32).tiny)
    variances, axes = np.linalg.eigh(covariance + ridge * np.eye(d_model))
    deviations = np.sqrt(np.maximum(variances, ridge))
    neurons, channels = truncated_svd(w_in @ (axes * deviations), rank)
    up, down = neurons.T, (axes / deviations) @ channels.T
    bias = np.asarray(ffn.b_in, np.float64) + (w_in - (down @ up).T) @ mean
    norms = np.linalg.norm(np.asarray(ffn.w_out, np.float64), axis=1)
    array = partial(jnp.asarray, dtype=jnp.float32)
    return Sketch(array(down), array(up), array(bias), array(norms), group_size)


@register
class ContributionSketch(ByRank):
    """The neurons of highest sketched contribution over an image's tokens."""

    name = "sketch"
    paper = "ours"
    decides = "image"
    requires = frozenset({"input_moments"})

    rank: int = 16
    """Of the sketch; less where an FFN has fewer channels."""

    def fit(self, material: FitMaterial) -> Pooled:
        mean, covariance = material.input_moments.mean, material.input_moments.covariance
        return Pooled(sketch(material.weights, mean, covariance, min(self.rank, len(mean)), 1), odds=False)
