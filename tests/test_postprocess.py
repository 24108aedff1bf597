from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.models.detr.outputs import postprocess

GOLDEN = Path(__file__).parent / "golden/official_detr_r50.npz"


def test_detections_equal_the_official_ones():
    golden = np.load(GOLDEN)
    found = jax.jit(postprocess)(golden["full_logits"], golden["full_boxes"], np.array([[426, 640]]))
    np.testing.assert_allclose(found.scores[0], golden["full_post_scores"], atol=1e-6)
    np.testing.assert_array_equal(found.labels[0], golden["full_post_labels"])
    np.testing.assert_allclose(found.boxes[0], golden["full_post_boxes"], rtol=1e-6, atol=1e-4)


def test_every_image_has_its_own_size_and_no_object_is_never_best():
    logits = jnp.array([[[0.0, 1.0, 9.0]], [[1.0, 0.0, 9.0]]])
    boxes = jnp.array([[[0.5, 0.5, 1.0, 0.5]]] * 2)
    found = postprocess(logits, boxes, jnp.array([[100, 200], [10, 20]]))
    assert found.labels.tolist() == [[1], [0]]
    assert found.boxes.tolist() == [[[0, 25, 200, 75]], [[0, 2.5, 20, 7.5]]]
    np.testing.assert_allclose(found.scores, np.exp(1) / (1 + np.exp(1) + np.exp(9)), rtol=1e-5)
