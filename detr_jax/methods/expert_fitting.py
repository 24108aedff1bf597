"""Closed-form fit of narrow experts to a sample of an FFN's inputs; see `detr_jax.methods.experts`.

Per FFN: tokens are split by a linear router, which starts as k-means. Expert c keeps neuron j while leaving it out
costs more than one price for all FFNs; its output layer is a ridge regression of y = h W_out on the neurons it keeps,
over its own tokens. Then the router is trained to the lowest sum of error and price, tokens are split again, and so on.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detr_jax.methods.reconstruction import eliminate
from detr_jax.models import FFNWeights

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
    ffns: Mapping[str, tuple[FFNWeights, np.ndarray]],
    density: float,
    method: "Experts",
    importance: Callable[[dict[str, FittedExperts], dict[str, float]], Mapping[str, float]] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, FittedExperts]:
    """Experts of some FFNs that together compute a share of the hidden neurons.

    Args:
        ffns: by name, the FFN and (tokens, d) inputs.
        density: mean over FFNs of the share of neurons that a token gets.
        method: options.
        importance: weights of the FFNs' errors, from first experts and the share of each output's variance that they
            miss; None weighs all alike.
        progress: called after each FFN and round.
    """
    layers = {name: _Layer(*ffn, method) for name, ffn in ffns.items()}
    weights = dict.fromkeys(layers, 1.0)
    for turn in range(method.rounds + 1):
        price = _fit_to(layers, density, weights, method)
        if turn == 0 and importance is not None:
            fitted = {name: layer.fitted() for name, layer in layers.items()}
            weights = dict(importance(fitted, {name: layer.missed() for name, layer in layers.items()}))
            price = _fit_to(layers, density, weights, method)
        for name, layer in layers.items():
            if turn < method.rounds:
                layer.train_router(price / weights[name], turn)
            progress()
    return {name: layer.fitted() for name, layer in layers.items()}


def _fit_to(layers: Mapping[str, "_Layer"], density: float, weights: Mapping[str, float], method: "Experts") -> float:
    """Chooses neurons at one price for all FFNs, fits the output layers, and returns the price."""
    for layer in layers.values():
        layer.rank_by_energy()

    def price_of() -> float:
        if density >= 1:
            return 0.0
        low, high = 1e-12, 1e3
        for _ in range(60):
            middle = np.sqrt(low * high)
            found = np.mean([layer.density(middle / weights[name]) for name, layer in layers.items()])
            low, high = (middle, high) if found > density else (low, middle)
        return float(high)

    price = price_of()
    if method.ranking == "obs":
        for name, layer in layers.items():
            layer.rank_by_elimination(price / weights[name])
        price = price_of()
    for name, layer in layers.items():
        layer.reconstruct(price / weights[name])
    return price


class _Layer:
    """The experts of one FFN while they are fitted; errors are shares of the variance of its output."""

    def __init__(self, weights: FFNWeights, inputs: np.ndarray, method: "Experts"):
        self._w_in, self._b_in, self._w_out, self._b_out = (np.asarray(array, np.float32) for array in weights)
        self._x, self._method = np.asarray(inputs, np.float32), method
        self._y = np.concatenate([self._hidden(part) @ self._w_out for part in _chunks(self._x)])
        self._variance = max(float(self._y.var(0, dtype=np.float64).sum()), np.finfo(np.float32).tiny)
        self._covariance = self._covariance_of_all()
        self._count = min(method.experts, len(self._x))
        centres = np.asarray(_kmeans(self._x, _start(self._x, self._count, method.seed)))
        kernel, bias = 2 * centres.T, -(centres**2).sum(1)
        # Neither a flat nor a hard softmax to start from.
        scores = np.sort(self._x[:4096] @ kernel + bias, axis=-1)
        gap = np.median(scores[:, -1] - scores[:, -2]) if self._count > 1 else 1.0
        self._kernel, self._bias = kernel / max(gap, 1e-6), bias / max(gap, 1e-6)
        self._assign()

    def _hidden(self, x: np.ndarray, neurons: np.ndarray | slice = slice(None)) -> np.ndarray:
        return np.maximum(x @ self._w_in[neurons].T + self._b_in[neurons], 0)

    def _covariance_of_all(self) -> np.ndarray:
        """(F, F) of the hidden activations of all tokens, towards which those of few tokens are shrunk."""
        size = len(self._w_in)
        products, sums = np.zeros((size, size)), np.zeros(size)
        for part in _chunks(self._x):
            hidden = self._hidden(part)
            products += hidden.T @ hidden
            sums += hidden.sum(0, dtype=np.float64)
        mean = sums / len(self._x)
        return products / len(self._x) - np.outer(mean, mean)

    def _shrunk(self, own: np.ndarray, general: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Moments of an expert as if `prior` of its tokens were drawn from all tokens."""
        weight = self._method.prior / (self._method.prior + len(tokens))
        return (1 - weight) * own + weight * general

    def _assign(self) -> None:
        ids = (self._x @ self._kernel + self._bias).argmax(-1)
        self._tokens = [np.flatnonzero(ids == expert) for expert in range(self._count)]
        self._shares = np.array([len(tokens) for tokens in self._tokens]) / len(self._x)
        norms = (self._w_out.astype(np.float64) ** 2).sum(1) / self._variance
        self._energies = np.zeros((self._count, len(self._w_in)))
        for expert, tokens in enumerate(self._tokens):
            if len(tokens):
                variances = self._hidden(self._x[tokens]).var(0)
                self._energies[expert] = norms * self._shrunk(variances, np.diag(self._covariance), tokens)

    def rank_by_energy(self) -> None:
        """Neurons of each expert by the variance of what they add to its tokens' outputs."""
        energies = self._energies
        self._ranks = np.argsort(-energies, axis=1, kind="stable")
        self._gains = np.take_along_axis(energies, self._ranks, axis=1)
        self._equalise()

    def rank_by_elimination(self, price: float) -> None:
        """Orders those of highest energy again, by what each costs once the others make up for it."""
        for expert, (tokens, width) in enumerate(zip(self._tokens, self._widths_at(price), strict=True)):
            candidates = self._ranks[expert, : min(2 * width + 32, len(self._w_in))]
            hidden = self._hidden(self._x[tokens], candidates)
            centred = (hidden - hidden.mean(0)).astype(np.float64) if len(tokens) else np.zeros((1, len(candidates)))
            covariance = centred.T @ centred / len(centred)
            covariance = self._shrunk(covariance, self._covariance[np.ix_(candidates, candidates)], tokens)
            order, costs = eliminate(covariance, self._w_out[candidates].astype(np.float64))
            self._ranks[expert, : len(candidates)] = candidates[order]
            self._gains[expert] = 0
            self._gains[expert, : len(order)] = costs / self._variance
        self._equalise()

    def _equalise(self) -> None:
        if self._method.widths == "equal":  # what a neuron is worth is its rank
            self._gains[:] = np.arange(len(self._w_in), 0, -1) / len(self._w_in)

    def _widths_at(self, price: float) -> np.ndarray:
        """(C,) neurons of each expert that are worth the price, rounded to the nearest of `WIDTHS`."""
        wanted = (self._gains >= price).sum(1)
        above = WIDTHS[np.minimum(np.searchsorted(WIDTHS, wanted), len(WIDTHS) - 1)]
        below = WIDTHS[np.maximum(np.searchsorted(WIDTHS, wanted, side="right") - 1, 0)]
        return np.minimum(np.where(above - wanted < wanted - below, above, below), len(self._w_in))

    def density(self, price: float) -> float:
        return float(self._shares @ self._widths_at(price)) / len(self._w_in)

    def reconstruct(self, price: float) -> None:
        """Output layers of the neurons that are worth the price."""
        mean = self._y.mean(0)
        self._neurons, self._rows, self._biases = [], [], []
        for expert, (tokens, width) in enumerate(zip(self._tokens, self._widths_at(price), strict=True)):
            neurons = np.sort(self._ranks[expert, :width])
            own = self._w_out[neurons].astype(np.float64)
            if not len(tokens):  # no token of the sample; the mean is a guess for one that comes later
                neurons, own = neurons[:0], own[:0]
                hidden_mean, output_mean, rows = np.zeros(0), mean, own
            else:
                hidden, outputs = self._hidden(self._x[tokens], neurons).astype(np.float64), self._y[tokens]
                hidden_mean, output_mean = hidden.mean(0), outputs.mean(0, dtype=np.float64)
                hidden, outputs = hidden - hidden_mean, outputs - output_mean
                rows = self._regressed(own, neurons, tokens, hidden, outputs)
            self._neurons.append(neurons)
            self._rows.append(rows.astype(np.float32))
            self._biases.append((output_mean - hidden_mean @ rows + self._b_out).astype(np.float32))

    def _regressed(
        self, own: np.ndarray, neurons: np.ndarray, tokens: np.ndarray, hidden: np.ndarray, outputs: np.ndarray
    ) -> np.ndarray:
        """Rows that predict `outputs` from `hidden`, both centred, with a ridge towards the frozen ones."""
        if not len(own):
            return own
        covariance, cross = (hidden.T @ others / len(hidden) for others in (hidden, outputs))
        general = self._covariance[neurons]
        covariance = self._shrunk(covariance, general[:, neurons], tokens)
        missing = self._shrunk(cross, general @ self._w_out, tokens) - covariance @ own
        strength = self._method.ridge * (1 + _FEW_TOKENS * len(own) / len(tokens))
        ridge = max(strength * np.trace(covariance) / len(own), 1e-12)
        return own + np.linalg.solve(covariance + ridge * np.eye(len(own)), missing)

    def _errors(self, expert: int, tokens: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Squared error of each token's output with an expert."""
        parts = zip(_chunks(self._x[tokens]), _chunks(self._y[tokens]), strict=True)
        bias = self._biases[expert] - self._b_out
        missed = [self._hidden(x, self._neurons[expert]) @ self._rows[expert] + bias - y for x, y in parts]
        return np.concatenate([np.einsum("td,td->t", part, part) for part in missed]) / self._variance

    def missed(self) -> float:
        """Share of the output's variance that the experts miss."""
        errors = (self._errors(expert, tokens).sum() for expert, tokens in enumerate(self._tokens) if len(tokens))
        return float(sum(errors)) / len(self._x)

    def train_router(self, price: float, turn: int) -> None:
        """Trains the router to the lowest expected sum of error and price, and splits the tokens by it."""
        experts = range(self._count)
        prices = np.stack([self._errors(expert) + price * len(self._neurons[expert]) for expert in experts], axis=1)
        mean, deviation = self._x.mean(0), self._x.std(0) + 1e-6
        start = (self._kernel * deviation[:, None], self._bias + mean @ self._kernel)
        inputs = ((self._x - mean) / deviation, prices - prices.min(1, keepdims=True))
        key = jax.random.key(self._method.seed + turn)
        start, inputs = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), (start, inputs))
        kernel, bias = jax.device_get(_train(start, *inputs, key, steps=self._method.router_steps))
        self._kernel = kernel / deviation[:, None]
        self._bias = bias - mean @ self._kernel
        self._assign()

    def fitted(self) -> FittedExperts:
        router = (np.asarray(self._kernel, np.float32), np.asarray(self._bias, np.float32))
        return FittedExperts(*router, self._neurons, self._rows, np.stack(self._biases))


def _chunks(array: np.ndarray) -> list[np.ndarray]:
    return [array[i : i + _CHUNK] for i in range(0, len(array), _CHUNK)]


def _start(x: np.ndarray, count: int, seed: int) -> np.ndarray:
    return x[np.random.default_rng(seed).choice(len(x), count, replace=False)]


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
