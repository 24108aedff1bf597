"""Conditional DETR: DETR with another decoder, boxes relative to reference points, and sigmoids for classes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from detr_jax.models.conditional_detr.decoder import ConditionalTransformer
from detr_jax.models.detr.modeling import DETR
from detr_jax.models.detr.outputs import SigmoidClasses

EPSILON = 1e-5
"""Distance of reference points from 0 and 1 where their log-odds are taken."""


class ConditionalDETR(SigmoidClasses, DETR):
    """Conditional DETR (Meng et al. 2021) in inference form."""

    transformer: ConditionalTransformer
    transformer_class = ConditionalTransformer

    def heads(self, x: Float[Array, "*tokens d"]) -> tuple[Float[Array, "*tokens logits"], Float[Array, "*tokens 4"]]:
        """Logits of the classes, and boxes whose centres are relative to the reference points, of features."""
        x = x.astype(jnp.float32)
        points = jnp.clip(self.transformer.reference_points(), EPSILON, 1 - EPSILON)
        log_odds = self.box_head.log_odds(x)
        centres = log_odds[..., :2] + jnp.log(points) - jnp.log1p(-points)
        return self.class_head(x), jax.nn.sigmoid(jnp.concatenate([centres, log_odds[..., 2:]], axis=-1))
