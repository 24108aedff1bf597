"""Orders of hidden neurons: exact, balanced, and better than none where neurons fire together."""

import numpy as np
import pytest
from tiny import TINY_CONFIG, tiny_detector

from detr_jax import kernels
from detr_jax.model import FFNWeights
from detr_jax.model.parameters import fingerprint
from detr_jax.sparsity.grouping import firing_groups
from detr_jax.sparsity.ordering import cofiring_order, kmeans_order, permute, reorder

D, F, SIZE = 16, 64, 8


def clustered_ffn(seed=0) -> tuple[FFNWeights, np.ndarray, np.ndarray]:
    """An FFN whose neurons come in families with almost equal input weights, and their families, shuffled."""
    rng = np.random.default_rng(seed)
    families = rng.permutation(np.repeat(np.arange(F // SIZE), SIZE))
    directions = rng.standard_normal((F // SIZE, D))
    w_in = directions[families] + 0.02 * rng.standard_normal((F, D))
    others = (np.full(F, -2.0), rng.standard_normal((F, D)) / F, rng.standard_normal(D))
    weights = FFNWeights(*(np.asarray(a, np.float32) for a in (w_in, *others)))
    return weights, families, rng.standard_normal((500, D)).astype(np.float32)


def orders(weights: FFNWeights, x: np.ndarray) -> dict[str, np.ndarray]:
    fires = (np.asarray(kernels.hidden_activations(x, weights.w_in, weights.b_in)) > 0).astype(np.int64)
    return {"cofiring": cofiring_order(fires.T @ fires, SIZE), "kmeans": kmeans_order(weights.w_in, SIZE)}


@pytest.mark.parametrize("method", ["cofiring", "kmeans"])
def test_an_order_finds_the_families_and_keeps_the_function(method):
    weights, families, x = clustered_ffn()
    order = orders(weights, x)[method]
    groups = families[order].reshape(-1, SIZE)
    assert (groups == groups[:, :1]).all()
    permuted = permute(weights, order)
    np.testing.assert_allclose(kernels.ffn(x, *permuted), kernels.ffn(x, *weights), rtol=1e-6, atol=1e-6)
    given, ordered = (
        firing_groups(kernels.hidden_activations(x, w.w_in, w.b_in), F // SIZE).mean() for w in (weights, permuted)
    )
    assert ordered < given / 2


@pytest.mark.parametrize("size", [1, 4, 64])
def test_orders_name_every_neuron_once(size):
    rng = np.random.default_rng(1)
    fires = (rng.random((200, F)) < rng.uniform(0, 0.3, F)).astype(np.int64)
    fires[:, :10] = 0  # neurons that never fire
    order = cofiring_order(fires.T @ fires, size)
    np.testing.assert_array_equal(np.sort(order), np.arange(F))
    if size == 1:
        assert (np.diff(fires.sum(0)[order]) <= 0).all()
    np.testing.assert_array_equal(np.sort(kmeans_order(rng.standard_normal((F, D)), size)), np.arange(F))


def test_a_detector_in_another_order_detects_the_same():
    model = tiny_detector()
    before = fingerprint(model)
    rng = np.random.default_rng(0)
    orders = {name: rng.permutation(TINY_CONFIG.ffn_features) for name in TINY_CONFIG.ffn_names}
    images = rng.standard_normal((1, 32, 40, 3)).astype(np.float32)
    moved = reorder(model, orders)
    own, other = (m(images, trace=True) for m in (model, moved))
    np.testing.assert_allclose(other.logits, own.logits, rtol=1e-5, atol=1e-5)
    for name, order in orders.items():
        hidden = np.asarray(own.traces[name].hidden)[..., order]
        np.testing.assert_allclose(other.traces[name].hidden, hidden, rtol=1e-4, atol=1e-5)
    assert fingerprint(model) == before != fingerprint(moved)


def test_bad_orders_and_group_sizes_are_refused():
    weights, _, _ = clustered_ffn()
    for order in (np.arange(F - 1), np.zeros(F, int)):
        with pytest.raises(ValueError, match="64 hidden neurons names each of them once"):
            permute(weights, order)
    with pytest.raises(ValueError, match="cannot be divided into groups of 7"):
        cofiring_order(np.eye(F), 7)
    with pytest.raises(ValueError, match="cannot be divided into groups of 7"):
        kmeans_order(weights.w_in, 7)
