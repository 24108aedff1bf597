"""`detr-jax train-detector --model MODEL --data DATA`: a detector fine-tuned on the classes of other data."""

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

import detr_jax
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions, ModelOptions
from detr_jax.data.augment import AugmentedBatches
from detr_jax.data.dataset import Dataset
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import bootstrap_difference, confidence_interval, score, shown
from detr_jax.evaluation.evaluate import evaluate
from detr_jax.evaluation.runs import coco_results, predictions
from detr_jax.files import write_json
from detr_jax.mesh import is_first_process, mesh_of, replicate
from detr_jax.models import DETR
from detr_jax.run_folder import RESULTS, finish_run, open_run
from detr_jax.training.detector.finetune import FineTuning, check_parts, fine_tune
from detr_jax.training.detector.log import TrainingLog, plot_curves, read_log

MANY_PROCESSES = True
CHECKPOINTS, LOG, VALIDATION, FIGURE = "checkpoints", "log.jsonl", "validation.json", "training.png"
DETECTOR = "detector.safetensors"
OUTPUTS = (CHECKPOINTS, LOG, VALIDATION, FIGURE, DETECTOR)


@dataclass(frozen=True)
class Split:
    """Numbers of images."""

    train: int | None = None
    """To train on; default all."""
    val: int | None = None
    """To evaluate; default all."""


@dataclass(frozen=True)
class Arguments(ModelOptions):
    """Fine-tunes a detector on the classes of other data, and keeps the one with the best AP on their validation split.

    For example `detr-jax train-detector --model detr-r50 --data coco:PATH --out runs/mine`; --resume goes on from the
    last checkpoint. Writes detector.safetensors, for `--model` of every command, results.json, and log.jsonl,
    validation.json and training.png with the course of the training. Without --model and --data, train-detector trains
    detr-tiny from scratch and has other options.
    """

    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    split: Split = field(default_factory=Split)
    labels: tuple[str, ...] = ()
    """Names of the classes in their order; default all categories of the data by their ids."""
    training: Annotated[FineTuning, tyro.conf.OmitArgPrefixes] = field(default_factory=FineTuning)
    out: Path = Path("runs/fine_tune")
    """Folder for the results."""
    resume: bool = False
    """Resume an interrupted run in the output folder, which must have the same settings."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


class Validation:
    """AP on a data set after epochs, in a file that a resumed run goes on with; the best detector is beside it."""

    def __init__(self, folder: Path, data: Dataset, training: FineTuning):
        self._folder, self._data, self._training = folder, data, training
        path = folder / VALIDATION
        self.entries: list[dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    @property
    def best(self) -> dict[str, float]:
        """`epoch` and `AP` of the best detector, of equal ones the last."""
        return max(self.entries, key=lambda entry: (entry["AP"], entry["epoch"]))

    def __call__(self, epoch: int, model: DETR) -> bool:
        """Evaluates a detector, unless an interrupted run has; whether AP has not risen for long enough."""
        if all(entry["epoch"] != epoch for entry in self.entries):
            found = predictions(model, self._data, self._training.batch_size, progress=False)
            results = [result for batch, _, detections, _ in found for result in coco_results(batch, detections)]
            scores = score(self._data.ground_truth(), results, self._data.image_ids())
            self.entries.append({"epoch": epoch, "AP": scores.numbers["AP"]})
            tqdm.write(f"epoch {epoch}: AP {scores.numbers['AP']:.3f} on {self._data.name}")
            if is_first_process():
                if self.best["epoch"] == epoch:
                    detr_jax.save(model, self._folder / DETECTOR)
                write_json(self._folder / VALIDATION, self.entries)  # last: an epoch in it needs no evaluation
        return sum(entry["epoch"] > self.best["epoch"] for entry in self.entries) >= self._training.patience


def require_objects(data: Dataset, labels: tuple[str, ...]) -> None:
    """Raises an InputError if a split has no object of a detector's classes, so that there is no AP or loss."""
    annotations = data.ground_truth()["annotations"]
    if not any(a["category_id"] < len(labels) and not a["iscrowd"] for a in annotations):
        raise InputError(f"{data.name} has no annotated objects of the classes {', '.join(labels)}")


