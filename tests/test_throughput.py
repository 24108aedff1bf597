"""What keeps a device busy: nothing is compiled after the first batches, and half the bits give the same answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import annotation, detect_dataset, tiny_detector, write_coco

from detr_jax.calibration.activations import profile_activations
from detr_jax.calibration.thresholds import measure_scores
from detr_jax.data.batches import ImageBatches
from detr_jax.data.coco import CocoDataset
from detr_jax.data.dataset import Subset
from detr_jax.data.features import backbone_features
from detr_jax.evaluation.runs import measure_dataset
from detr_jax.methods import MGS, LinearGate, Thresholded
from detr_jax.training.gates import train_gates

SIZES = [(32, 40)] * 5 + [(40, 32)] * 4
BATCH = 2


class Compilations:
    """Programs that JAX compiled in this process so far."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, *_, **__) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def compilations():
    return Compilations()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    boxes = [annotation(i, 1 + i % 9, (2 * i, i, 10 + i, 12), category_id=1 + i % 2) for i in range(1, 10)]
    return CocoDataset(write_coco(tmp_path_factory.mktemp("coco"), SIZES, boxes), "val2017")


@pytest.fixture(scope="module")
def one_shape(dataset):
    return Subset(dataset, 0, 5)


def selectors_at(threshold: float, seed: int) -> dict[str, Thresholded]:
    model, rng = tiny_detector(), np.random.default_rng(seed)
    gate = LinearGate(jnp.float32(rng.standard_normal((model.config.d_model, 8))), jnp.zeros(8))
    return {name: Thresholded(gate, jnp.float32(threshold)) for name in model.config.ffn_names}


@pytest.mark.parametrize("name", ["detections", "counts", "scores"])
def test_nothing_is_compiled_in_a_second_pass(dataset, compilations, name):
    def make_pass(seed: int) -> None:
        # Other weights, and another threshold.
        model, selectors = tiny_detector(seed), selectors_at(seed / 10, seed)
        if name == "detections":
            detect_dataset(model, dataset, BATCH)
        elif name == "counts":
            measure_dataset(model, backbone_features(model, dataset, BATCH, ""), selectors=selectors, group_size=4)
        else:
            scores = {name: selector.score for name, selector in selectors.items()}
            measure_scores(model, ImageBatches(model, dataset, BATCH), scores)

    make_pass(1)
    before = compilations.count
    make_pass(2)
    assert compilations.count == before


def test_statistics_compile_for_the_first_batch_of_a_shape_only(one_shape, compilations, tmp_path):
    seen: list[int] = []
    path = tmp_path / "statistics.safetensors"
    profile_activations(tiny_detector(), one_shape, BATCH, path, lambda _: seen.append(compilations.count))
    assert len(seen) == 4 and seen[1] == seen[-1]  # the first one is of the time before the pass


def test_gate_training_compiles_in_its_first_pass_only(dataset, compilations, tmp_path):
    model, seen = tiny_detector(), []
    passes = ImageBatches(model, dataset, BATCH, shuffle_seed=0)
    method = MGS(group_size=4, epochs=4)

    def note(step: int, loss: jax.Array) -> None:
        float(loss)
        seen.append(compilations.count)

    before = compilations.count
    train_gates(model, passes, {"mgs": method}, tmp_path, note, checkpoint_steps=3)
    assert before < seen[len(passes) - 1] == seen[-1]


def test_bfloat16_trains_the_same_gates_and_detects_the_same(one_shape, tmp_path):
    single, half = tiny_detector(), tiny_detector(dtype=jnp.bfloat16)
    method = MGS(group_size=4, epochs=20, learning_rate=0.05)
    found = []
    for model, folder in ((single, "single"), (half, "half")):
        passes = ImageBatches(model, one_shape, BATCH, shuffle_seed=0)
        found.append(train_gates(model, passes, {"mgs": method}, tmp_path / folder, lambda *_: None)["mgs"])
    for name, gate in found[0].items():
        other = found[1][name].kernel
        assert other.dtype == jnp.float32
        assert 0.98 < np.corrcoef(gate.kernel.ravel(), other.ravel())[0, 1] < 1
    one, other = (detect_dataset(model, one_shape, BATCH) for model in (single, half))
    differences = np.abs([a["score"] - b["score"] for a, b in zip(one, other, strict=True)])
    assert 0 < np.median(differences) < 0.02
