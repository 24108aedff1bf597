"""The reference FFN against plain loops."""

import numpy as np
import pytest

from detr_jax import kernels


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
