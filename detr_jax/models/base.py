"""The detector protocol: everything that the rest of the package knows about a detector."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from detr_jax.errors import InputError
from detr_jax.models.detections import Detections
from detr_jax.models.ffn import FFN, FFNTrace, RunFFN, permute
from detr_jax.models.preprocessing import Preprocessing
from detr_jax.models.selection import FFNWeights, Permutations, PlanSelectors, Selectors


@dataclass(frozen=True)
class FFNSpec:
    """Features of a token and hidden neurons of one FFN, and the tokens that go through it."""

    d_model: int
    hidden: int
    tokens: Literal["image", "query"]
    grids: tuple[int, ...] = ()
    """Indices into `Detector.token_grids` of the image tokens' grids, one after the other, rows first."""


class HasFFNs(Protocol):
    """Anything with FFNs that inputs go through; a pytree. Statistics, gates and calibration need no more."""

    def ffn_weights(self) -> dict[str, FFNWeights]:
        """The FFNs by name, in the order in which they run, in the compute dtype."""

    def traces(self, batch: Any, selectors: Selectors) -> dict[str, FFNTrace]:
        """Inputs, hidden activations and selections of each FFN while some of them are sparse."""


class Outputs(Protocol):
    """Outputs of a detector: a dataclass and pytree of arrays with an axis of images in front."""

    @property
    def traces(self) -> dict[str, FFNTrace] | None:
        """Of the FFNs by name, if asked for."""


