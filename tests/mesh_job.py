"""What test_mesh.py runs on many devices: every pass over images, its results written as one file.

Not a test itself: `python mesh_job.py COCO_FOLDER OUT_FOLDER`, with as many devices and processes as the environment
says.
"""

import sys
from dataclasses import astuple
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tiny import tiny_detector

from detr_jax.data.coco import CocoDataset
from detr_jax.data.embedding import embedded_batches
from detr_jax.evaluation.detections import detect_dataset, measure_dataset
from detr_jax.kernels import Execution
from detr_jax.mesh import is_first_process, join_cluster, mesh_of, replicate
from detr_jax.sparsity.calibration import recall_threshold
from detr_jax.sparsity.selectors import executed
from detr_jax.training.activations import measure_activations, measure_moments, profile_activations
from detr_jax.training.budget import GateTuning, MeanDensity, meet, tune_gates
from detr_jax.training.calibration import calibrate
from detr_jax.training.gates import MGS, GateTraining, train_gates
from detr_jax.training.passes import ImagePasses, StoredPasses

BATCH = 8
TRAINING = GateTraining(epochs=6, batch_size=BATCH, group_size=4, checkpoint_steps=4, learning_rate=0.05)


def silent(*_) -> None:
    pass


def compute(coco: Path, out: Path) -> dict[str, np.ndarray]:
    """Everything by name."""
    model, dataset = replicate(tiny_detector()), CocoDataset(coco, "val2017")
    profile = profile_activations(model, dataset, BATCH, 4, out / "profile.safetensors", silent)
    passes = ImagePasses(model, dataset, BATCH, shuffle_seed=0)
    gates = train_gates(model, passes, {"mgs": MGS}, TRAINING, out / "checkpoints", silent)["mgs"]
    selectors = calibrate(model, passes, gates, partial(recall_threshold, recall=0.9))
    embedded = list(embedded_batches(model, dataset, BATCH, ""))
    stored = StoredPasses([batch.tokens for batch in embedded], mesh=mesh_of(model))
    budget, tuning = MeanDensity(0.5), GateTuning(epochs=2)
    tuned = meet(model, stored, tune_gates(model, stored, selectors, budget, tuning, out / "tuned", silent), budget)
    measured = measure_dataset(model, embedded, selectors=selectors, group_size=4)
    gathered = executed(selectors, Execution(None, 4, implementation="xla"))
    found = {
        "profile": profile.statistics,
        "statistics": measure_activations(model, passes, 4),
        "moments": measure_moments(model, passes),
        "selectors": selectors,
        "tuned": tuned,
        "counts": {name: np.array(astuple(counts)) for name, counts in measured.counts.items()},
        "dense": in_order(detect_dataset(model, dataset, BATCH, progress=False)),
        "sparse": in_order(measured.results),
        "executed": in_order(detect_dataset(model, dataset, BATCH, selectors=gathered, progress=False)),
    }
    leaves, _ = jax.tree.flatten_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def in_order(results: list[dict]) -> np.ndarray:
    """(detections, 7) numbers."""
    return np.array([[r["image_id"], r["category_id"], r["score"], *r["bbox"]] for r in results])


if __name__ == "__main__":
    join_cluster()
    jax.config.update("jax_default_matmul_precision", "highest")
    found = compute(*map(Path, sys.argv[1:]))
    if is_first_process():
        np.savez(Path(sys.argv[2]) / "found.npz", **found)
