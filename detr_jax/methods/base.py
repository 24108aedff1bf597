"""Scores, selectors and methods, and the registry of methods.

A method is one frozen dataclass in one file, its options being its fields. `METHODS` feeds the comparison, `--method`,
the common tests and the table in docs/methods.md.

    method = METHODS["mgs"](group_size=8)                     # or named("mgs")
    gate = method.init((features, d_model), key)              # trained methods only
    loss = method.loss(gate, weights, trace)
    score = method.fit(FitMaterial(weights, gate=gate))       # what `method.requires` names must not be None
    selector = method.finish(Thresholded(score, threshold), weights)
    selectors = method.at_densities(material, threshold_of, (0.5, 0.1))
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError, require_counts
from detr_jax.kernels import Execution
from detr_jax.models import FFNTrace, FFNWeights, LowRankFactors, OutputLayer, Selection, Selector, Selectors
from detr_jax.pytrees import frozen, pytree
from detr_jax.safetensors_io import Part

if TYPE_CHECKING:
    from detr_jax.calibration.activations import ActivationStatistics
    from detr_jax.calibration.moments import Moments
    from detr_jax.calibration.token_sensitivity import Sensitivity

Class = TypeVar("Class", bound=type)
AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)
Unit = Literal["log-odds", "probability"]

STORABLE: dict[str, type] = {cls.__name__: cls for cls in (Execution, LowRankFactors, OutputLayer)}
"""Classes that plan files may hold, by the names they have there."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def storable(cls: Class) -> Class:
    """Makes a class a frozen dataclass and a pytree that plan files may hold: of arrays, of such classes, and, in
    fields with the metadata `static=True`, of None, booleans, numbers and strings."""
    STORABLE[cls.__name__] = cls
    return pytree(cls)


class Traits(NamedTuple):
    """Facts about a score or selector."""

    needs: Literal["nothing", "statistics", "training"]
    """What it is made from."""
    granularity: Literal["neuron", "group", "channel", "image"]
    """Neurons, groups of them, channels of the input, or groups for all tokens of an image or window at once."""
    saves: Literal["both", "first", "second"]
    """Matrix products that become smaller."""
    dynamic: bool = True
    """Whether it depends on the input."""
    tile_size: int | None = 1
    """Consecutive tokens per decision; None for all tokens of an image."""


class Free:
    """Base of scores and selectors without multiply-adds of their own."""

    def cost(self, d_model: int, features: int) -> float:
        return 0.0


class Wrapper:
    """Base of dataclasses with the traits and the cost of the score or selector in their first field."""

    @property
    def _wrapped(self) -> Any:
        return getattr(self, dataclasses.fields(self)[0].name)  # type: ignore[arg-type]

    @property
    def traits(self) -> Traits:
        return self._wrapped.traits

    def cost(self, d_model: int, features: int) -> float:
        return self._wrapped.cost(d_model, features)


class Described(Protocol):
    """A score or selector of a method."""

    @property
    def traits(self) -> Traits: ...

    def cost(self, d_model: int, features: int) -> float:
        """Multiply-adds per token of its own, without the parts of the FFN that it uses."""


class MethodSelector(Described, Selector, Protocol):
    """A selector of a method."""


class Score(Described, Protocol):
    """Need for each part of an FFN; higher is kept sooner. A pytree.

    Scores that estimate the probability of being active have a `unit`, "log-odds" or "probability".
    """

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """(..., decisions, G) float32, of channels (..., tokens, d); arguments as of a selector."""


@storable
class Thresholded(Wrapper):
    """The selector "score >= threshold", () float32; minus infinity keeps everything."""

    score: Score
    threshold: jax.Array

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        return selection_of(self.score, self.score(ffn, x, tokens) >= self.threshold)

    def at(self, threshold: float | jax.Array) -> "Thresholded":
        """The same with another threshold, in the unit of the score; raises an InputError for NaN."""
        if threshold != threshold:
            raise InputError("a threshold cannot be NaN")
        return dataclasses.replace(self, threshold=jnp.float32(threshold))

    def at_probability(self, probability: float) -> "Thresholded":
        """The same with a probability as threshold; an InputError if it is none, or the score is no probability."""
        unit = getattr(self.score, "unit", None)
        if unit is None:
            raise InputError(
                f"the score of {type(self.score).__name__} is no probability: pass its threshold in its own unit, as "
                "with_threshold(score=...)"
            )
        threshold = log_odds(probability)  # also checks it
        return self.at(threshold if unit == "log-odds" else probability)


