"""`detr-jax train-detector`: the embedded detector, trained on generated scenes, and its model card."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

import detr_jax
from detr_jax.commands import cli
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.methods import MGS
from detr_jax.models import DETR
from detr_jax.run_folder import open_run
from detr_jax.training.detector.card import model_card
from detr_jax.training.detector.log import TrainingLog, plot_log, read_log
from detr_jax.training.detector.train import DetectorTraining, train_detector

MODEL = "detr-tiny"
EVALUATION_BATCH = 8
CHECKPOINTS, LOG, FIGURE = "checkpoints", "log.jsonl", "training.png"
DETECTOR, CARD, REPORT = (f"{MODEL}.{suffix}" for suffix in ("safetensors", "md", "json"))
OUTPUTS = (CHECKPOINTS, LOG, FIGURE, DETECTOR, CARD, REPORT)


@dataclass(frozen=True)
class Arguments:
    """Trains detr-tiny on generated scenes, measures it and writes its model card.

    For example `detr-jax train-detector --out runs/train_detector`; --resume goes on from the last
    checkpoint of one that was interrupted.
    """

    training: Annotated[DetectorTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=DetectorTraining)
    out: Path = Path("runs/train_detector")
    """Folder for checkpoints, log, figure, detector and model card."""
    resume: bool = False
    """Go on with the run in the folder, which must have the same settings; a finished one is measured again."""
    overwrite: bool = False
    """Discard what an earlier run left in the folder; with --resume, only its results."""


def train(folder: Path, training: DetectorTraining) -> DETR:
    """Trains, or goes on, with a bar and a log; a finished training is only restored."""
    log = TrainingLog(folder / LOG, training.steps)
    with tqdm(total=training.steps * training.batch_size, unit="image") as bar:

        def report(step: int, losses: dict[str, float]) -> None:
            if bar.n == 0 and step:
                bar.initial = bar.n = bar.last_print_n = step * training.batch_size
            if entry := log.record(step, losses):
                bar.set_postfix({name: f"{entry[name]:.3f}" for name in losses}, refresh=False)
            bar.update(training.batch_size)

        return train_detector(detr_jax.preset_config(MODEL), training, folder / CHECKPOINTS, report)


def training_command(training: DetectorTraining) -> str:
    """The command that repeats a training, with the settings that are not the defaults."""
    options = [
        f" --{f.name.replace('_', '-')} {getattr(training, f.name)}"
        for f in dataclasses.fields(training)
        if getattr(training, f.name) != f.default
    ]
    return "python scripts/train_detector.py" + "".join(options)


def measure(model: DETR, log: list[dict[str, Any]], training: DetectorTraining) -> dict[str, Any]:
    """Content of the model card: average precision and zeros on the validation scenes, and the training recipe.

    Raises:
        InputError: if the log does not reach the end of the training.
    """
    if not log or log[-1]["step"] != training.steps:
        raise InputError(f"the training's log has no entry for its last step {training.steps}")
    dataset = ScenesDataset("val")
    scores = detr_jax.evaluate(model, dataset, batch_size=EVALUATION_BATCH, group_size=MGS.group_size)
    zeros = {name: counts.zeros for name, counts in scores.counts.items()}
    first, last = log[0], log[-1]
    rate = last["step"] * training.batch_size / (60 * last["minutes"])
    return {
        "model": MODEL,
        "fingerprint": detr_jax.fingerprint(model),
        "config": dataclasses.asdict(model.config),
        "dataset": dataset.name,
        "images": len(dataset),
        "numbers": scores.numbers,
        "AP_interval": scores.interval,
        "category_AP": scores.category_ap,
        "zeros": zeros,
        "zeros_mean": sum(zeros.values()) / len(zeros),
        "training_command": training_command(training),
        "recipe": dataclasses.asdict(training),
        "log": {"minutes": last["minutes"], "images_per_second": rate, "first": first, "last": last},
    }


def main(arguments: Arguments) -> None:
    folder, training = arguments.out, arguments.training
    resume, overwrite = arguments.resume, arguments.overwrite
    refuse_existing(folder / REPORT, overwrite)
    open_run(folder, dataclasses.asdict(training), OUTPUTS, resume=resume, overwrite=overwrite and not resume)
    model = train(folder, training)

    log = read_log(folder / LOG)
    report = measure(model, log, training) | cli.provenance(arguments)
    detr_jax.save(model, folder / DETECTOR)
    plot_log(log, folder / FIGURE)
    card = model_card(report)
    with replacing(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")
    write_json(folder / REPORT, report)  # last: it says that the run is finished
    print(card)
