"""The detector: backbone, transformer and the two heads."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Shaped

from detr_jax.models.detections import Detections
from detr_jax.models.detr.config import DetrConfig
from detr_jax.models.detr.outputs import DetrOutputs, class_probabilities, output_divergence, postprocess
from detr_jax.models.detr.transformer import Transformer, attention_scores, softmax_attention
from detr_jax.models.encoder_decoder import EncoderDecoder
from detr_jax.models.perceptron import Perceptron
from detr_jax.models.positions import downsample_mask, sine_positions
from detr_jax.models.resnet import ResNet
from detr_jax.models.selection import Selectors
from detr_jax.pytrees import pytree


@pytree
class ImageTokens:
    """Features of a batch of images after the backbone, with their positions."""

    x: jax.Array
    """(batch, tokens, d) projected features of the backbone."""
    positions: jax.Array
    """(batch, tokens, d) position encoding."""
    mask: jax.Array
    """(batch, tokens) bool, false for padding."""
    valid: jax.Array
    """(batch,) bool, false for images that only fill the batch."""


class BoxHead(Perceptron):
    """A perceptron of three layers, then a sigmoid."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        super().__init__((d_model, d_model, d_model, 4), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.log_odds(x))

    def log_odds(self, x: jax.Array) -> jax.Array:
        """(..., d) -> (..., 4), the boxes before the sigmoid."""
        return super().__call__(x)


class DETR(EncoderDecoder):
    """DEtection TRansformer (Carion et al. 2020), the official architecture in inference form (no dropout).

    `preset_config("detr-r50")` and its siblings are the published configurations. Parameters and heads are float32
    whatever the `dtype` of the computation is.
    """

    config: DetrConfig
    transformer_class: type[Transformer] = Transformer

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.backbone = ResNet(config.backbone, dtype=dtype, rngs=rngs)
        self.input_projection = nnx.Linear(config.backbone.features, config.d_model, dtype=dtype, rngs=rngs)
        self.transformer = self.transformer_class(config, dtype=dtype, rngs=rngs)
        self.class_head = nnx.Linear(config.d_model, config.logits, rngs=rngs)
        self.box_head = BoxHead(config.d_model, rngs=rngs)

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.config.backbone.stride,)

    def embed(
        self,
        pixel_values: Float[Array, "batch height width 3"],
        pixel_mask: Bool[Array, "batch height width"],
        valid: Bool[Array, " batch"],
    ) -> ImageTokens:
        features = self.input_projection(self.backbone(jnp.asarray(pixel_values, self.dtype)))
        batch, height, width, d_model = features.shape
        mask = downsample_mask(jnp.asarray(pixel_mask, bool), height, width)
        positions = sine_positions(mask, d_model).astype(self.dtype)
        flat = (batch, height * width)
        x, positions = (array.reshape(*flat, d_model) for array in (features, positions))
        return ImageTokens(x, positions, mask.reshape(flat), valid)

    def transform(
        self, features: ImageTokens, *, selectors: Selectors | None = None, trace: bool = False, auxiliary: bool = False
    ) -> DetrOutputs:
        """See `Detector.transform`; `auxiliary` outputs are those after every decoder layer, and of the encoder."""
        run, traces = self.ffn_runner(selectors, features.valid, trace)
        x, positions, mask = features.x, features.positions, features.mask
        kept = self.kept_tokens(selectors, features, trace)
        memory = self.transformer.encode(x, positions, mask, run, kept)
        layers = self.transformer.decode(memory, positions, mask, run)
        *earlier, (logits, boxes) = [self.heads(x) for x in (layers if auxiliary else layers[-1:])]
        return DetrOutputs(logits, boxes, tuple(earlier), (x, memory) if auxiliary else (), traces)

    def encoder_inputs(self, features: ImageTokens) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
        return features.x, features.mask, (features.x.shape[1],)

    def encoder_steps(self, features: ImageTokens) -> list[jax.Array]:
        run, _ = self.ffn_runner(None, features.valid, False)
        return self.transformer.encoder_steps(features.x, features.positions, features.mask, run)

    def record_attention(self, layer: Any, found: list[jax.Array]) -> None:
        def recording(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
            weights = jax.nn.softmax(attention_scores(query, key, options.get("mask")))
            found.append(weights.sum((1, 2)))
            return softmax_attention(query, key, value, **options)

        layer.cross_attention.attention_fn = recording

    def heads(self, x: Float[Array, "*tokens d"]) -> tuple[Float[Array, "*tokens logits"], Float[Array, "*tokens 4"]]:
        """Logits with "no object" last, and boxes, of features."""
        x = x.astype(jnp.float32)
        return self.class_head(x), self.box_head(x)

    def query_predictions(
        self, outputs: DetrOutputs
    ) -> tuple[Float[Array, "batch queries classes"], Float[Array, "batch queries 4"]]:
        return class_probabilities(outputs.logits), outputs.boxes

    def detections(self, outputs: DetrOutputs, sizes: Shaped[Array, "batch 2"]) -> Detections:
        return postprocess(outputs.logits, outputs.boxes, sizes)

    def divergence(self, dense: DetrOutputs, sparse: DetrOutputs) -> Float[Array, " batch"]:
        return output_divergence(dense, sparse)
