"""Orders of hidden neurons: exact, balanced, and better than none where neurons fire together."""

import numpy as np
import pytest
from tiny import TINY_CONFIG, tiny_detector
from top_p import TopPStatistics, top_p_permutation

from detr_jax import kernels
from detr_jax.calibration.permutation import coactivation_permutation, kmeans_permutation
from detr_jax.methods.grouping import active_groups
from detr_jax.models import FFNWeights
from detr_jax.models.ffn import permute
from detr_jax.models.parameters import fingerprint

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
    return {
        "cofiring": coactivation_permutation(fires.T @ fires, SIZE),
        "kmeans": kmeans_permutation(weights.w_in, SIZE),
    }


@pytest.mark.parametrize("method", ["cofiring", "kmeans"])
def test_an_order_finds_the_families_and_keeps_the_function(method):
    weights, families, x = clustered_ffn()
    order = orders(weights, x)[method]
    groups = families[order].reshape(-1, SIZE)
    assert (groups == groups[:, :1]).all()
    permuted = permute(weights, order)
    np.testing.assert_allclose(kernels.ffn(x, *permuted), kernels.ffn(x, *weights), rtol=1e-6, atol=1e-6)
    given, ordered = (
        active_groups(kernels.hidden_activations(x, w.w_in, w.b_in), F // SIZE).mean() for w in (weights, permuted)
    )
    assert ordered < given / 2


@pytest.mark.parametrize("size", [1, 4, 64])
def test_orders_name_every_neuron_once(size):
    rng = np.random.default_rng(1)
    fires = (rng.random((200, F)) < rng.uniform(0, 0.3, F)).astype(np.int64)
    fires[:, :10] = 0  # neurons that never fire
    order = coactivation_permutation(fires.T @ fires, size)
    np.testing.assert_array_equal(np.sort(order), np.arange(F))
    if size == 1:
        assert (np.diff(fires.sum(0)[order]) <= 0).all()
    np.testing.assert_array_equal(np.sort(kmeans_permutation(rng.standard_normal((F, D)), size)), np.arange(F))


def test_a_detector_in_another_order_detects_the_same():
    model = tiny_detector()
    before = fingerprint(model)
    rng = np.random.default_rng(0)
    orders = {name: rng.permutation(TINY_CONFIG.encoder_ffn_dim) for name in TINY_CONFIG.ffn_names}
    images = rng.standard_normal((1, 32, 40, 3)).astype(np.float32)
    moved = model.with_permutations(orders)
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
        coactivation_permutation(np.eye(F), 7)
    with pytest.raises(ValueError, match="cannot be divided into groups of 7"):
        kmeans_permutation(weights.w_in, 7)


def need_of(needs: np.ndarray, contributed: np.ndarray) -> TopPStatistics:
    """Of (tiles, F) what tiles need and (F,) what neurons contribute."""
    needs = needs.astype(np.int64)
    return TopPStatistics(np.int64(len(needs)), needs.T @ needs, contributed)


def families_of_need(seed: int = 0) -> tuple[TopPStatistics, np.ndarray]:
    """Neurons that all tiles need (family 0), that one of four kinds needs (1 to 4), and that none does (5)."""
    rng = np.random.default_rng(seed)
    families = rng.permutation(np.repeat(np.arange(6), [10, 10, 10, 10, 8, 16]))
    kinds = rng.integers(1, 5, 300)
    needs = (families == 0) | (families == kinds[:, None])
    needs &= rng.random(needs.shape) < np.where(families == 0, 1, 0.9)
    return need_of(needs, np.where(families == 5, 1e-6, rng.uniform(1, 2, F))), families


def test_an_order_by_need_has_sections_of_whole_blocks():
    statistics, families = families_of_need()
    found = top_p_permutation(statistics, SIZE)
    assert (found.always, found.gated, found.never) == (8, 40, 16)
    always, gated, never = np.split(families[found.order], [8, 48])
    assert (always == 0).all() and (never == 5).all()
    # Of 10, two of each family are left over after a whole block.
    assert sum(len(np.unique(block)) > 1 for block in gated.reshape(-1, SIZE)) <= 2
    np.testing.assert_array_equal(np.sort(found.order), np.arange(F))


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_the_sections_are_those_that_were_asked_for(size):
    statistics, _ = families_of_need()
    for always, negligible in ((0.5, 0.0), (1.0, 0.2), (0.0, 1.0)):
        found = top_p_permutation(statistics, size, always=always, negligible=negligible)
        assert found.always + found.gated + found.never == F
        assert found.always % size == found.gated % size == found.never % size == 0
        dropped = statistics.contributed[found.order[F - found.never :]].sum()
        assert dropped <= negligible * statistics.contributed.sum() * (1 + 1e-9)
        frequent = np.diag(statistics.coneeded)[found.order[: found.always]]
        assert (frequent >= always * statistics.tiles).all()
        np.testing.assert_array_equal(np.sort(found.order), np.arange(F))


def test_where_nothing_tells_neurons_apart_the_one_that_contributes_more_comes_first():
    contributed = np.random.default_rng(0).random(F) + 1
    statistics = need_of(np.repeat(np.arange(10)[:, None] < 5, F, axis=1), contributed)
    np.testing.assert_array_equal(top_p_permutation(statistics, SIZE).order, np.argsort(-contributed))


def test_an_ffn_that_is_silent_needs_nothing():
    found = top_p_permutation(need_of(np.zeros((5, F), bool), np.zeros(F)), SIZE)
    assert (found.always, found.gated, found.never) == (0, 0, F)


def test_bad_sizes_and_shares_of_need_are_refused():
    statistics, _ = families_of_need()
    with pytest.raises(ValueError, match="cannot be divided into groups of 7"):
        top_p_permutation(statistics, 7)
    with pytest.raises(ValueError, match="always must be a share from 0 to 1, not 2"):
        top_p_permutation(statistics, SIZE, always=2)
    with pytest.raises(ValueError, match="negligible must be a share from 0 to 1, not -1"):
        top_p_permutation(statistics, SIZE, negligible=-1)
