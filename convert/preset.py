"""Whether a checkpoint is what its preset says."""

import dataclasses
from typing import Any

from detr_jax.errors import InputError
from detr_jax.models import DetrConfig, preset_config

FINE_TUNED = ("labels", "queries", "preprocessing")
"""What training on other data may change."""


def check_preset(source: str, config: Any, preset: str | None) -> None:
    """Checks that a detector has the architecture of a preset.

    Raises:
        InputError: if it has another architecture, or there is no such preset.
    """
    if preset is None:
        return
    wanted = preset_config(preset)
    if not isinstance(config, DetrConfig):
        raise InputError(f"{source} is not a {preset}: it is a {type(config).__name__}")
    found, wanted = (dataclasses.asdict(c) for c in (config, wanted))
    found, wanted = ({**values.pop("backbone"), **values} for values in (found, wanted))
    names = [name for name in wanted if name not in FINE_TUNED and found[name] != wanted[name]]
    if differing := [f"{name} is {found[name]}, not {wanted[name]}" for name in names]:
        raise InputError(f"{source} is not a {preset}: {'; '.join(differing)}")
