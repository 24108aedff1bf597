"""Measures whether memory grows while images are evaluated."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import detr_jax
from detr_jax.commands import cli
from detr_jax.data.dataset import Dataset
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError, MissingDependencyError
from detr_jax.evaluation.runs import coco_results, predictions
from detr_jax.files import refuse_existing, write_json
from detr_jax.models import DETR, Selectors
from detr_jax.viz.tables import table


@dataclass(frozen=True)
class Arguments:
    """Evaluates generated scenes, dense and with a plan, and reports the resident memory as it goes.

    First detections are dropped: nothing should grow. Then they are kept, as scoring needs all of them; what
    each image takes is reported.
    """

    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    plan: str | None = None
    """Plan of the detector; default the one that comes with it."""
    images: int = 2000
    """Images to evaluate, each time."""
    every: int = 100
    """Images between two measurements."""
    settled: int = 500
    """Images after which memory should not grow any more; growth is measured from here."""
    batch_size: int = 10
    """Images per batch; has to divide the images between two measurements."""
    implementation: str = "masked"
    """How the plan's FFNs are computed, see `detr_jax.load_sparse`."""
    out: Path = Path("runs/measure_memory.json")
    """JSON file for the numbers, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def resident() -> int:
    """Bytes of physical memory of this process and of those that load images for it.

    Raises:
        MissingDependencyError: if psutil is not installed.
    """
    try:
        import psutil
    except ImportError as error:
        raise MissingDependencyError("measuring memory needs psutil: pip install psutil") from error
    process = psutil.Process()
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def measure(model: DETR, dataset: Dataset, selectors: Selectors, keep: bool, arguments: Arguments) -> dict[int, int]:
    """Resident bytes by the number of images evaluated."""
    kept, found, images = [], {}, 0
    for batch, _, detections, _ in predictions(model, dataset, arguments.batch_size, selectors=selectors):
        results = coco_results(batch, detections)
        kept += results if keep else []
        images += int(batch.valid.sum())
        if images % arguments.every == 0:
            found[images] = resident()
    return found


def growth(found: dict[int, int], settled: int) -> float:
    """Bytes for each image more, by least squares."""
    images, held = np.array([(images, held) for images, held in found.items() if images >= settled]).T
    return float(np.polyfit(images, held, 1)[0])


def main(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    resident()  # fails at once where it cannot be measured
    if arguments.every % arguments.batch_size or arguments.images % arguments.every:
        raise InputError(
            f"--batch-size {arguments.batch_size} has to divide --every {arguments.every}, and that "
            f"--images {arguments.images}"
        )
    if arguments.images < arguments.settled + 2 * arguments.every:
        raise InputError(f"--images {arguments.images} are too few to see growth after {arguments.settled}")
    sparse = detr_jax.load_sparse(arguments.model, arguments.plan, implementation=arguments.implementation)
    dataset = ScenesDataset("train", arguments.images)
    runs = {"dense": ({}, False), "with the plan": (sparse.plan.selectors, False), "dense, detections kept": ({}, True)}
    found = {name: measure(sparse.detector, dataset, *run, arguments) for name, run in runs.items()}
    rows = [[images, *(f"{of[images] / 1e6:.1f}" for of in found.values())] for images in found["dense"]]
    print(f"\nresident memory in MB\n{table(('images', *found), rows)}\n")
    growths = {name: growth(of, arguments.settled) for name, of in found.items()}
    for name, slope in growths.items():
        print(f"{name}: {slope / 1e3:+.2f} kB for each image after {arguments.settled}")
    report = {"growth_bytes_per_image": growths, "resident_bytes": found}
    write_json(arguments.out, report | cli.provenance(arguments))


if __name__ == "__main__":
    cli.run(main, Arguments)