def at_threshold(selector: Selector, change: Callable[[Thresholded], Thresholded]) -> Selector:
    """A selector with another threshold, wherever in it that is; raises an InputError if it has none."""
    if isinstance(selector, Thresholded):
        return change(selector)
    for field in ("of", "selector", "gate"):
        if getattr(selector, field, None) is not None:
            return dataclasses.replace(cast(Any, selector), **{field: at_threshold(getattr(selector, field), change)})
    raise InputError(f"{type(selector).__name__} decides by no threshold")


def prepared(selector: Selector, ffn: FFNWeights) -> Selector:
    """A selector with what it reads of the FFN's rows gathered once, wherever in it that is."""
    if hasattr(selector, "prepare"):
        return selector.prepare(ffn)
    if isinstance(getattr(selector, "selector", None), Wrapper | Free):
        return dataclasses.replace(cast(Any, selector), selector=prepared(cast(Any, selector).selector, ffn))
    return selector


def restricted_to(selectors: Selectors, names: Collection[str]) -> dict[str, Selector]:
    """Selectors of which those of some FFNs decide; the others keep everything. One program runs any subset."""
    return {
        name: selector if name in names else at_threshold(selector, lambda found: found.at(-np.inf))
        for name, selector in selectors.items()
    }


def selection_of(score: Score, kept: jax.Array) -> Selection:
    """The selection of the parts with `kept`, a mask of the shape of the score."""
    if score.traits.granularity == "channel":
        return Selection(channels=kept)
    return Selection(active=kept, tile_size=score.traits.tile_size)


