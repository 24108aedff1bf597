"""Narrow experts: tokens are grouped, not neurons, so that each token computes one dense, much narrower FFN."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax import kernels
from detr_jax.errors import InputError, require_choices, require_counts
from detr_jax.kernels import Execution
from detr_jax.kernels.experts import pad_neurons
from detr_jax.methods.base import FitMaterial, Free, Method, Traits, register, storable
from detr_jax.methods.executed import Executed
from detr_jax.methods.expert_fitting import FittedExperts, fit_experts
from detr_jax.models import FFNWeights, Routed, Selection, Selector
from detr_jax.safetensors_io import Arrays, Part


@storable
class RoutedExperts(Free):
    """Sends each token to the narrow expert with the highest linear score.

    Experts come in stacks of equal width and are numbered through all stacks. Their first matrices are rows of the
    frozen FFN; a plan file holds which.

    Attributes:
        kernel: (d, C) float32, of the router.
        bias: (C,) float32.
        neurons: (n, k) int32 of each stack, hidden neurons of the FFN.
        w_out: (n, k, d) of each stack, float32 or bfloat16, output rows fitted to those neurons.
        b_out: (C, d) float32.
        gathered: the experts with the rows of the FFN, see `prepare`; None gathers them at every call.
    """

    traits: ClassVar = Traits("statistics", "neuron", "both")
    computation: ClassVar = "grouped by expert"

    kernel: jax.Array
    bias: jax.Array
    neurons: tuple[jax.Array, ...]
    w_out: tuple[jax.Array, ...]
    b_out: jax.Array
    gathered: kernels.Experts | None = dataclasses.field(default=None, metadata={"derived": True})

    @classmethod
    def of(cls, fitted: FittedExperts, dtype: str = "float32") -> "RoutedExperts":
        """From fitted experts; `dtype` is that of the output rows."""
        stacks = collections.defaultdict(list)
        for expert, neurons in enumerate(fitted.neurons):
            stacks[len(neurons)].append(expert)
        members = [stacks[width] for width in sorted(stacks)]
        order = np.concatenate(members)
        return cls(
            jnp.asarray(fitted.kernel[:, order]),
            jnp.asarray(fitted.bias[order]),
            tuple(jnp.asarray(np.stack([fitted.neurons[i] for i in of]), jnp.int32) for of in members),
            tuple(jnp.asarray(np.stack([fitted.w_out[i] for i in of]), dtype) for of in members),
            jnp.asarray(fitted.b_out[order]),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each expert."""
        return tuple(width for count, width in (stack.shape for stack in self.neurons) for _ in range(count))

    def cost(self, d_model: int, features: int) -> float:
        return float(self.kernel.size)

    def prepare(self, ffn: FFNWeights) -> "RoutedExperts":
        """The same with the experts' rows of the FFN gathered once, in its type.

        Raises:
            InputError: if an expert has neurons that the FFN does not have.
        """
        hidden = len(ffn.w_in)
        outside = [i for i in np.concatenate([np.ravel(stack) for stack in self.neurons]) if not 0 <= i < hidden]
        if outside:
            raise InputError(f"its experts have the neuron {outside[0]} of an FFN with {hidden}")
        return dataclasses.replace(self, gathered=self._gather(ffn))

    def _gather(self, ffn: FFNWeights) -> kernels.Experts:
        dtype = ffn.w_in.dtype
        return kernels.Experts(
            tuple(ffn.w_in[stack] for stack in self.neurons),
            tuple(ffn.b_in[stack] for stack in self.neurons),
            tuple(stack.astype(dtype) for stack in self.w_out),
            self.b_out.astype(dtype),
        )

    def padded(self, width: int) -> "RoutedExperts":
        """The same outputs and densities from prepared experts of one width, which share a program with others.

        They are filled up with rows of zeros of a neuron that no FFN has.
        """
        assert self.gathered is not None

        def fill(stacks: Sequence[jax.Array], value: int = 0) -> jax.Array:
            return jnp.concatenate([pad_neurons(stack, width, value) for stack in stacks])

        w_in, b_in, w_out = ((fill(stacks),) for stacks in self.gathered[:3])
        neurons = (fill(self.neurons, np.iinfo(np.int32).max),)
        gathered = kernels.Experts(w_in, b_in, w_out, self.gathered.b_out)
        return RoutedExperts(self.kernel, self.bias, neurons, w_out, self.b_out, gathered)

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        scores = jnp.matmul(x.astype(jnp.float32), self.kernel) + self.bias
        assignment = jnp.where(tokens, scores.argmax(-1), len(self.bias)).astype(jnp.int32)
        return Selection(routed=Routed(self.gathered or self._gather(ffn), self.neurons, assignment))


