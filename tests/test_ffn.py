"""The reference FFN, and what selections leave of it, against plain loops."""

import numpy as np
import pytest
from tiny import every_selector, tiny_ffn

from detr_jax import kernels
from detr_jax.models import FFNWeights, LowRankFactors, Selection
from detr_jax.models.ffn import forward, trace


def arrays(tokens=5, d=6, neurons=12, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((tokens, d), (neurons, d), (neurons,), (neurons, d), (d,))
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def by_loops(x, w_in, b_in, w_out, b_out, active):
    outputs = np.tile(b_out.astype(np.float64), (len(x), 1))
    size = len(w_in) // active.shape[1]
    for t, token in enumerate(x.astype(np.float64)):
        for j in range(len(w_in)):
            if active[t, j // size]:
                outputs[t] += max(0.0, token @ w_in[j] + b_in[j]) * w_out[j]
    return outputs


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_inactive_groups_are_left_out(groups):
    x, *weights = arrays()
    active = np.random.default_rng(1).random((len(x), groups)) < 0.5
    np.testing.assert_allclose(kernels.ffn(x, *weights, active), by_loops(x, *weights, active), atol=1e-5)


def test_without_a_choice_everything_is_computed():
    x, *weights = arrays()
    everything = np.ones((len(x), 4), bool)
    np.testing.assert_allclose(kernels.ffn(x, *weights), by_loops(x, *weights, everything), atol=1e-5)


def test_groups_that_do_not_divide_the_neurons_are_refused():
    x, *weights = arrays()
    with pytest.raises(ValueError, match="12 hidden neurons cannot be divided into 5 groups"):
        kernels.ffn(x, *weights, np.ones((len(x), 5), bool))


def with_stand_ins(x, weights, selection):
    """A selection's output, neuron by neuron: exact where it is kept, through the factors where it is left out."""
    w_in, b_in, w_out, b_out = (np.asarray(array, np.float64) for array in weights)
    about_in, about_out = np.zeros_like(w_in), np.zeros_like(w_out)
    if selection.factors is not None:
        in_neurons, in_model, out_neurons, out_model = (np.asarray(f, np.float64) for f in selection.factors)
        about_in, about_out = in_neurons @ in_model, out_neurons @ out_model
    outputs = np.tile(b_out, (len(x), 1))
    for t, token in enumerate(x):
        for j in range(len(w_in)):
            if selection.active is None or selection.active[t, j * selection.active.shape[1] // len(w_in)]:
                before = b_in[j]
                for i, value in enumerate(token):
                    kept = selection.channels is None or selection.channels[t, i]
                    before += value * (w_in[j, i] if kept else about_in[j, i])
                outputs[t] += max(0.0, before) * w_out[j]
            else:
                outputs[t] += max(0.0, token @ about_in[j] + b_in[j]) * about_out[j]
    return outputs


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("groups", "channels"), [(None, True), (3, False), (12, True), (None, False)])
def test_what_a_selection_leaves_of_an_ffn(groups, channels, factored):
    x, *weights = arrays()
    rng = np.random.default_rng(2)
    selection = Selection(
        None if groups is None else rng.random((len(x), groups)) < 0.5,
        rng.random(x.shape) < 0.5 if channels else None,
        LowRankFactors(*(rng.standard_normal(s, np.float32) for s in ((12, 2), (2, 6)) * 2)) if factored else None,
    )
    expected = with_stand_ins(x, weights, selection)
    np.testing.assert_allclose(forward(FFNWeights(*weights), x, selection), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["linear gate", "input magnitude"])
def test_a_trace_holds_the_selection_and_what_the_dense_ffn_has(name):
    weights, x, tokens = tiny_ffn()
    selector = every_selector(weights, 4)[name]
    what, selection = trace(weights, x, tokens, selector), selector(weights, x, tokens)
    np.testing.assert_array_equal(what.inputs, x)
    np.testing.assert_array_equal(what.tokens, tokens)
    np.testing.assert_allclose(what.hidden, np.maximum(x @ weights.w_in.T + weights.b_in, 0), atol=1e-5)
    for kept in ("active", "channels"):
        np.testing.assert_array_equal(getattr(what.selection, kept), getattr(selection, kept))
    assert trace(weights, x, tokens).selection == Selection()
