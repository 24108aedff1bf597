"""Times multi-scale sampling beside the same in torch, after checking that they agree."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.commands import cli
from detr_jax.errors import InputError, MissingDependencyError, require_counts
from detr_jax.files import refuse_existing, write_json
from detr_jax.kernels.sampling import multi_scale_sampling
from detr_jax.search.timing import interleaved_times
from detr_jax.viz.tables import table

STRIDES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Arguments:
    """Times the sampling of a Deformable DETR encoder layer beside `grid_sample` of torch, as transformers calls it.

    Every token of an image is a query with points around itself; torch runs on the CPU. Both take turns, and what
    counts is the ratio of their medians.
    """

    height: int = 800
    """Of the image, in pixels."""
    width: int = 1333
    """Of the image, in pixels."""
    heads: int = 8
    """Heads of attention."""
    features: int = 32
    """Features of a head."""
    points: int = 4
    """Points of a head in each of 4 levels."""
    spread: float = 0.02
    """Standard deviation of the points around their token, as a fraction of the image."""
    repeats: int = 7
    """Measured turns, after two that warm up."""
    out: Path = Path("runs/benchmark_sampling.json")
    """JSON file for the times, the ratio, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def benchmark(arguments: Arguments) -> None:
    require_counts(arguments, "height", "width", "heads", "features", "points", "repeats")
    if jax.default_backend() != "cpu":
        raise InputError(f"torch would run on the CPU and JAX on {jax.default_backend()}")
    try:
        import torch
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    except ImportError as error:
        raise MissingDependencyError("this needs torch and transformers to compare with") from error
    refuse_existing(arguments.out, arguments.overwrite)
    shapes = tuple((-(-arguments.height // stride), -(-arguments.width // stride)) for stride in STRIDES)
    random = np.random.default_rng(0)
    centres = [np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1) for h, w in shapes]
    tokens = np.concatenate([level.reshape(-1, 2) for level in centres]).astype(np.float32)
    samples = (1, len(tokens), arguments.heads, len(shapes), arguments.points)
    value = random.standard_normal((1, len(tokens), arguments.heads, arguments.features), np.float32)
    spread = arguments.spread * random.standard_normal((*samples, 2), np.float32)
    locations = tokens[None, :, None, None, None] + spread
    weights = random.uniform(0, 1, samples).astype(np.float32)
    weights /= weights.sum((-2, -1), keepdims=True)

    ours = jax.jit(lambda *arrays: multi_scale_sampling(arrays[0], shapes, *arrays[1:]))
    given = [jnp.asarray(array) for array in (value, locations, weights)]
    theirs, tensors = MultiScaleDeformableAttention(), [torch.from_numpy(a) for a in (value, locations, weights)]

    def grid_sample() -> object:
        with torch.inference_mode():
            return theirs(tensors[0], None, list(shapes), None, *tensors[1:], 64)

    difference = float(np.abs(np.asarray(ours(*given)) - grid_sample().numpy()).max())
    contestants = {"ours": lambda: jax.block_until_ready(ours(*given)), "torch, grid_sample": grid_sample}
    seconds = interleaved_times(contestants, arguments.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["ours"] / medians["torch, grid_sample"]
    report = {"seconds": seconds, "medians": medians, "ours / torch": ratio, "largest difference": difference}
    write_json(arguments.out, report | {"tokens": len(tokens)} | cli.provenance(arguments))
    rows = [[name, medians[name], min(times), max(times)] for name, times in seconds.items()]
    print(table(["seconds", "median", "min", "max"], rows))
    print(f"ours / torch {ratio:.2f} at {len(tokens)} queries; largest difference {difference:.1e}")


if __name__ == "__main__":
    cli.run(benchmark, Arguments)
