"""The detector: backbone, projections to feature maps of several strides, transformer with its heads."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from detr_jax.kernels.sampling import Shapes, multi_scale_sampling
from detr_jax.models.deformable_detr.config import DeformableDetrConfig
from detr_jax.models.deformable_detr.transformer import Memory, Transformer
from detr_jax.models.detr.outputs import DetrOutputs, SigmoidClasses
from detr_jax.models.encoder_decoder import EncoderDecoder
from detr_jax.models.positions import downsample_mask, sine_positions
from detr_jax.models.resnet import ResNet
from detr_jax.models.selection import Selectors
from detr_jax.pytrees import pytree

GROUPS = 32
"""Of the group norms."""
EPSILON = 1e-5


@pytree
class FeatureMaps:
    """Features of a batch of images before the transformer, by level."""

    x: tuple[jax.Array, ...]
    """(batch, height, width, d) of each level."""
    masks: tuple[jax.Array, ...]
    """(batch, height, width) bool of each level, false for padding."""
    valid: jax.Array
    """(batch,) bool, false for images that only fill the batch."""


class LevelProjection(nnx.Module):
    """A convolution to the features of the transformer, and a group norm; one of 3x3 halves the sides."""

    def __init__(self, features: int, d_model: int, size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options: dict[str, Any] = {"strides": 1 if size == 1 else 2, "padding": ((size // 2,) * 2,) * 2}
        xavier = nnx.initializers.glorot_uniform()
        self.conv = nnx.Conv(features, d_model, (size, size), kernel_init=xavier, dtype=dtype, rngs=rngs, **options)
        norm: dict[str, Any] = {"num_groups": GROUPS, "epsilon": EPSILON, "use_fast_variance": False}
        self.norm = nnx.GroupNorm(d_model, dtype=dtype, rngs=rngs, **norm)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class DeformableDETR(SigmoidClasses, EncoderDecoder):
    """Deformable DETR (Zhu et al. 2021) in inference form: single scale or several, with or without box refinement and
    proposals of the encoder.

    Parameters and heads are float32 whatever the `dtype` of the computation is. Group norms see padding: outputs for a
    batch of images of several sizes depend on the padding, as those of the official code do.
    """

    config: DeformableDetrConfig

    def __init__(self, config: DeformableDetrConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.backbone = ResNet(config.backbone, dtype=dtype, rngs=rngs)
        features = config.backbone.stage_features[-config.backbone_levels :]
        more = config.levels - config.backbone_levels
        sizes = [(width, 1) for width in features] + [(features[-1], 3)] * (more > 0)
        sizes += [(config.d_model, 3)] * (more - 1)
        make = [LevelProjection(width, config.d_model, size, dtype=dtype, rngs=rngs) for width, size in sizes]
        self.input_projections = nnx.List(make)
        self.transformer = Transformer(config, dtype=dtype, rngs=rngs)

    @property
    def strides(self) -> tuple[int, ...]:
        return self.config.strides

    def embed(
        self,
        pixel_values: Float[Array, "batch height width 3"],
        pixel_mask: Bool[Array, "batch height width"],
        valid: Bool[Array, " batch"],
    ) -> FeatureMaps:
        stages = self.backbone.pyramid(jnp.asarray(pixel_values, self.dtype))[-self.config.backbone_levels :]
        levels: list[jax.Array] = []
        for index, projection in enumerate(self.input_projections):
            before = stages[min(index, len(stages) - 1)] if index <= len(stages) else levels[-1]
            levels.append(projection(before))
        mask = jnp.asarray(pixel_mask, bool)
        return FeatureMaps(tuple(levels), tuple(downsample_mask(mask, *x.shape[1:3]) for x in levels), valid)

    def transform(
        self, features: FeatureMaps, *, selectors: Selectors | None = None, trace: bool = False, auxiliary: bool = False
    ) -> DetrOutputs:
        """See `Detector.transform`; `auxiliary` outputs are those after every decoder layer, and of the encoder."""
        run, traces = self.ffn_runner(selectors, features.valid, trace)
        before = _memory(features)
        kept = self.kept_tokens(selectors, features, trace)
        memory = self.transformer.encode(before, self._positions(features), run, kept)
        layers = self.transformer.decode(memory, run)
        outputs = [
            (self.transformer.logits(index, x), self.transformer.boxes(index, x, references))
            for index, (x, references) in enumerate(layers)
            if auxiliary or index == len(layers) - 1
        ]
        return DetrOutputs(*outputs[-1], tuple(outputs[:-1]), (before.x, memory.x) if auxiliary else (), traces)

    def encoder_inputs(self, features: FeatureMaps) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
        memory = _memory(features)
        return memory.x, memory.mask, tuple(height * width for height, width in memory.shapes)

    def encoder_steps(self, features: FeatureMaps) -> list[jax.Array]:
        run, _ = self.ffn_runner(None, features.valid, False)
        return self.transformer.encoder_steps(_memory(features), self._positions(features), run)

    def record_attention(self, layer: Any, found: list[jax.Array]) -> None:
        """Of cells: the weights of samples times those of bilinear reading."""

        def recording(value: jax.Array, shapes: Shapes, locations: jax.Array, weights: jax.Array) -> jax.Array:
            # Each output is a sum of values, so that what a cell gives is its derivative.
            one = jnp.zeros((*value.shape[:3], 1), jnp.float32)
            outputs, back = jax.vjp(lambda one: multi_scale_sampling(one, shapes, locations, weights), one)
            found.append(back(jnp.ones_like(outputs))[0].sum((2, 3)))
            return multi_scale_sampling(value, shapes, locations, weights)

        layer.cross_attention.sample = recording

    def _positions(self, features: FeatureMaps) -> jax.Array:
        """(batch, tokens, d), where tokens are and of which level."""
        d_model, levels = self.config.d_model, self.transformer.levels[...]
        encoded = [sine_positions(mask, d_model, offset=-0.5) for mask in features.masks]
        return _in_a_row([x + level for x, level in zip(encoded, levels, strict=True)]).astype(self.dtype)


def _in_a_row(levels: list[jax.Array]) -> jax.Array:
    """(batch, height, width, ...) of each level -> (batch, tokens, ...)."""
    return jnp.concatenate([x.reshape(len(x), -1, *x.shape[3:]) for x in levels], axis=1)


def _memory(features: FeatureMaps) -> Memory:
    present = [jnp.stack([mask[:, 0].mean(-1), mask[:, :, 0].mean(-1)], axis=-1) for mask in features.masks]
    # Images that only fill a batch may be nothing but padding.
    ratios = jnp.where((stacked := jnp.stack(present, axis=1)) > 0, stacked, 1)
    shapes = tuple((x.shape[1], x.shape[2]) for x in features.x)
    return Memory(_in_a_row(list(features.x)), _in_a_row(list(features.masks)), shapes, ratios)
