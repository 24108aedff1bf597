import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detr_jax.models.boxes import generalised_iou
from detr_jax.models.detr.matching import Targets, focal_cost, match

QUERIES, OBJECTS, CLASSES = 5, 4, 3


def problem(seed):
    rng = np.random.default_rng(seed)
    return (
        jax.nn.softmax(jnp.asarray(rng.normal(0, 2, (QUERIES, CLASSES + 1)), jnp.float32)),
        jnp.asarray(rng.uniform(0.1, 0.6, (QUERIES, 4)), jnp.float32),
        jnp.asarray(rng.integers(0, CLASSES, OBJECTS), jnp.int32),
        jnp.asarray(rng.uniform(0.1, 0.6, (OBJECTS, 4)), jnp.float32),
    )


def cheapest(probabilities, boxes, labels, target_boxes, count):
    """Queries of the first `count` objects by trying all assignments, with DETR's costs."""
    probability = np.asarray(probabilities)[:, labels]
    distance = np.abs(np.asarray(boxes)[:, None] - np.asarray(target_boxes)[None]).sum(-1)
    cost = 5 * distance - probability - 2 * np.asarray(generalised_iou(boxes[:, None], target_boxes[None]))
    assignments = itertools.permutations(range(QUERIES), count)
    return min(assignments, key=lambda queries: sum(cost[q, o] for o, q in enumerate(queries)))


@pytest.mark.parametrize("count", range(OBJECTS + 1))
def test_against_all_assignments(count):
    valid = jnp.arange(OBJECTS) < count
    matched = jax.jit(match)
    for seed in range(10):
        probabilities, boxes, labels, target_boxes = problem(seed)
        queries = matched(probabilities, boxes, Targets(labels, target_boxes, valid)).tolist()
        assert tuple(queries[:count]) == cheapest(probabilities, boxes, labels, target_boxes, count)
        assert len(set(queries)) == OBJECTS


def test_focal_costs_prefer_the_likeliest_query():
    """0.25 (1 - p)^2 (-log p) - 0.75 p^2 (-log(1 - p)), twice, by hand; it falls as the probability rises."""
    assert focal_cost(jnp.float32(0.5)) == pytest.approx(2 * (0.25 - 0.75) * 0.25 * np.log(2), rel=1e-5)
    costs = focal_cost(jnp.linspace(0, 1, 11))
    assert np.isfinite(costs).all() and (np.diff(costs) < 0).all()
    boxes, targets = jnp.full((3, 4), 0.5), Targets(jnp.array([1]), jnp.full((1, 4), 0.5), jnp.array([True]))
    probabilities = jnp.array([[0.9, 0.2], [0.1, 0.7], [0.9, 0.6]])
    assert match(probabilities, boxes, targets, class_cost=focal_cost).tolist() == [1]


def test_padding_does_not_matter():
    probabilities, boxes, labels, target_boxes = problem(0)
    valid = jnp.array([True, False, True, False])
    other_labels = jnp.where(valid, labels, 0)
    other_boxes = jnp.where(valid[:, None], target_boxes, 0.5)
    first = match(probabilities, boxes, Targets(labels, target_boxes, valid))
    second = match(probabilities, boxes, Targets(other_labels, other_boxes, valid))
    np.testing.assert_array_equal(first[valid], second[valid])


def test_as_many_objects_as_queries():
    probabilities, boxes, _, _ = problem(1)
    order = jnp.array([3, 0, 4, 1, 2])
    targets = Targets(jnp.zeros(QUERIES, jnp.int32), boxes[order], jnp.ones(QUERIES, bool))
    queries = match(probabilities, boxes, targets)
    np.testing.assert_array_equal(queries, order)


def test_more_objects_than_queries():
    probabilities, boxes, labels, target_boxes = problem(0)
    with pytest.raises(ValueError, match="3 queries cannot be matched to 4 objects"):
        match(probabilities[:3], boxes[:3], Targets(labels, target_boxes, jnp.ones(OBJECTS, bool)))
