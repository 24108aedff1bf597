"""Times the FFNs, the transformer and the whole of a detector, dense and with plans, in turns in one run."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from torch_runtimes import NAMES, runtime_forwards, runtime_versions
from tqdm import tqdm

import detr_jax
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions
from detr_jax.data.features import backbone_features
from detr_jax.data.loading import batches
from detr_jax.errors import InputError
from detr_jax.evaluation.inspection import describe
from detr_jax.files import refuse_existing, write_json
from detr_jax.models import Selection, Selectors
from detr_jax.models.ffn import forward
from detr_jax.search.timing import detector_outputs, interleaved_times
from detr_jax.viz.tables import table

STAGES = ("FFNs", "transformer", "detector")


@dataclass(frozen=True)
class Arguments:
    """Times a detector dense and with plans: all FFNs on their real inputs, the transformer, and the whole detector.

    Selectors, routers and the grouping of tokens are part of the times. All contestants take turns; ratios of medians
    count. For example `python scripts/benchmarks/end_to_end.py --plans runs/experts/plan.safetensors`.
    """

    plans: tuple[Path, ...]
    """Plans of the detector, as scripts/train_gates.py writes them."""
    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    images: int = 32
    """Images of the batch; of a data set with several sizes the first batch holds fewer."""
    runtimes: bool = False
    """Also time transformers' detector of the same architecture, with random weights, on torch, torch.compile,
    onnxruntime and OpenVINO."""
    implementation: str | None = None
    """Implementation of the plans' FFNs; default what pays on this device."""
    repeats: int = 15
    """Measured turns, after two that warm up."""
    out: Path = Path("runs/end_to_end.json")
    """JSON file for the times, the ratios, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


@jax.jit
def _ffns(weights: Any, traces: Any, selectors: Selectors) -> list[jax.Array]:
    """Outputs of all FFNs on the inputs of their traces."""
    return [
        forward(weights[name], trace.inputs, selectors[name](weights[name], trace.inputs, trace.tokens))
        if name in selectors
        else forward(weights[name], trace.inputs, Selection())
        for name, trace in traces.items()
    ]


@jax.jit
def _transformer(model: Any, tokens: Any, selectors: Selectors) -> Any:
    return model.transform(tokens, selectors=selectors)


def contestants(model: Any, selectors: Selectors, batch: Any, tokens: Any) -> dict[str, Callable[[], Any]]:
    """A call for each stage."""
    traces = jax.jit(type(model).traces)(model, tokens, selectors)
    images = (jnp.asarray(batch.pixel_values), jnp.asarray(batch.pixel_mask))
    calls = {
        "FFNs": partial(_ffns, model.ffn_weights(), traces, selectors),
        "transformer": partial(_transformer, model, tokens, selectors),
        "detector": partial(detector_outputs, model, *images, selectors),
    }
    return {stage: partial(_wait, call) for stage, call in calls.items()}


def _wait(call: Callable[[], Any]) -> None:
    jax.block_until_ready(call())


def main(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    model = detr_jax.load(arguments.model, preset=arguments.preset)
    if len(set(map(str, arguments.plans))) < len(arguments.plans) or not arguments.plans:
        raise InputError("--plans needs one or several different plans")
    sparse = {
        str(path): detr_jax.load_sparse(model, path, implementation=arguments.implementation or "auto")
        for path in arguments.plans
    }
    dataset = arguments.data.open("val", arguments.images)
    (embedded, *_) = backbone_features(model, dataset, arguments.images, "embedding images")
    batch = next(iter(batches(dataset, model.preprocessing, arguments.images)))
    tokens = jax.tree.map(jnp.asarray, embedded.tokens)
    calls = {("dense", stage): call for stage, call in contestants(model, {}, batch, tokens).items()}
    for name, one in tqdm(sparse.items(), desc="compiling plans", unit="plan"):
        found = contestants(one.detector, one.plan.selectors, batch, tokens)
        calls |= {(name, stage): call for stage, call in found.items()}
    theirs, left_out = {}, {}
    if arguments.runtimes:
        theirs, left_out = runtime_forwards(model.config, batch.pixel_mask.shape, "float32")
        calls |= {(name, "detector"): call for name, call in theirs.items() if name in NAMES}
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    medians = {name: statistics.median(times) for name, times in interleaved_times(calls, arguments.repeats).items()}

    rows, ran = [], {}
    size = batch.pixel_mask.shape[1:]
    for name, one in sparse.items():
        kept = {ffn: float(of.density) for ffn, of in one.inspect(batch.pixel_values, batch.pixel_mask).items()}
        computed = {ffn: float(of.executed) for ffn, of in one.inspect(batch.pixel_values, batch.pixel_mask).items()}
        ran[name] = describe(one.execution_report(size, arguments.images))
        times = {stage: medians[name, stage] for stage in STAGES}
        rows.append(
            {"plan": name, "method": one.plan.method, "seconds": times}
            | {"density": float(np.mean(list(kept.values()))), "executed": float(np.mean(list(computed.values())))}
            | {"share_of_dense": {stage: times[stage] / medians["dense", stage] for stage in STAGES}}
        )
    dense = {stage: medians["dense", stage] for stage in STAGES}
    images = int(embedded.valid.sum())
    others = {name: medians[name, "detector"] for name in theirs if name in NAMES}
    results = {"dense_seconds": dense, "rows": rows, "executions": ran, "data": dataset.name, "images": images}
    results |= {"shape": batch.pixel_values.shape, "runtime_seconds": others, "left_out": left_out}
    report = results | cli.provenance(arguments)
    report["versions"] |= runtime_versions() if arguments.runtimes else {}
    write_json(arguments.out, report)
    print(f"\n{images} images of {dataset.name} in one batch, {jax.devices()[0].device_kind}; shares of the dense time")
    header = ("plan", "density", "executed", *STAGES)
    lines = [
        (row["plan"], row["density"], row["executed"], *(row["share_of_dense"][stage] for stage in STAGES))
        for row in rows
    ]
    print(table(header, lines))
    for name, seconds in others.items():
        print(f"{name}: the detector in {1e3 * seconds:.1f} ms, {seconds / dense['detector']:.2f} of ours")
    print("dense, ms: " + ", ".join(f"{stage} {1e3 * seconds:.1f}" for stage, seconds in dense.items()))
    for name, report in ran.items():
        print(f"\n{name}\n{report}")


if __name__ == "__main__":
    cli.run(main, Arguments)
