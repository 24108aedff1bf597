"""`detr-jax convert`: a published checkpoint as one safetensors file."""

from dataclasses import dataclass
from pathlib import Path

import tyro

import detr_jax
from detr_jax.files import refuse_existing
from detr_jax.models.parameters import named_parameters


@dataclass(frozen=True)
class Arguments:
    """Converts a DETR checkpoint to the safetensors format of detr-jax, which loads without torch or a config.json.

    Reads official .pth files (with the torch extra), Hugging Face's DETR in safetensors (file or folder), hub ids, and
    the presets' names.
    """

    source: tyro.conf.Positional[str]
    """File, folder, hub id, or preset."""
    target: tyro.conf.Positional[Path]
    """File to write, for example detr-r50.safetensors."""
    preset: str | None = None
    """Preset whose architecture the checkpoint has; needed where the file cannot tell DC5 from stride 32."""
    overwrite: bool = False
    """Replace the target if it exists."""


def main(arguments: Arguments) -> None:
    """Runs the command."""
    refuse_existing(arguments.target, arguments.overwrite)
    model = detr_jax.load(arguments.source, arguments.preset)
    config = model.config
    parameters = sum(array.size for array in named_parameters(model).values())
    print(
        f"read {arguments.source}: ResNet {config.backbone.depths} of stride {config.backbone.stride}, "
        f"{config.encoder_layers} encoder and {config.decoder_layers} decoder layers, {config.queries} queries, "
        f"{config.classes} classes, {parameters / 1e6:.1f} M parameters"
    )
    detr_jax.save(model, arguments.target)
    size = arguments.target.stat().st_size
    print(f"wrote {arguments.target}: {size / 1e6:.1f} MB, fingerprint {detr_jax.fingerprint(model)}")