@register
class Experts(Method):
    """A linear router and narrow experts with overlapping sets of neurons, fitted in closed form.

    Ours; relatives that partition the neurons are MoEfication (Zhang et al. 2022), CMoE (Pei et al. 2025) and D2DMoE
    (Szatkowski et al. 2024).
    """

    name: ClassVar = "experts"
    paper: ClassVar = "ours, after MoEfication"
    decides: ClassVar = "neuron"
    requires: ClassVar = frozenset({"inputs", "sensitivity"})
    tuned_by: ClassVar = "density"
    shares_density: ClassVar = True
    note: ClassVar = "each token computes one narrow FFN"

    experts: int = 32
    """Of each FFN."""
    rounds: int = 2
    """Times that the router is trained and the experts are fitted again."""
    ranking: Literal["energy", "obs"] = "energy"
    """How an expert's neurons are chosen: by the variance of what they add to the output, or by elimination."""
    widths: Literal["price", "equal"] = "price"
    """How wide experts are: as many neurons as are worth one price for all FFNs, or all experts of all FFNs alike."""
    tokens: int = 65536
    """Inputs of each FFN that experts are fitted to, at most."""
    images: int = 1024
    """Training images that these are drawn from."""
    ridge: float = 1e-3
    """Of the regression of the output, towards the frozen rows; a share of the mean variance."""
    prior: float = 32.0
    """Tokens from the whole sample that count beside an expert's own, so that one with few tokens is not fitted to them
    alone."""
    router_steps: int = 1500
    """Steps of router training in each round, of 2048 tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the output rows in the plan, which are most of its size."""
    seed: int = 0
    """Of the tokens that are drawn, k-means and router training."""

    def __post_init__(self) -> None:
        require_counts(self, "experts", "tokens", "images", "router_steps")
        require_choices(self, "ranking", "widths", "dtype")
        for name in ("rounds", "ridge", "prior"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, not {getattr(self, name)}")

    def at_densities(
        self, material: FitMaterial, threshold_of: Callable[[float], float], densities: Sequence[float]
    ) -> tuple[RoutedExperts, ...]:
        return tuple(self.fits(material, densities))

    def fits(self, material: FitMaterial, densities: Iterable[float]) -> Iterator[RoutedExperts]:
        """Experts of one FFN at each density; what does not depend on it is computed once."""
        computed: dict[str, Arrays] = {}

        def part(name: str, compute: Callable[[], Arrays]) -> Arrays:
            if name not in computed:
                computed[name] = compute()
            return computed[name]

        ffn = {material.name: material}
        for density in densities:
            yield self._selector(fit_experts(ffn, density, self, part=part)[material.name], material.weights)

    def parts(self, ffns: int) -> int:
        priced = self.widths == "price"
        fits = (self.rounds + 1 + priced) * (1 + (self.ranking == "obs"))
        return ffns * (1 + fits + self.rounds) + priced

    def at_mean_density(
        self,
        material: Mapping[str, FitMaterial],
        density: float,
        divergence: Callable[[Mapping[str, Selector]], float],
        part: Part,
    ) -> dict[str, Selector]:
        """See `Method.at_mean_density`: one price for all FFNs, in units of the divergence that an error causes."""

        def importance(fitted: dict[str, FittedExperts], missed: dict[str, float]) -> Arrays:
            selectors = {name: self._selector(of, material[name].weights) for name, of in fitted.items()}
            # Experts of other widths are another program, and the definition is compiled soonest.
            once = {name: Executed(of, Execution(implementation="reference")) for name, of in selectors.items()}
            caused = {name: divergence({name: of}) / max(missed[name], 1e-9) for name, of in once.items()}
            mean = max(float(np.mean(list(caused.values()))), 1e-12)
            return {name: np.array(max(of / mean, 1e-3)) for name, of in caused.items()}

        # What an error causes must not make some FFNs wider than others where all widths are to be equal.
        found = fit_experts(material, density, self, importance if self.widths == "price" else None, part)
        return {name: self._selector(fitted, material[name].weights) for name, fitted in found.items()}

    def _selector(self, fitted: FittedExperts, weights: FFNWeights) -> RoutedExperts:
        return RoutedExperts.of(fitted, self.dtype).prepare(weights)
