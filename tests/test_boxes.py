import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detr_jax.models.boxes import corners, generalised_iou


def test_corners():
    boxes = jnp.array([[[0.5, 0.4, 0.2, 0.6]], [[0.0, 1.0, 1.0, 0.0]]])
    np.testing.assert_allclose(corners(boxes), [[[0.4, 0.1, 0.6, 0.7]], [[-0.5, 1.0, 0.5, 1.0]]], atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0.5, 0.5, 0.4, 0.2), (0.5, 0.5, 0.4, 0.2), 1.0),
        # Half overlapping: 1 of 3 parts, nothing empty in the enclosing box.
        ((0.2, 0.5, 0.4, 0.4), (0.4, 0.5, 0.4, 0.4), 1 / 3),
        # One inside the other.
        ((0.5, 0.5, 0.4, 0.4), (0.5, 0.5, 0.2, 0.2), 1 / 4),
        # Apart: 2 of the 4 parts of the enclosing box are empty.
        ((0.1, 0.5, 0.2, 0.2), (0.7, 0.5, 0.2, 0.2), -1 / 2),
        # Touching at a corner: 2 of 4 parts empty.
        ((0.1, 0.1, 0.2, 0.2), (0.3, 0.3, 0.2, 0.2), -1 / 2),
    ],
)
def test_generalised_iou(a, b, expected):
    a, b = jnp.array(a), jnp.array(b)
    assert generalised_iou(a, b) == pytest.approx(expected, abs=1e-6)
    assert generalised_iou(b, a) == pytest.approx(expected, abs=1e-6)


def test_generalised_iou_broadcasts():
    boxes = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (3, 4)), jnp.float32)
    table = generalised_iou(boxes[:, None], boxes[None])
    assert table.shape == (3, 3)
    assert table[1, 2] == generalised_iou(boxes[1], boxes[2])
    assert (np.abs(table) <= 1 + 1e-6).all()


def test_predicted_boxes_without_extent_have_finite_values_and_gradients():
    flat, target = jnp.array([0.5, 0.5, 0.2, 0.0]), jnp.array([0.5, 0.5, 0.2, 0.2])
    value, gradient = jax.value_and_grad(generalised_iou)(flat, target)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
