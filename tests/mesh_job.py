"""What test_mesh.py runs on many devices: the main command, and then passes that it does not make.

Not a test itself: `python mesh_job.py FOLDER OUT [OPTION ...]`, with the devices and processes that the environment
says, writes what train_gates.py writes and found.npz into OUT.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from commands import run
from tiny import detect_dataset

import detr_jax
from detr_jax.calibration.moments import measure_moments
from detr_jax.data.batches import ImageBatches
from detr_jax.data.coco import CocoDataset
from detr_jax.kernels import Execution
from detr_jax.mesh import is_first_process, replicate
from detr_jax.methods import executed
from detr_jax.plan import load_plan

BATCH, EPOCHS = 8, 30


def main(inputs: Path, out: Path, *options: str) -> None:
    detector = inputs / "detector.safetensors"
    sizes = ["--split.calib", 3, "--group-size", 4, "--batch-size", BATCH, "--epochs", EPOCHS]
    data = ["--model", detector, "--coco", inputs, *sizes, "--checkpoint-steps", 5]
    run("train_gates.py", *data, "--learning-rate", 0.05, "--out", out, *options)
    experts = ["--method", "experts", "--options", "experts=3", "rounds=1", "router_steps=50", "--density", 0.3]
    run("train_gates.py", *data, "--neuron-order", "own", *experts, "--out", out / "experts")

    gates = detr_jax.methods.TokenGates(keep=(0.5,), epochs=EPOCHS, learning_rate=0.05)
    images = CocoDataset(inputs, "train2017")
    gated = detr_jax.gate_tokens(detr_jax.load(detector), images, gates, batch_size=BATCH, folder=out / "tokens")

    model, dataset = replicate(detr_jax.load(detector)), CocoDataset(inputs, "val2017")
    plan = load_plan(out / "plan.safetensors", model)
    # The implementation that leaves work out has to run on each device by itself.
    selectors = executed(plan.selectors, Execution(None, 4, implementation="xla"))
    results = detect_dataset(model.with_permutations(plan.permutations), dataset, BATCH, selectors=selectors)
    found = {
        "detections": np.array([[r["image_id"], r["category_id"], r["score"], *r["bbox"]] for r in results]),
        "moments": measure_moments(model, ImageBatches(model, dataset, BATCH)),
        "token scores": jax.device_get(gated.plan.selectors["encoder"].score),
    }
    if is_first_process():
        leaves, _ = jax.tree.flatten_with_path(found)
        np.savez(out / "found.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
