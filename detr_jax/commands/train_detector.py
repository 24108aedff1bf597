"""`detr-jax train-detector`: an embedded detector, trained on generated scenes, and its model card."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from tqdm import tqdm

import detr_jax
from detr_jax.commands import cli
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError
from detr_jax.evaluation.places import density_by_place
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.methods import MGS
from detr_jax.models import DETR
from detr_jax.run_folder import open_run
from detr_jax.training.detector.card import model_card
from detr_jax.training.detector.log import TrainingLog, plot_log, read_log
from detr_jax.training.detector.train import RECIPES, DetectorTraining, TrainedHere, train_detector

VARIANTS = dict.fromkeys(("--model", "--data", "--coco"), "fine_tune") | {"--deformable": "train_deformable"}
EVALUATION_BATCH = 8
CHECKPOINTS, LOG, FIGURE = "checkpoints", "log.jsonl", "training.png"


@dataclass(frozen=True)
class Arguments:
    """Trains detr-tiny on generated scenes, measures it and writes its model card.

    For example `detr-jax train-detector --out runs/train_detector`; --resume goes on from the last
    checkpoint of one that was interrupted.

    With --model or --data the command fine-tunes a detector instead: `detr-jax train-detector --model detr-r50 --help`.
    """

    training: Annotated[DetectorTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=DetectorTraining)
    out: Path = Path("runs/train_detector")
    """Folder for checkpoints, log, figure, detector and model card."""
    resume: bool = False
    """Go on with the run in the folder, which must have the same settings; a finished one is measured again."""
    overwrite: bool = False
    """Discard what an earlier run left in the folder; with --resume, only its results."""


def train(name: str, folder: Path, training: DetectorTraining) -> TrainedHere:
    """Trains, or goes on, with a bar and a log; a finished training is only restored."""
    log = TrainingLog(folder / LOG, training.steps)
    backbone = None if training.backbone is None else cast(DETR, detr_jax.load(training.backbone)).backbone
    with tqdm(total=training.images(training.steps), unit="image") as bar:

        def report(step: int, losses: dict[str, float]) -> None:
            if bar.n == 0 and step:
                bar.initial = bar.n = bar.last_print_n = training.images(step)
            if entry := log.record(step, losses):
                bar.set_postfix({name: f"{entry[name]:.3f}" for name in losses}, refresh=False)
            bar.update(training.images(step + 1) - training.images(step))

        return train_detector(detr_jax.preset_config(name), training, folder / CHECKPOINTS, report, backbone)


def training_command(name: str, training: DetectorTraining) -> str:
    """The command that repeats a training, with the settings that are not the recipe's."""
    options = [
        f" --{f.name.replace('_', '-')} {getattr(training, f.name)}"
        for f in dataclasses.fields(training)
        if getattr(training, f.name) != getattr(RECIPES[name], f.name)
    ]
    return f"python scripts/train_detector.py{' --deformable' * (name == 'deformable-tiny')}" + "".join(options)


def measure(name: str, model: TrainedHere, log: list[dict[str, Any]], training: DetectorTraining) -> dict[str, Any]:
    """Content of the model card: average precision and zeros on the validation scenes, and the training recipe.

    Raises:
        InputError: if the log does not reach the end of the training.
    """
    if not log or log[-1]["step"] != training.steps:
        raise InputError(f"the training's log has no entry for its last step {training.steps}")
    dataset = ScenesDataset("val", side=model.preprocessing.shortest_side)
    scores = detr_jax.evaluate(model, dataset, batch_size=EVALUATION_BATCH, group_size=MGS.group_size)
    zeros = {name: counts.zeros for name, counts in scores.counts.items()}
    places = density_by_place(model, dataset, EVALUATION_BATCH)
    first, last = log[0], log[-1]
    rate = training.images(last["step"]) / (60 * last["minutes"])
    return {
        "model": name,
        "fingerprint": detr_jax.fingerprint(model),
        "config": dataclasses.asdict(model.config),
        "dataset": dataset.name,
        "images": len(dataset),
        "numbers": scores.numbers,
        "AP_interval": scores.interval,
        "category_AP": scores.category_ap,
        "zeros": zeros,
        "zeros_mean": sum(zeros.values()) / len(zeros),
        "zeros_by_place": {
            name: {place: 1 - density.fired for place, density in of_ffn.items()} for name, of_ffn in places.items()
        },
        "training_command": training_command(name, training),
        "recipe": dataclasses.asdict(training),
        "log": {"minutes": last["minutes"], "images_per_second": rate, "first": first, "last": last},
    }


def main(arguments: Arguments) -> None:
    """Runs the command."""
    train_and_measure("detr-tiny", arguments)


def train_and_measure(name: str, arguments: Arguments) -> None:
    """The command, for the embedded detector of a preset."""
    folder, training = arguments.out, arguments.training
    resume, overwrite = arguments.resume, arguments.overwrite
    results = [f"{name}.{suffix}" for suffix in ("safetensors", "md", "json")]
    detector, card, report = (folder / result for result in results)
    refuse_existing(report, overwrite)
    outputs = (CHECKPOINTS, LOG, FIGURE, *results)
    open_run(folder, dataclasses.asdict(training), outputs, resume=resume, overwrite=overwrite and not resume)
    model = train(name, folder, training)

    log = read_log(folder / LOG)
    measured = measure(name, model, log, training) | cli.provenance(arguments)
    detr_jax.save(model, detector)
    plot_log(log, folder / FIGURE)
    text = model_card(measured)
    with replacing(card) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(report, measured)  # last: it says that the run is finished
    print(text)
