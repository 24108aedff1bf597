"""The methods by name, on an FFN given as arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_ffn

from detr_jax.calibration.activations import measure
from detr_jax.calibration.moment_passes import measure_pooled
from detr_jax.calibration.moments import moments_of
from detr_jax.calibration.thresholds import score_histogram
from detr_jax.data.batches import CachedBatches
from detr_jax.methods import ContributionGate, LinearGate, LowRankGate, PooledGate
from detr_jax.methods.registry import METHODS, Ingredients
from detr_jax.models.ffn import trace
from detr_jax.models.standalone import FFNInputs, StandaloneFFNs

SIZE = 4


@pytest.fixture(scope="module")
def ffn():
    return tiny_ffn(features=64, d_model=24)


@pytest.fixture(scope="module")
def ingredients(ffn):
    weights, x, tokens = ffn
    d, groups = weights.w_in.shape[1], weights.w_in.shape[0] // SIZE
    keys = jax.random.split(jax.random.key(0), 6)
    linear = [LinearGate(jax.random.normal(k, (d, groups)), jnp.zeros(groups)) for k in keys[:3]]
    low_rank = LowRankGate(
        jax.random.normal(keys[3], (d, 3)), jax.random.normal(keys[4], (3, groups)), jnp.zeros(groups)
    )
    gates = dict(zip(("firing", "contribution", "norm"), linear, strict=True)) | {"balanced": low_rank}
    gates["features"] = PooledGate(keys_of(d, 3), jnp.zeros(3), keys_of(3, groups), jnp.zeros(groups))
    gates["contributions"] = ContributionGate(keys_of(d, 3), keys_of(3, groups), jnp.zeros(groups))
    kinds = jnp.zeros(tokens.shape, int)
    statistics = measure(weights, trace(weights, x, tokens), kinds, kinds_count=1, group_size=SIZE)
    moments = (moments_of(values, tokens) for values in (x, trace(weights, x, tokens).hidden))
    passes = CachedBatches([FFNInputs({"f": x}, {"f": tokens})])
    pooled = measure_pooled(StandaloneFFNs({"f": weights}), passes, None)["f"]
    return Ingredients(weights, jax.tree.map(np.asarray, statistics), *moments, pooled, gates, SIZE)


def keys_of(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape) + shape[0]), shape)


@pytest.mark.parametrize("name", METHODS)
def test_it_keeps_about_the_density_it_is_given(ffn, ingredients, name):
    weights, x, tokens = ffn
    what = trace(weights, x, tokens)
    histogram = jax.device_get(score_histogram(METHODS[name].score(ingredients), weights, what))
    fires = float((np.asarray(what.hidden) > 0)[np.asarray(tokens)].mean())
    selectors = METHODS[name].at_densities(ingredients, histogram, (1.0, 0.5, 0.25, 0.125))
    assert len({jax.tree.structure(selector) for selector in selectors}) == 1  # one program serves them all
    shares = []
    for selector, density in zip(selectors, (1.0, 0.5, 0.25, 0.125), strict=True):
        selection = selector(weights, x, tokens)
        active = selection.per_token(tokens.shape, len(weights.w_in))
        kept = active if selection.channels is None else selection.channels
        shares.append(float(np.asarray(kept)[np.asarray(tokens)].mean()))
        assert shares[-1] <= density + 1e-6
        expected = min(density, fires) if selector.traits.granularity == "neuron" and density < 1 else density
        assert shares[-1] >= 0.6 * expected
    assert shares == sorted(shares, reverse=True) and shares[0] == 1
