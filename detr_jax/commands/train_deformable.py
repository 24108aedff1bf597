"""`detr-jax train-detector --deformable`: the embedded Deformable DETR."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from detr_jax.commands import train_detector
from detr_jax.training.detector.train import RECIPES, DetectorTraining

NAME = "deformable-tiny"


@dataclass(frozen=True)
class Arguments(train_detector.Arguments):
    """Trains deformable-tiny on generated scenes, measures it and writes its model card.

    For example `detr-jax train-detector --deformable --out runs/train_deformable`; --resume goes on from the last
    checkpoint of one that was interrupted.
    """

    training: Annotated[DetectorTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=lambda: RECIPES[NAME])
    out: Path = Path("runs/train_deformable")
    """Folder for checkpoints, log, figure, detector and model card."""
    deformable: bool = False
    """Train deformable-tiny instead of detr-tiny."""


def main(arguments: Arguments) -> None:
    """Runs the command."""
    train_detector.train_and_measure(NAME, arguments)
