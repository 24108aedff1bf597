"""Whether a checkpoint is what its preset says."""

import dataclasses

from detr_jax.errors import InputError
from detr_jax.models.detr.config import DetrConfig, config_to_json, preset_config

FINE_TUNED = ("labels", "queries", "shortest_side", "longest_side")
"""What training on other data may change."""


def check_preset(source: str, config: DetrConfig, preset: str | None) -> None:
    """Checks that a detector has the architecture of a preset.

    Raises:
        ValueError: if it has another architecture, or there is no such preset.
    """
    if preset is None:
        return
    wanted = preset_config(preset)
    config = dataclasses.replace(config, **{name: getattr(wanted, name) for name in FINE_TUNED})
    found, wanted = (config_to_json(c) for c in (config, wanted))
    found, wanted = ({**values.pop("backbone"), **values} for values in (found, wanted))
    if differing := [f"{name} is {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]:
        raise InputError(f"{source} is not a {preset}: {'; '.join(differing)}")
