"""Closed-form fit of narrow experts to a sample of an FFN's inputs; see `detr_jax.methods.experts`.

Per FFN: tokens are split by a linear router, which starts as k-means. Expert c keeps neuron j while leaving it out
costs more than one price for all FFNs; its output layer is a ridge regression of y = h W_out on the neurons it keeps,
over its own tokens. Then the router is trained to the lowest sum of error and price, tokens are split again, and so on.
Costs and errors count by the sensitivity of the detector's outputs.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detr_jax.methods.base import FitMaterial
from detr_jax.methods.reconstruction import eliminate
from detr_jax.safetensors_io import Arrays, Part

if TYPE_CHECKING:
    from detr_jax.methods.experts import Experts

WIDTHS = np.array(
    [*range(0, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, 8193, 128)]
)
"""Widths that experts may have: few enough that many experts share one, so that they can be computed as a stack."""
_CHUNK = 16384
_FEW_TOKENS = 100
"""How much the ridge grows with the number of neurons for each token."""
_KMEANS_STEPS = 30
_CELLS = 256
_LEAST_IMPORTANCE = 0.02
"""Of a token, and of a direction, as shares of the mean: what never mattered in the sample may matter later."""
_LEAST_METRIC = 0.05
_TINY = float(np.finfo(np.float32).tiny)


class FittedExperts(NamedTuple):
    """Narrow experts of one FFN; lists have one entry per expert.

    Attributes:
        kernel, bias: (d, C) and (C,), the router.
        neurons: (k,) int, ascending.
        w_out: (k, d).
        b_out: (C, d).
    """

    kernel: np.ndarray
    bias: np.ndarray
    neurons: list[np.ndarray]
    w_out: list[np.ndarray]
    b_out: np.ndarray


def fit_experts(
    material: Mapping[str, FitMaterial],
    density: float,
    method: "Experts",
    importance: Callable[[dict[str, FittedExperts], dict[str, float]], Arrays] | None = None,
    part: Part = lambda name, compute: compute(),
) -> dict[str, FittedExperts]:
    """Experts of some FFNs that together compute a share of the hidden neurons.

    Args:
        material: of each FFN by name.
        density: mean over FFNs of the share of neurons that a token gets.
        method: options.
        importance: weights () of the FFNs' errors, from first experts and the share of each output's variance that they
            miss; None weighs all alike.
        part: see `Method.at_mean_density`.
    """
    layers = {name: _Layer(of, method) for name, of in material.items()}
    weights = dict.fromkeys(layers, 1.0)

    def each(title: str, step: Callable[[_Layer, float], Arrays], price: float = 0.0) -> None:
        for name, layer in layers.items():
            layer.take(part(f"{title}-{name}", partial(step, layer, price / weights[name])))

    def price_of() -> float:
        if density >= 1:
            return 0.0
        low, high = 1e-12, 1e3
        for _ in range(60):
            middle = np.sqrt(low * high)
            found = np.mean([layer.density(middle / weights[name]) for name, layer in layers.items()])
            low, high = (middle, high) if found > density else (low, middle)
        return float(high)

    def fit(turn: str) -> float:
        """Chooses neurons at one price for all FFNs, fits the output layers, and returns the price."""
        for layer in layers.values():
            layer.take(layer.ranked_by_energy())
        price = price_of()
        if method.ranking == "obs":
            each(f"{turn}-order", _Layer.ranked_by_elimination, price)
            price = price_of()
        each(f"{turn}-experts", _Layer.reconstructed, price)
        return price

    each("start", _Layer.start)
    if importance is not None:
        fit(f"{density}-first")

        def weigh() -> Arrays:
            fitted = {name: layer.fitted() for name, layer in layers.items()}
            return importance(fitted, {name: layer.missed() for name, layer in layers.items()})

        weights = {name: float(of) for name, of in part(f"{density}-weights", weigh).items()}
    for turn in range(method.rounds):
        price = fit(f"{density}-{turn}")
        each(f"{density}-{turn}-router", partial(_Layer.trained, turn=turn), price)
    fit(f"{density}-{method.rounds}")
    return {name: layer.fitted() for name, layer in layers.items()}


class _Layer:
    """The experts of one FFN while they are fitted; errors are shares of the variance of its output.

    They count by what they change in the detector's outputs: at a token by `importance`, in a direction by `_root`.

    Steps return the arrays by which they change it, see `take`; the rest follows from the inputs.
    """

    covariance: np.ndarray
    """(F, F) of the hidden activations of all tokens, towards which those of few tokens are shrunk."""
    importance: np.ndarray
    """(tokens,) how much an error counts, 1 on average."""
    kernel: np.ndarray
    bias: np.ndarray
    ids: np.ndarray
    """(tokens,) the expert of each."""
    energies: np.ndarray
    """(C, F) variance of what a neuron adds to the outputs of an expert's tokens."""
    ranks: np.ndarray
    """(C, F) neurons in the order in which an expert keeps them."""
    gains: np.ndarray
    """(C, F) worth of each of `ranks`."""
    widths: np.ndarray
    """(C,) neurons of each expert."""
    neurons: np.ndarray
    """(sum of widths,) of one expert after the other."""
    rows: np.ndarray
    """(sum of widths, d) of W_out."""
    biases: np.ndarray
    """(C, d)."""

    def __init__(self, material: FitMaterial, method: "Experts"):
        self._w_in, self._b_in, self._w_out, self._b_out = (np.asarray(of, np.float32) for of in material.weights)
        self._x, self._method = np.asarray(material.inputs, np.float32), method
        self._sensitivity = material.sensitivity
        self._count = min(method.experts, len(self._x))

    def take(self, arrays: Arrays) -> None:
        vars(self).update(arrays)

    @cached_property
    def _y(self) -> np.ndarray:
        return np.concatenate([self._hidden(part) @ self._w_out for part in _chunks(self._x)])

    @cached_property
    def _variance(self) -> float:
        centred = (self._y - np.average(self._y, axis=0, weights=self.importance)) @ self._root
        return max(float(self.importance @ (centred**2).sum(1) / len(centred)), _TINY)

    @cached_property
    def _root(self) -> np.ndarray:
        """(d, d) by which errors are multiplied; second derivatives are the root of the metric."""
        size = self._w_out.shape[1]
        if self._sensitivity is None:
            return np.eye(size)
        metric = self._sensitivity.metric.astype(np.float64)
        values, vectors = np.linalg.eigh(metric * size / max(np.trace(metric), _TINY) + _LEAST_METRIC * np.eye(size))
        return vectors * values**0.25 @ vectors.T

    def _importance(self) -> np.ndarray:
        """Weight of each token, the mean of tokens with similar inputs: each alone was measured with few draws."""
        if self._sensitivity is None:
            return np.ones(len(self._x))
        cells = min(_CELLS, len(self._x))
        kernel, bias = self._nearest(cells, self._method.seed + 1)
        ids = (self._x @ kernel + bias).argmax(-1)
        counts = np.maximum(np.bincount(ids, minlength=cells), 1)
        mean = (np.bincount(ids, self._sensitivity.tokens, minlength=cells) / counts)[ids]
        importance = np.sqrt(mean)
        importance = np.maximum(importance / max(importance.mean(), _TINY), _LEAST_IMPORTANCE)
        return importance / importance.mean()

    def _tokens_of(self, ids: np.ndarray) -> list[np.ndarray]:
        return [np.flatnonzero(ids == expert) for expert in range(self._count)]

    def start(self, _: float) -> Arrays:
        """A router by k-means."""
        self.covariance, self.importance = self._covariance_of_all(), self._importance()
        kernel, bias = self._nearest(self._count, self._method.seed)
        # Neither a flat nor a hard softmax to start from.
        scores = np.sort(self._x[:4096] @ kernel + bias, axis=-1)
        gap = np.median(scores[:, -1] - scores[:, -2]) if self._count > 1 else 1.0
        of_all = {"covariance": self.covariance, "importance": self.importance}
        return of_all | self._routed(kernel / max(gap, 1e-6), bias / max(gap, 1e-6))

    def _nearest(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(d, count) and (count,), linear scores of which the highest is that of the nearest centre by k-means."""
        mean = self._x.mean(0)
        x = self._x - mean  # what is close together, far from zero, would be lost in rounding
        centres = np.asarray(_kmeans(x, x[np.random.default_rng(seed).choice(len(x), count, replace=False)]))
        return 2 * centres.T, -(centres**2).sum(1) - mean @ (2 * centres.T)

    def _hidden(self, x: np.ndarray, neurons: np.ndarray | slice = slice(None)) -> np.ndarray:
        return np.maximum(x @ self._w_in[neurons].T + self._b_in[neurons], 0)

    def _covariance_of_all(self) -> np.ndarray:
        size = len(self._w_in)
        products, sums = np.zeros((size, size)), np.zeros(size)
        about = self._hidden(self._x[:_CHUNK]).mean(0)  # deviations far below the mean would be lost in rounding
        for part in _chunks(self._x):
            hidden = self._hidden(part) - about
            products += hidden.T @ hidden
            sums += hidden.sum(0, dtype=np.float64)
        mean = sums / len(self._x)
        return products / len(self._x) - np.outer(mean, mean)

    def _shrunk(self, own: np.ndarray, general: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Moments of an expert as if `prior` of its tokens were drawn from all tokens."""
        weight = self._method.prior / (self._method.prior + len(tokens))
        return (1 - weight) * own + weight * general

    def _routed(self, kernel: np.ndarray, bias: np.ndarray) -> Arrays:
        ids = (self._x @ kernel + bias).argmax(-1)
        norms = ((self._w_out @ self._root) ** 2).sum(1) / self._variance
        energies = np.zeros((self._count, len(self._w_in)))
        for expert, tokens in enumerate(self._tokens_of(ids)):
            if len(tokens):
                variances = self._hidden(self._x[tokens]).var(0)
                shrunk = self._shrunk(variances, np.diag(self.covariance), tokens)
                energies[expert] = norms * self.importance[tokens].mean() * shrunk
        return {"kernel": kernel, "bias": bias, "ids": ids, "energies": energies}

    def ranked_by_energy(self) -> Arrays:
        """Neurons of each expert by the variance of what they add to its tokens' outputs."""
        ranks = np.argsort(-self.energies, axis=1, kind="stable")
        return self._ranked(ranks, np.take_along_axis(self.energies, ranks, axis=1))

    def ranked_by_elimination(self, price: float) -> Arrays:
        """Orders those of highest energy again, by what each costs once the others make up for it."""
        ranks, gains = self.ranks.copy(), np.zeros_like(self.gains)
        for expert, (tokens, width) in enumerate(zip(self._tokens_of(self.ids), self._widths_at(price), strict=True)):
            candidates = ranks[expert, : min(2 * width + 32, len(self._w_in))].copy()
            hidden = self._hidden(self._x[tokens], candidates)
            centred = (hidden - hidden.mean(0)).astype(np.float64) if len(tokens) else np.zeros((1, len(candidates)))
            covariance = centred.T @ centred / len(centred)
            covariance = self._shrunk(covariance, self.covariance[np.ix_(candidates, candidates)], tokens)
            order, costs = eliminate(covariance, self._w_out[candidates] @ self._root)
            ranks[expert, : len(candidates)] = candidates[order]
            importance = self.importance[tokens].mean() if len(tokens) else 1.0
            gains[expert, : len(order)] = costs * importance / self._variance
        return self._ranked(ranks, gains)

    def _ranked(self, ranks: np.ndarray, gains: np.ndarray) -> Arrays:
        if self._method.widths == "equal":  # what a neuron is worth is its rank
            gains[:] = np.arange(len(self._w_in), 0, -1) / len(self._w_in)
        return {"ranks": ranks, "gains": gains}

    def _widths_at(self, price: float) -> np.ndarray:
        """(C,) neurons of each expert that are worth the price, rounded to the nearest of `WIDTHS`."""
        wanted = (self.gains >= price).sum(1)
        above = WIDTHS[np.minimum(np.searchsorted(WIDTHS, wanted), len(WIDTHS) - 1)]
        below = WIDTHS[np.maximum(np.searchsorted(WIDTHS, wanted, side="right") - 1, 0)]
        return np.minimum(np.where(above - wanted < wanted - below, above, below), len(self._w_in))

    def density(self, price: float) -> float:
        shares = np.bincount(self.ids, minlength=self._count) / len(self._x)
        return float(shares @ self._widths_at(price)) / len(self._w_in)

    def reconstructed(self, price: float) -> Arrays:
        """Output layers of the neurons that are worth the price."""
        mean = self._y.mean(0)
        found: dict[str, list[Any]] = {"widths": [], "neurons": [], "rows": [], "biases": []}
        for expert, (tokens, width) in enumerate(zip(self._tokens_of(self.ids), self._widths_at(price), strict=True)):
            neurons = np.sort(self.ranks[expert, :width])
            own = self._w_out[neurons].astype(np.float64)
            if not len(tokens):  # no token of the sample; the mean is a guess for one that comes later
                neurons, own = neurons[:0], own[:0]
                hidden_mean, output_mean, rows = np.zeros(0), mean, own
            else:
                hidden, outputs = self._hidden(self._x[tokens], neurons).astype(np.float64), self._y[tokens]
                hidden_mean, output_mean = hidden.mean(0), outputs.mean(0, dtype=np.float64)
                hidden, outputs = hidden - hidden_mean, outputs - output_mean
                rows = self._regressed(own, neurons, tokens, hidden, outputs)
            found["widths"].append([len(neurons)])
            found["neurons"].append(neurons)
            found["rows"].append(rows.astype(np.float32))
            found["biases"].append((output_mean - hidden_mean @ rows + self._b_out).astype(np.float32)[None])
        return {name: np.concatenate(of) for name, of in found.items()}

    def _regressed(
        self, own: np.ndarray, neurons: np.ndarray, tokens: np.ndarray, hidden: np.ndarray, outputs: np.ndarray
    ) -> np.ndarray:
        """Rows that predict `outputs` from `hidden`, both centred, with a ridge towards the frozen ones."""
        if not len(own):
            return own
        covariance, cross = (hidden.T @ others / len(hidden) for others in (hidden, outputs))
        general = self.covariance[neurons]
        covariance = self._shrunk(covariance, general[:, neurons], tokens)
        missing = self._shrunk(cross, general @ self._w_out, tokens) - covariance @ own
        strength = self._method.ridge * (1 + _FEW_TOKENS * len(own) / len(tokens))
        ridge = max(strength * np.trace(covariance) / len(own), 1e-12)
        return own + np.linalg.solve(covariance + ridge * np.eye(len(own)), missing)

    def _errors(self, expert: int, tokens: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Weighted squared error of each token's output with an expert."""
        neurons, rows = (of[expert] for of in self._by_expert())
        parts = zip(_chunks(self._x[tokens]), _chunks(self._y[tokens]), strict=True)
        bias = self.biases[expert] - self._b_out
        missed = [(self._hidden(x, neurons) @ rows + bias - y) @ self._root for x, y in parts]
        squared = np.concatenate([np.einsum("td,td->t", part, part) for part in missed])
        return self.importance[tokens] * squared / self._variance

    def missed(self) -> float:
        """Share of the output's variance that the experts miss."""
        of_each = enumerate(self._tokens_of(self.ids))
        total = sum(self._errors(expert, tokens).sum() for expert, tokens in of_each if len(tokens))
        return float(total) / len(self._x)

    def trained(self, price: float, turn: int) -> Arrays:
        """A router with the lowest expected sum of error and price, and the tokens that it gives each expert."""
        errors = np.stack([self._errors(expert) for expert in range(self._count)], axis=1)
        prices = errors + price * self.widths
        mean, deviation = self._x.mean(0), self._x.std(0) + 1e-6
        start = (self.kernel * deviation[:, None], self.bias + mean @ self.kernel)
        inputs = ((self._x - mean) / deviation, prices - prices.min(1, keepdims=True))
        key = jax.random.key(self._method.seed + turn)
        start, inputs = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), (start, inputs))
        kernel, bias = jax.device_get(_train(start, *inputs, key, steps=self._method.router_steps))
        kernel = kernel / deviation[:, None]
        return self._routed(kernel, bias - mean @ kernel)

    def _by_expert(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Neurons and output rows of each expert."""
        ends = np.cumsum(self.widths)[:-1]
        return np.split(self.neurons, ends), np.split(self.rows, ends)

    def fitted(self) -> FittedExperts:
        router = (np.asarray(self.kernel, np.float32), np.asarray(self.bias, np.float32))
        return FittedExperts(*router, *self._by_expert(), self.biases)


def _chunks(array: np.ndarray) -> list[np.ndarray]:
    return [array[i : i + _CHUNK] for i in range(0, len(array), _CHUNK)]


@jax.jit
def _kmeans(x: jax.Array, centres: jax.Array) -> jax.Array:
    """Lloyd's algorithm; a centre without points stays where it is."""

    def step(centres: jax.Array, _: None) -> tuple[jax.Array, None]:
        ids = jnp.argmax(x @ (2 * centres.T) - (centres**2).sum(1), axis=-1)
        members = jax.nn.one_hot(ids, len(centres), dtype=x.dtype)
        counts = members.sum(0)[:, None]
        return jnp.where(counts > 0, members.T @ x / jnp.maximum(counts, 1), centres), None

    return jax.lax.scan(step, centres, length=_KMEANS_STEPS)[0]


@partial(jax.jit, static_argnames="steps")
def _train(router: Any, x: jax.Array, prices: jax.Array, key: jax.Array, *, steps: int, batch: int = 2048) -> Any:
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(router: Any, rows: jax.Array) -> jax.Array:
        return (jax.nn.softmax(x[rows] @ router[0] + router[1]) * prices[rows]).sum(-1).mean()

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        router, moments = state
        updates, moments = optimiser.update(
            jax.grad(loss)(router, jax.random.randint(key, (batch,), 0, len(x))), moments
        )
        return (optax.apply_updates(router, updates), moments), None

    return jax.lax.scan(step, (router, optimiser.init(router)), jax.random.split(key, steps))[0][0]
