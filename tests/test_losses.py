import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detr_jax.models import DetrOutputs, FFNTrace, Selection
from detr_jax.models.detr.matching import Targets
from detr_jax.training.detector.dense_head import token_centres
from detr_jax.training.detector.losses import dense_loss as dense_loss_of_tokens
from detr_jax.training.detector.losses import detection_loss as eager_detection_loss
from detr_jax.training.detector.losses import hoyer_penalty

detection_loss = jax.jit(eager_detection_loss, static_argnames="sigmoid")

CLASSES = 3
NO_OBJECT = CLASSES
LEFT, RIGHT = (0.25, 0.5, 0.5, 1.0), (0.75, 0.5, 0.5, 1.0)


def logits_for(labels, confidence=30.0):
    return confidence * jax.nn.one_hot(jnp.array(labels), CLASSES + 1)


def targets(labels, boxes, valid):
    return Targets(jnp.array([labels]), jnp.array([boxes], jnp.float32), jnp.array([valid]))


NOTHING = targets([0], [LEFT], [False])


def dense_loss(logits, boxes, target, **options):
    """Of (batch, rows, columns, ...), one grid of tokens."""
    centres = token_centres([logits.shape[1:3]])
    tokens = (array.reshape(len(array), -1, array.shape[-1]) for array in (logits, boxes))
    return dense_loss_of_tokens(*tokens, centres, target, **options)


def test_perfect_detections_have_no_loss():
    outputs = DetrOutputs(logits_for([[2, NO_OBJECT, 0]]), jnp.array([[RIGHT, (0.5, 0.5, 0.1, 0.1), LEFT]]))
    assert detection_loss(outputs, targets([0, 2], [LEFT, RIGHT], [True, True])) == pytest.approx(0, abs=1e-5)


def test_box_part_by_hand():
    # The left half for the right one: L1 0.5, and they touch, so the generalised IoU is 0.
    outputs = DetrOutputs(logits_for([[1, NO_OBJECT]]), jnp.array([[LEFT, (0.0, 0.0, 0.0, 0.0)]]))
    loss = detection_loss(outputs, targets([1], [RIGHT], [True]))
    assert loss == pytest.approx(5 * 0.5 + 2 * (1 - 0), abs=1e-5)


def test_class_part_by_hand():
    # Uniform logits cost log(classes + 1) at every query whatever the weights; unequal ones tell them apart.
    boxes = jnp.array([[LEFT, RIGHT]])
    target = targets([1], [LEFT], [True])
    assert detection_loss(DetrOutputs(jnp.zeros((1, 2, 4)), boxes), target) == pytest.approx(np.log(4), abs=1e-5)
    logits = jnp.stack([logits_for([1]), jnp.zeros((1, 4))], axis=1)
    expected = 0.1 * np.log(4) / (1 + 0.1)
    assert detection_loss(DetrOutputs(logits, boxes), target) == pytest.approx(expected, abs=1e-5)


def test_images_without_objects():
    logits, boxes = jnp.zeros((1, 2, 4)), jnp.array([[LEFT, RIGHT]])
    loss, gradient = jax.value_and_grad(lambda boxes: detection_loss(DetrOutputs(logits, boxes), NOTHING))(boxes)
    assert loss == pytest.approx(np.log(4), abs=1e-5)
    np.testing.assert_array_equal(gradient, 0)


def test_padding_does_not_count():
    rng = np.random.default_rng(0)
    outputs = DetrOutputs(
        jnp.asarray(rng.normal(size=(1, 4, 4)), jnp.float32), jnp.asarray(rng.uniform(size=(1, 4, 4)), jnp.float32)
    )
    alone = float(detection_loss(outputs, targets([1], [LEFT], [True])))
    padded = detection_loss(outputs, targets([1, 2, 0], [LEFT, RIGHT, LEFT], [True, False, False]))
    assert padded == pytest.approx(alone, abs=1e-6)


def test_auxiliary_outputs_are_added_with_their_own_matching():
    boxes = jnp.array([[LEFT, RIGHT]])
    good, swapped = logits_for([[0, 2]]), logits_for([[2, 0]])
    target = targets([0, 2], [LEFT, RIGHT], [True, True])
    uniform = (jnp.zeros((1, 2, 4)), boxes)
    outputs = DetrOutputs(good, boxes, auxiliary=(uniform, (swapped, boxes[:, ::-1])))
    assert detection_loss(outputs, target) == pytest.approx(np.log(4), abs=1e-5)
    assert detection_loss(DetrOutputs(*uniform, auxiliary=(uniform,)), target) == pytest.approx(2 * np.log(4), abs=1e-5)