def ordered_bits(numbers: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order, zeros of both signs alike."""
    bits = jax.lax.bitcast_convert_type(jnp.where(numbers == 0, 0, numbers).astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def group_sums(per_neuron: AnyArray, groups: int) -> AnyArray:
    """(..., F) -> (..., G), the sum over each group of consecutive neurons."""
    return per_neuron.reshape(*per_neuron.shape[:-1], groups, per_neuron.shape[-1] // groups).sum(-1)


def log_odds(probability: float) -> float:
    """The log-odds of a probability, the unit of gates' scores, infinite for 0 and 1; an InputError for others."""
    if not 0 <= probability <= 1:
        raise InputError(f"a threshold must be a probability, not {probability}")
    with np.errstate(divide="ignore"):
        return float(np.log(probability) - np.log1p(-np.float64(probability)))


_ABSENT: Any = None  # methods read what they require, which is there


@dataclass(frozen=True)
class FitMaterial:
    """Data that the selector of one FFN is fitted from; None where `Method.requires` does not name it.

    Statistics are of training images, the gate is trained with `TrainedMethod.init` and `loss`, `inputs` (tokens, d)
    are drawn from the method's `images` training images, `tokens` of them at most; `sensitivity` is of the detector's
    outputs to errors at those, or None for all alike; `name` is for errors.
    """

    weights: FFNWeights
    activations: "ActivationStatistics" = _ABSENT
    input_moments: "Moments" = _ABSENT
    hidden_moments: "Moments" = _ABSENT
    gate: Score = _ABSENT
    inputs: np.ndarray = _ABSENT
    sensitivity: "Sensitivity | None" = None
    name: str = "the FFN"


@dataclass(frozen=True)
class Method:
    """A method of deciding what an FFN computes: a frozen dataclass whose fields are its options.

    Attributes:
        name: in `METHODS`, `--method` and results.
        paper: its source.
        decides, saves, dynamic: see `Traits`.
        requires: fields of `FitMaterial` that `fit` reads beside the weights.
        tuned_by: how a budget is met: "threshold" by the threshold of the score that `fit` returns, "density" by
            `at_densities` alone, "nothing" where `fit` returns a selector that has no such setting.
        unit: of the scores, see `Score`; None for scores that are no estimates of probabilities.
        shares_density: whether the method shares a density among the FFNs itself, by `at_mean_density`; else it is
            shared by the divergence of the outputs with one FFN at a time at each density.
        note: a few words for tables.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    decides: ClassVar[Literal["neuron", "group", "channel", "image"]] = "group"
    saves: ClassVar[Literal["both", "first", "second"]] = "both"
    dynamic: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset()
    tuned_by: ClassVar[Literal["threshold", "density", "nothing"]] = "threshold"
    unit: ClassVar[Unit | None] = None
    shares_density: ClassVar[bool] = False
    note: ClassVar[str] = ""

    def fit(self, material: FitMaterial) -> Any:
        """The score of one FFN; its selector where `tuned_by` is "nothing"."""
        raise NotImplementedError

    def finish(self, selector: Thresholded, weights: FFNWeights) -> Selector:
        """The selector that is used, from one with its final threshold; that itself unless a method adds to it."""
        return selector

    def at_densities(
        self, material: FitMaterial, threshold_of: Callable[[float], float], densities: Sequence[float]
    ) -> tuple[Selector, ...]:
        """Selectors of one FFN at densities from 0 to 1; they differ in numbers only.

        `threshold_of` gives the threshold of its score at a density, and is called where `tuned_by` is "threshold".
        """
        score = self.fit(material)
        selectors = [Thresholded(score, jnp.float32(threshold_of(density))) for density in densities]
        return tuple(self.finish(selector, material.weights) for selector in selectors)

    def at_mean_density(
        self,
        material: Mapping[str, FitMaterial],
        density: float,
        divergence: Callable[[Mapping[str, Selector]], float],
        part: Part,
    ) -> dict[str, Selector]:
        """Selectors of all FFNs at a mean density, where `shares_density`.

        Args:
            material: of each FFN by name.
            density: mean share of the neurons that is computed.
            divergence: of the detector's outputs with some selectors, on held-out images.
            part: computes arrays by name, each of `parts` under a name of its own, or returns those of an interrupted
                run.
        """
        raise NotImplementedError

    def parts(self, ffns: int) -> int:
        """Number of parts of `at_mean_density`."""
        return ffns


@dataclass(frozen=True)
class TrainedMethod(Method):
    """A method with a gate for each FFN, which is trained on the frozen detector."""

    requires: ClassVar[frozenset[str]] = frozenset({"gate"})

    group_size: int = 8
    """Hidden neurons per gate."""
    epochs: int = 5
    """Passes over the training images."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam, which decays to 0 along a cosine."""
    seed: int = 0
    """Of the order of the images, and of the first values of gates with two layers."""

    def __post_init__(self) -> None:
        require_counts(self, "group_size", "epochs")

    @property
    def gates(self) -> "TrainedMethod":
        """The method that trains the same gates, with the same options: that whose `init` and `loss` this one has."""
        cls = next(cls for cls in type(self).__mro__ if vars(cls).keys() & {"init", "loss"})
        return cls(**{option.name: getattr(self, option.name) for option in dataclasses.fields(cls)})

    def init(self, shape: tuple[int, int], key: jax.Array) -> Score:
        """A gate that gives every group even odds, for an FFN of `shape` (hidden neurons, d)."""
        raise NotImplementedError

    def loss(self, gate: Any, weights: FFNWeights, trace: FFNTrace) -> jax.Array:
        """The loss () of a gate on one batch, averaged over groups and tokens that exist."""
        raise NotImplementedError

    def fit(self, material: FitMaterial) -> Score:
        return material.gate


AMethod = TypeVar("AMethod", bound=Method)
METHODS: dict[str, type[Method]] = {}
"""Every method by its name."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def register(cls: type[AMethod]) -> type[AMethod]:
    """Makes a class a frozen dataclass, unless it is a dataclass already, and adds it to `METHODS`."""
    cls = frozen(cls)
    METHODS[cls.name] = cls
    return cls


def named(name: str) -> Method:
    """The method of a name, with default options; raises an InputError if there is none."""
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]()
