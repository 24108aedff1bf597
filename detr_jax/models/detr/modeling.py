"""The detector: backbone, transformer and the two heads."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.models.detr.config import DetrConfig
from detr_jax.models.detr.transformer import Transformer
from detr_jax.models.ffn import FFN, FFNTrace
from detr_jax.models.positions import downsample_mask, sine_positions
from detr_jax.models.resnet import ResNet
from detr_jax.models.selection import FFNWeights, Selectors


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImageTokens:
    """A batch of images as the transformer sees them.

    Attributes:
        x: (batch, tokens, d) projected features of the backbone.
        positions: (batch, tokens, d) position encoding.
        mask: (batch, tokens) bool, false for padding.
        valid: (batch,) bool, false for images that only fill the batch.
    """

    x: jax.Array
    positions: jax.Array
    mask: jax.Array
    valid: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DetrOutputs:
    """What a DETR says about a batch of images, in float32.

    Attributes:
        logits: (batch, queries, classes + 1), "no object" last.
        boxes: (batch, queries, 4) as (cx, cy, w, h), fractions of the unpadded image.
        auxiliary: (logits, boxes) after each decoder layer but the last, if asked for.
        encoder: (batch, tokens, d) input and output of the encoder, if auxiliary outputs were asked for.
        traces: what went through each FFN by name, if asked for.
    """

    logits: jax.Array
    boxes: jax.Array
    auxiliary: tuple[tuple[jax.Array, jax.Array], ...] = ()
    encoder: tuple[jax.Array, ...] = ()
    traces: dict[str, FFNTrace] | None = None


class BoxHead(nnx.Module):
    """A perceptron of three layers, then a sigmoid."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(d_model, out, rngs=rngs) for out in (d_model, d_model, 4)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.log_odds(x))

    def log_odds(self, x: jax.Array) -> jax.Array:
        """(..., d) -> (..., 4), the boxes before the sigmoid."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class DETR(nnx.Module):
    """DEtection TRansformer (Carion et al. 2020), the official architecture in inference form (no dropout).

    Args:
        config: architecture; `preset_config("detr-r50")` and its siblings give the published ones.
        dtype: of the computation; parameters and heads are float32 throughout.
        rngs: source of the random initial parameters.
    """

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.backbone = ResNet(config.backbone, dtype=dtype, rngs=rngs)
        self.input_projection = nnx.Linear(config.backbone.features, config.d_model, dtype=dtype, rngs=rngs)
        self.transformer = Transformer(config, dtype=dtype, rngs=rngs)
        self.class_head = nnx.Linear(config.d_model, config.classes + 1, rngs=rngs)
        self.box_head = BoxHead(config.d_model, rngs=rngs)

    def __call__(
        self,
        pixel_values: jax.Array,
        pixel_mask: jax.Array | None = None,
        *,
        selectors: Selectors | None = None,
        auxiliary: bool = False,
        trace: bool = False,
    ) -> DetrOutputs:
        """Detects objects.

        Args:
            pixel_values: (batch, height, width, 3) float, normalised by `detr_jax.data.transforms`.
            pixel_mask: (batch, height, width) bool, true where the image is; None where nothing is padding.
            selectors: selector of each sparse FFN by name; FFNs without one are dense.
            auxiliary: also return what the heads say after every decoder layer, and the encoder's input and output.
            trace: also return inputs and hidden activations of every FFN.

        Raises:
            ValueError: if shapes or types do not fit, or a selector names an FFN that does not exist.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[-1] != 3:
            raise ValueError(f"pixel_values must be (batch, height, width, 3), got {pixel_values.shape}")
        if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
            raise ValueError(
                f"pixel_values must be normalised floats, got {pixel_values.dtype}; detr_jax.preprocess_images makes "
                "them"
            )
        if pixel_mask is None:
            pixel_mask = jnp.ones(pixel_values.shape[:3], bool)
        elif pixel_mask.shape != pixel_values.shape[:3]:
            raise ValueError(f"pixel_mask must be {pixel_values.shape[:3]} like pixel_values, got {pixel_mask.shape}")
        tokens = self.embed(pixel_values, pixel_mask, jnp.ones(pixel_values.shape[0], bool))
        return self.transform(tokens, selectors=selectors, auxiliary=auxiliary, trace=trace)

    def embed(self, pixel_values: jax.Array, pixel_mask: jax.Array, valid: jax.Array) -> ImageTokens:
        """The part before the transformer, which no selector changes: a pass over many selectors needs it once.

        Args:
            pixel_values: (batch, height, width, 3) float.
            pixel_mask: (batch, height, width) bool.
            valid: (batch,) bool, false for images that only fill the batch.
        """
        features = self.backbone(jnp.asarray(pixel_values, self.dtype))
        batch, height, width, _ = features.shape
        mask = downsample_mask(jnp.asarray(pixel_mask, bool), height, width)
        positions = sine_positions(mask, self.config.d_model).astype(self.dtype)
        flat = (batch, height * width)
        x = self.input_projection(features).reshape(*flat, -1)
        return ImageTokens(x, positions.reshape(*flat, -1), mask.reshape(flat), valid)

    def transform(
        self,
        tokens: ImageTokens,
        *,
        selectors: Selectors | None = None,
        auxiliary: bool = False,
        trace: bool = False,
    ) -> DetrOutputs:
        """The transformer and the heads; arguments and errors as of a call."""
        selectors = {} if selectors is None else selectors
        if unknown := set(selectors) - set(self.config.ffn_names):
            raise ValueError(f"no FFN is named {sorted(unknown)}; this detector has {list(self.config.ffn_names)}")
        x, positions, mask = tokens.x, tokens.positions, tokens.mask
        traces: dict[str, FFNTrace] | None = {} if trace else None
        memory = self.transformer.encode(x, positions, mask, selectors, traces)
        layers = self.transformer.decode(memory, positions, mask, selectors, traces)
        if traces is not None:
            valid = tokens.valid[:, None]
            traces = {name: dataclasses.replace(t, tokens=t.tokens & valid) for name, t in traces.items()}

        *earlier, (logits, boxes) = [self.heads(x) for x in (layers if auxiliary else layers[-1:])]
        return DetrOutputs(logits, boxes, tuple(earlier), (x, memory) if auxiliary else (), traces)

    def traces(self, tokens: ImageTokens, selectors: Selectors) -> dict[str, FFNTrace]:
        """What goes through each FFN, by name; see `sparsity.ffns_of`."""
        return self.transform(tokens, selectors=selectors, trace=True).traces

    def ffn_weights(self) -> dict[str, FFNWeights]:
        """The FFNs as arrays in the compute dtype, by name."""
        return {name: ffn.weights() for name, ffn in self.ffns.items()}

    @property
    def ffns(self) -> dict[str, FFN]:
        """The FFNs by name, in the order in which they run."""
        layers = (*self.transformer.encoder, *self.transformer.decoder)
        return {name: layer.ffn for name, layer in zip(self.config.ffn_names, layers, strict=True)}

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of encoder tokens for images of (height, width) pixels."""
        stride = self.config.backbone.stride
        return -(-size[0] // stride), -(-size[1] // stride)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(..., d) features -> (..., classes + 1) logits and (..., 4) boxes."""
        x = x.astype(jnp.float32)
        return self.class_head(x), self.box_head(x)