def test_dense_loss_asks_for_the_smallest_object_over_each_token():
    small = (0.125, 0.25, 0.25, 0.5)  # over the token in row 0, column 0 of a 2 by 4 grid only
    labels = [[[1, 0, NO_OBJECT, NO_OBJECT], [0, 0, NO_OBJECT, NO_OBJECT]]]
    boxes = jnp.array([[[small, LEFT, RIGHT, RIGHT], [LEFT, LEFT, RIGHT, RIGHT]]])
    target = targets([0, 1, 2], [LEFT, small, RIGHT], [True, True, False])
    assert dense_loss(logits_for(labels), boxes, target) == pytest.approx(0, abs=1e-5)
    wrong = logits_for([[[0, 0, NO_OBJECT, NO_OBJECT], [0, 0, NO_OBJECT, NO_OBJECT]]])
    # One of the 4 covered tokens is wrong by 30; the 4 others weigh a tenth.
    assert dense_loss(wrong, boxes, target) == pytest.approx(30 / 4.4, rel=1e-4)


def test_dense_loss_of_boxes_is_over_covered_tokens_only():
    boxes = jnp.broadcast_to(jnp.array(LEFT), (1, 1, 2, 4))
    labels = logits_for([[[0, NO_OBJECT]]])
    assert dense_loss(labels, boxes, targets([0], [LEFT], [True])) == pytest.approx(0, abs=1e-5)
    assert dense_loss(logits_for([[[NO_OBJECT, NO_OBJECT]]]), boxes, NOTHING) == pytest.approx(0, abs=1e-5)


def test_sigmoids_have_the_focal_loss():
    """At even odds each of the 3 x 2 classes loses log(2) / 4, an absent class weighs 3/4, the present one 1/4."""
    boxes, target = jnp.array([[LEFT, RIGHT]]), targets([1], [LEFT], [True])
    even = DetrOutputs(jnp.zeros((1, 2, CLASSES)), boxes)
    assert detection_loss(even, target, sigmoid=True) == pytest.approx(2 * np.log(2) / 4 * (5 * 3 + 1) / 4, rel=1e-5)
    sure = DetrOutputs(30 * jax.nn.one_hot(jnp.array([[1, CLASSES]]), CLASSES) - 15, boxes)
    assert detection_loss(sure, target, sigmoid=True) == pytest.approx(0, abs=1e-5)
    assert detection_loss(sure, NOTHING, sigmoid=True) == pytest.approx(2 * 0.75 * 15, rel=1e-3)
    labels = 30 * jax.nn.one_hot(jnp.array([[[0, CLASSES]]]), CLASSES) - 15
    dense = dense_loss(
        labels, jnp.broadcast_to(jnp.array(LEFT), (1, 1, 2, 4)), targets([0], [LEFT], [True]), sigmoid=True
    )
    assert dense == pytest.approx(0, abs=1e-5)


def test_tokens_of_several_grids_are_asked_alike():
    target = targets([0, 1], [LEFT, RIGHT], [True, True])
    centres = token_centres([(2, 2), (1, 1)])
    np.testing.assert_allclose(centres[jnp.array([0, 3, 4])], [(0.25, 0.25), (0.75, 0.75), (0.5, 0.5)])
    boxes = jnp.array([[LEFT, RIGHT, LEFT, RIGHT, LEFT]])
    right = logits_for([[0, 1, 0, 1, NO_OBJECT]])  # the last token's centre is on an edge of both
    assert dense_loss_of_tokens(right, boxes, centres, target) == pytest.approx(0, abs=1e-5)


def trace(hidden, tokens=None):
    hidden = jnp.asarray(hidden, jnp.float32)
    tokens = jnp.ones(hidden.shape[:2], bool) if tokens is None else jnp.array(tokens)
    return FFNTrace(hidden, hidden, tokens, Selection())


def test_hoyer_square_extremes():
    features = 8
    assert hoyer_penalty({"a": trace(np.ones((2, 3, features)))}) == pytest.approx(1, rel=1e-5)
    one = np.zeros((2, 3, features))
    one[..., 5] = 4
    assert hoyer_penalty({"a": trace(one)}) == pytest.approx(1 / features, rel=1e-5)
    assert hoyer_penalty({"a": trace(100 * one)}) == pytest.approx(1 / features, rel=1e-5)
    assert hoyer_penalty({"a": trace(np.zeros((2, 3, features)))}) == 0


def test_hoyer_square_is_averaged_over_tokens_then_ffns():
    dense, sparse = np.ones((1, 1, 4)), np.eye(4)[None, :1]
    mixed = trace(np.concatenate([dense, sparse, sparse], axis=1), [[True, True, False]])
    expected = ((1 + 1 / 4) / 2 + 1) / 2
    assert hoyer_penalty({"encoder.0": mixed, "decoder.0": trace(dense)}) == pytest.approx(expected, rel=1e-5)


def test_hoyer_gradient_is_finite_where_nothing_fires():
    gradient = jax.grad(lambda hidden: hoyer_penalty({"a": trace(hidden)}))(jnp.zeros((1, 2, 4)))
    assert np.isfinite(gradient).all()