class Detector(nnx.Module):
    """A detector whose FFNs can be made sparse. Subclasses add the abstract methods and a line in the registry.

    Its features and outputs are pytrees of its own, every array with an axis of images in front; features have `valid`
    (batch,), as `embed` got it, and outputs have `traces`. A subclass is built from a configuration with `labels`,
    `preprocessing` and `queries`, as `cls(config, dtype=..., rngs=...)`, and keeps `config` and `dtype`.
    """

    config: Any
    dtype: jnp.dtype
    token_parts: tuple[str, ...] = ()
    """Parts whose layers update some of the image tokens only where `selectors` have a `TokenSelector` for them."""
    permutations = Permutations({})
    """Of the hidden neurons, since the detector was loaded."""

    @property
    @abc.abstractmethod
    def ffns(self) -> dict[str, FFN]:
        """The FFNs by name, in the order in which they run."""

    @abc.abstractmethod
    def ffn_specs(self) -> dict[str, FFNSpec]:
        """Shapes and tokens of the FFNs by name, in the order in which they run."""

    @property
    @abc.abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring tokens of each token grid."""

    @abc.abstractmethod
    def embed(
        self,
        pixel_values: Float[Array, "batch height width 3"],
        pixel_mask: Bool[Array, "batch height width"],
        valid: Bool[Array, " batch"],
    ) -> Any:
        """Features before the transformer, which no selector changes: a pass over many selectors needs them once.

        Args:
            pixel_values: preprocessed images.
            pixel_mask: true where the image is.
            valid: false for images that only fill the batch; no token of theirs counts in traces.
        """

    @abc.abstractmethod
    def transform(self, features: Any, *, selectors: Selectors | None = None, trace: bool = False) -> Outputs:
        """Outputs from what `embed` returned, with inputs and hidden activations of every FFN if `trace`.

        FFNs without one of the `selectors`, see `known_selectors`, are dense.
        """

    @abc.abstractmethod
    def query_predictions(
        self, outputs: Any
    ) -> tuple[Float[Array, "batch queries classes"], Float[Array, "batch queries 4"]]:
        """Probability of each class, and box (cx, cy, w, h) in fractions of the image, of every object query."""

    @abc.abstractmethod
    def detections(self, outputs: Any, sizes: Shaped[Array, "batch 2"]) -> Detections:
        """Detections in pixels of the original images, whose heights and widths are `sizes`."""

    @abc.abstractmethod
    def divergence(self, dense: Any, sparse: Any) -> Float[Array, " batch"]:
        """How much the outputs for each image change; stands in for AP where many settings are tried."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become inputs."""
        return self.config.preprocessing

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; empty for an id without a class."""
        return self.config.labels

    @property
    def queries(self) -> int:
        """Number of object queries."""
        return self.config.queries

    def __call__(
        self,
        pixel_values: Float[Array, "batch height width 3"],
        pixel_mask: Bool[Array, "batch height width"] | None = None,
        *,
        selectors: Selectors | None = None,
        trace: bool = False,
        **options: Any,
    ) -> Any:
        """Outputs for a batch of images from `detr_jax.preprocess_images`; an empty batch gives empty outputs.

        `pixel_mask` is true where the image is, None where nothing is padding; the rest are options of `transform`.

        Raises:
            InputError: if a shape or type does not fit, or as `known_selectors`.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[-1] != 3:
            raise InputError(f"pixel_values must be (batch, height, width, 3), got {pixel_values.shape}")
        if not jnp.issubdtype(dtype := pixel_values.dtype, jnp.floating):
            raise InputError(
                f"pixel_values must be normalised floats, got {dtype}; detr_jax.preprocess_images makes them"
            )
        if pixel_mask is None:
            pixel_mask = jnp.ones(pixel_values.shape[:3], bool)
        elif pixel_mask.shape != pixel_values.shape[:3]:
            raise InputError(f"pixel_mask must be {pixel_values.shape[:3]} like pixel_values, got {pixel_mask.shape}")
        features = self.embed(pixel_values, pixel_mask, jnp.ones(pixel_values.shape[0], bool))
        return self.transform(features, selectors=selectors, trace=trace, **options)

    def token_grids(self, size: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each grid of image tokens for padded images of (height, width) pixels."""
        return tuple((-(-size[0] // stride), -(-size[1] // stride)) for stride in self.strides)

    def ffn_weights(self) -> dict[str, FFNWeights]:
        """The FFNs as arrays in the compute dtype, by name."""
        return {name: ffn.weights() for name, ffn in self.ffns.items()}

    def traces(self, features: Any, selectors: Selectors) -> dict[str, FFNTrace]:
        """Inputs, hidden activations and selections of each FFN by name."""
        return self.transform(features, selectors=selectors, trace=True).traces or {}

    def with_permutations(self, permutations: Mapping[str, Int[np.ndarray, " hidden"]]) -> Self:
        """The same function with the hidden neurons of some FFNs permuted, see `permute`; this one stays as it is."""
        copy = nnx.clone(self)
        ffns = copy.ffns
        for name, permutation in permutations.items():
            for parameter, value in permute(ffns[name].parameters(), permutation)._asdict().items():
                getattr(ffns[name], parameter)[...] = value
        copy.permutations = self.permutations.then(permutations)
        return copy

    def ffn_runner(
        self, selectors: Selectors | None, valid: Bool[Array, " batch"], trace: bool
    ) -> tuple[RunFFN, dict[str, FFNTrace] | None]:
        """For `transform`: a function that computes FFNs, and the traces that its calls fill in, None without `trace`.

        Raises as `known_selectors`.
        """
        selectors, ffns = self.known_selectors(selectors), self.ffns
        traces: dict[str, FFNTrace] | None = {} if trace else None

        def run(name: str, x: jax.Array, tokens: jax.Array) -> jax.Array:
            if traces is not None:
                traced = ffns[name].trace(x, tokens, selectors.get(name))
                traces[name] = replace(traced, tokens=traced.tokens & valid[:, None])
            return ffns[name](x, tokens, selectors.get(name))

        return run, traces

    def known_selectors(self, selectors: Selectors | None) -> Selectors:
        """The selectors of a call, {} for None.

        Raises:
            InputError: if one names an FFN that does not exist, or they are a plan's and the hidden neurons are not in
                the plan's order.
        """
        selectors, names = {} if selectors is None else selectors, [*self.ffn_specs(), *self.token_parts]
        if isinstance(selectors, PlanSelectors) and selectors.permutations != self.permutations:
            raise InputError(
                "these selectors belong to a plan that has the hidden neurons in another order than this detector: use "
                "detr_jax.load_sparse(detector, plan), or detector.with_permutations(plan.permutations)"
            )
        if unknown := set(selectors) - set(names):
            raise InputError(f"no FFN is named {sorted(unknown)}; this detector has {list(self.ffn_specs())}")
        return selectors