def peak_memory() -> int:
    """Bytes of the first device that were in use at most, or without such statistics of this process."""
    import resource  # not on Windows

    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def train(model: DETR, batches: AugmentedBatches, arguments: Arguments, validation: Validation) -> float | None:
    """Fine-tunes with a bar and a log; images per second, the median over steps, None where none was taken."""
    training, times = arguments.training, list[float]()
    steps = training.epochs * len(batches)
    log = TrainingLog(arguments.out / LOG, steps, min(100, len(batches)))
    with tqdm(total=steps, unit="step") as bar:

        def report(step: int, loss: jax.Array | None) -> None:
            bar.update(step - bar.n)
            if loss is not None:
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)  # waits for the step, so the times are its
                times.append(time.perf_counter())
                if is_first_process():
                    log.record(step - 1, {"loss": float(loss)})

        fine_tune(model, batches, training, arguments.out / CHECKPOINTS, report, validation)
    return float(training.batch_size / np.median(np.diff(times))) if len(times) > 1 else None


def main(arguments: Arguments) -> None:
    """Runs the command."""
    training, split, out = arguments.training, arguments.split, arguments.out
    if arguments.data.generated and split.train is None:
        raise InputError("fine-tuning needs images: --data coco:PATH, or --split.train with a number of scenes")
    data, validation_data = arguments.data.open("train", split.train), arguments.data.open("val", split.val)
    for one in (data, validation_data):
        if not one.has_annotations:
            raise InputError(f"{arguments.data.name} has no annotated objects in {one.name}, which training needs")
    categories = sorted(data.categories(), key=lambda category: category["id"])
    labels = arguments.labels or tuple(category["name"] for category in categories)
    model = arguments.load(labels)
    assert isinstance(model, DETR)  # `load` refuses others
    data, validation_data = arguments.data.matched(labels, data, validation_data)
    for one in (data, validation_data):
        require_objects(one, labels)
    model = replicate(model)
    batches = AugmentedBatches(model, data, training.batch_size, training.seed, training.views)
    check_parts(training, mesh_of(model))
    inputs = {"detector": detr_jax.fingerprint(model), "data": data.fingerprint}
    settings = cli.settings(arguments, **inputs, validation=validation_data.fingerprint)
    open_run(out, settings, OUTPUTS, resume=arguments.resume, overwrite=arguments.overwrite)

    validation = Validation(out, validation_data, training)
    rate = train(model, batches, arguments, validation)
    # The first process has written the best detector before it takes part in the first of these.
    before = evaluate(model, validation_data, batch_size=training.batch_size, group_size=1)
    tuned = detr_jax.load(out / DETECTOR, dtype=model.dtype)
    after = evaluate(tuned, validation_data, batch_size=training.batch_size, group_size=1)
    if not is_first_process():
        return
    assert before.coco and after.coco and before.ap is not None and after.ap is not None  # there are objects
    interval = confidence_interval(bootstrap_difference(after.coco, before.coco))
    best, log = validation.best, read_log(out / LOG)
    epochs, ap = ([entry[name] for entry in validation.entries] for name in ("epoch", "AP"))
    curves = {
        "set loss, all decoder layers": ([entry["step"] for entry in log], [entry["loss"] for entry in log]),
        f"AP on {validation_data.name}": ([epoch * len(batches) for epoch in epochs], ap),
    }
    plot_curves(curves, out / FIGURE)
    results: dict[str, Any] = {
        "model": arguments.model,
        "fingerprint": detr_jax.fingerprint(tuned),
        "labels": labels,
        "recipe": dataclasses.asdict(training),
        "training": {"data": data.name, "images": len(data)},
        "validation": {"data": validation_data.name, "images": len(validation_data), "epochs": validation.entries},
        "best_epoch": best["epoch"],
        "before": before.to_json(),
        "after": after.to_json(),
        "AP_difference_interval": interval,
        "images_per_second": rate,
        "peak_memory_bytes": peak_memory(),
    }
    finish_run(out, results | cli.provenance(arguments))
    for title, scores in (("before", before), ("after", after)):
        low, high = scores.interval or (None, None)
        print(f"AP {title:<6} {shown(scores.ap)} [{shown(low)}, {shown(high)}]")
    print("difference {:+.3f} [{:+.3f}, {:+.3f}], paired".format(after.ap - before.ap, *interval))
    print(f"{DETECTOR} of epoch {best['epoch']}, {RESULTS} and {FIGURE} are in {out}")
