"""Measures what a step of fine-tuning keeps for its gradients; nothing is compiled or run."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.commands import cli
from detr_jax.data.augment import TrainingBatch, padded_sides
from detr_jax.files import refuse_existing, write_json
from detr_jax.models import preset_config
from detr_jax.models.detr.matching import Targets
from detr_jax.models.registry import abstract_detector
from detr_jax.training.detector.finetune import is_trained, step_graph
from detr_jax.training.detector.losses import detection_loss
from detr_jax.viz.tables import table

OBJECTS = 20


@dataclass(frozen=True)
class Arguments:
    """Adds up the arrays that go from the forward to the backward pass of an image of the largest padded shape.

    That is what --remat and --dtype change, and what grows with the images of a part of a step, on every device. A
    program also needs memory for what it computes with at once.
    """

    preset: str = "detr-r50"
    """Name of the detector."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions of the computation."""
    out: Path = Path("runs/step_memory.json")
    """JSON file for the numbers, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept(preset: str, dtype: str, *, remat: bool) -> int:
    """Bytes of arrays beside the parameters that the backward pass for an image needs."""
    model = abstract_detector(preset_config(preset), jnp.dtype(dtype))
    graph, shape = step_graph(model, remat=remat), jax.ShapeDtypeStruct
    _, *states = nnx.split(model, is_trained, ...)
    sides = padded_sides(model.preprocessing)
    image = (1, sides[0], sides[-1])
    labels, boxes = shape((1, OBJECTS), jnp.int32), shape((1, OBJECTS, 4), jnp.float32)
    targets = Targets(labels, boxes, shape((1, OBJECTS), bool))
    batch = TrainingBatch(shape((*image, 3), jnp.float32), shape(image, bool), targets)

    def backward(parameters: Any, frozen: Any, batch: TrainingBatch) -> Any:
        def loss(parameters: Any) -> jax.Array:
            outputs = nnx.merge(graph, parameters, frozen)(batch.pixel_values, batch.pixel_mask, auxiliary=True)
            return detection_loss(outputs, batch.targets)

        return jax.vjp(loss, parameters)[1]

    return size(jax.eval_shape(backward, *states, batch)) - size(states)


def main(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    options = list(itertools.product(arguments.dtypes, (False, True)))
    found = [kept(arguments.preset, dtype, remat=remat) for dtype, remat in options]
    rows = [
        [dtype, "yes" if remat else "no", f"{x / 1e9:.2f}"] for (dtype, remat), x in zip(options, found, strict=True)
    ]
    print(table(("computation", "--remat", "kept for gradients (GB per image)"), rows))
    named = [{"dtype": dtype, "remat": remat, "bytes": x} for (dtype, remat), x in zip(options, found, strict=True)]
    write_json(arguments.out, {"kept": named} | cli.provenance(arguments))


if __name__ == "__main__":
    cli.run(main, Arguments)
