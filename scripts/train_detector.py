"""Trains the embedded detector on generated scenes and writes its model card."""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

import detr_jax
from detr_jax import DETR, cli, preset_config
from detr_jax.data.features import backbone_features
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import ExistingFileError, InputError, MissingFileError
from detr_jax.evaluation.coco_ap import bootstrap, confidence_interval, score
from detr_jax.evaluation.runs import measure_dataset
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.models.detr.config import config_to_json
from detr_jax.training.detector.card import model_card
from detr_jax.training.detector.log import TrainingLog, plot_log, read_log
from detr_jax.training.detector.train import DetectorTraining, train_detector
from detr_jax.training.gates import PAPER_GROUP_SIZE

MODEL = "detr-tiny"
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Arguments:
    """Trains detr-tiny on generated scenes, measures it and writes its model card.

    For example `python scripts/train_detector.py --out runs/train_detector`; when it was interrupted, the same with
    --resume goes on from the last checkpoint.
    """

    training: Annotated[DetectorTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=DetectorTraining)
    out: Path = Path("runs/train_detector")
    """Folder for checkpoints, log, figure, detector and model card."""
    resume: bool = False
    """Go on with the run in the folder, which must have the same settings; a finished one is measured again."""
    overwrite: bool = False
    """Discard what an earlier run left in the folder; with --resume, only its results."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one training."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "settings.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def figure(self) -> Path:
        return self.root / "training.png"

    @property
    def detector(self) -> Path:
        return self.root / f"{MODEL}.safetensors"

    @property
    def report(self) -> Path:
        return self.root / f"{MODEL}.json"

    @property
    def card(self) -> Path:
        return self.root / f"{MODEL}.md"


def begin(folder: RunFolder, training: DetectorTraining, overwrite: bool) -> None:
    """Makes a folder ready for a new run.

    Raises:
        FileExistsError: if it holds an earlier one that may not be discarded.
    """
    files = (folder.settings, folder.log, folder.figure, folder.detector, folder.report, folder.card)
    if any(path.exists() for path in (*files, folder.checkpoints)):
        if not overwrite:
            raise ExistingFileError(
                f"{folder.root} holds a training; go on with it by --resume, discard it by --overwrite, "
                "or choose another folder by --out"
            )
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        for path in files:
            path.unlink(missing_ok=True)
    write_json(folder.settings, dataclasses.asdict(training))


def check_resumable(folder: RunFolder, training: DetectorTraining, overwrite: bool) -> None:
    """Makes sure that a run can be gone on with.

    Raises:
        FileNotFoundError: if there is none in the folder.
        ValueError: if it had other settings.
        FileExistsError: if it is finished and its results may not be overwritten.
    """
    if not folder.settings.exists():
        raise MissingFileError(f"{folder.root} holds no training ({folder.settings.name} is missing); omit --resume")
    was, now = json.loads(folder.settings.read_text()), dataclasses.asdict(training)
    if different := [
        f"{name} {was.get(name)}, not {now.get(name)}" for name in was | now if was.get(name) != now.get(name)
    ]:
        raise InputError(
            f"the training in {folder.root} has {'; '.join(different)}: resume it with its own settings, or choose "
            "another folder by --out"
        )
    refuse_existing(folder.report, overwrite)


def train(folder: RunFolder, training: DetectorTraining) -> DETR:
    """Trains, or goes on, with a bar and a log; a finished training is only restored."""
    log = TrainingLog(folder.log, training.steps)
    with tqdm(total=training.steps * training.batch_size, unit="image") as bar:

        def report(step: int, losses: dict[str, float]) -> None:
            if bar.n == 0 and step:
                bar.initial = bar.n = bar.last_print_n = step * training.batch_size
            if entry := log.record(step, losses):
                bar.set_postfix({name: f"{entry[name]:.3f}" for name in losses}, refresh=False)
            bar.update(training.batch_size)

        return train_detector(preset_config(MODEL), training, folder.checkpoints, report)


def training_command(training: DetectorTraining) -> str:
    """The command that repeats a training, with the settings that are not the defaults."""
    options = [
        f" --{f.name.replace('_', '-')} {getattr(training, f.name)}"
        for f in dataclasses.fields(training)
        if getattr(training, f.name) != f.default
    ]
    return "python scripts/train_detector.py" + "".join(options)


def measure(model: DETR, log: list[dict], training: DetectorTraining) -> dict:
    """What the model card says: average precision and zeros on the validation scenes, and how it was trained.

    Raises:
        ValueError: if the log does not reach the end of the training.
    """
    if not log or log[-1]["step"] != training.steps:
        raise InputError(f"the training's log has no entry for its last step {training.steps}")
    dataset = ScenesDataset("val")
    batches = backbone_features(model, dataset, EVALUATION_BATCH, "validation scenes")
    measured = measure_dataset(model, batches, selectors={}, group_size=PAPER_GROUP_SIZE)
    scores = score(dataset.ground_truth(), measured.results, dataset.image_ids())
    zeros = {name: counts.zeros for name, counts in measured.counts.items()}
    minutes = log[-1]["minutes"]
    return {
        "model": MODEL,
        "fingerprint": detr_jax.fingerprint(model),
        "config": config_to_json(model.config),
        "dataset": dataset.name,
        "images": len(dataset),
        "numbers": scores.numbers,
        "AP_interval": confidence_interval(bootstrap(scores)),
        "category_AP": scores.category_ap,
        "zeros": zeros,
        "zeros_mean": sum(zeros.values()) / len(zeros),
        "training_command": training_command(training),
        "recipe": dataclasses.asdict(training),
        "log": {
            "minutes": minutes,
            "images_per_second": log[-1]["step"] * training.batch_size / (60 * minutes),
            "first": log[0],
            "last": log[-1],
        },
    }


def main(arguments: Arguments) -> None:
    folder = RunFolder(arguments.out)
    prepare = check_resumable if arguments.resume else begin
    prepare(folder, arguments.training, arguments.overwrite)
    model = train(folder, arguments.training)

    log = read_log(folder.log)
    report = measure(model, log, arguments.training) | cli.provenance(arguments)
    detr_jax.save(model, folder.detector)
    plot_log(log, folder.figure)
    with replacing(folder.card) as temporary:
        temporary.write_text(model_card(report))
    # Last, because this file says that the run is finished.
    write_json(folder.report, report)
    print(folder.card.read_text())


if __name__ == "__main__":
    cli.run(main, Arguments)
