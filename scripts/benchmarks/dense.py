"""Measures the time of a dense forward pass, beside transformers' DETR on torch in the same run."""

import importlib.metadata
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.commands import cli
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, write_json
from detr_jax.models import DETR, PRESETS, DetrConfig, preset_config
from detr_jax.models.positions import sine_positions
from detr_jax.search.timing import interleaved_times

Forward = Callable[[], Any]


@dataclass(frozen=True)
class Arguments:
    """Measures the dense forward pass of a randomly initialised detector, beside transformers' DETR on torch.

    The two take turns, so that whatever else the machine does slows both; medians are compared. Without torch and
    transformers, or where they cannot do the same, ours is measured alone.

    For example `python scripts/benchmarks/dense.py --preset detr-r101 --repeats 5 --out runs/benchmark-r101.json`.
    """

    preset: Literal[tuple(PRESETS)] = "detr-r50"
    """Architecture."""
    height: int = 800
    """Of the images, in pixels."""
    width: int = 1066
    """Of the images, in pixels."""
    batch_size: int = 1
    """Images in a forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation."""
    repeats: int = 10
    """Measured turns, after two that warm up."""
    out: Path = Path("runs/benchmark.json")
    """JSON file for the times, the ratio, the memory, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def our_forwards(config: DetrConfig, arguments: Arguments) -> tuple[dict[str, Forward], dict[str, int]]:
    """The forward passes of our model and its parts, and the bytes the whole one needs."""
    dtype = jnp.dtype(arguments.dtype)
    graph, state = nnx.split(DETR(config, dtype=dtype, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (arguments.batch_size, arguments.height, arguments.width, 3))

    def backbone(state, images):
        return nnx.merge(graph, state).backbone(images.astype(dtype))

    def transformer(state, features):
        model = nnx.merge(graph, state)
        mask = jnp.ones(features.shape[:3], bool)
        positions = sine_positions(mask, config.d_model).astype(dtype)
        flat = (features.shape[0], -1)
        x = model.input_projection(features).reshape(*flat, config.d_model)
        positions, tokens = positions.reshape(*flat, config.d_model), mask.reshape(flat)
        run, _ = model.ffn_runner(None, valid=tokens.any(1), trace=False)
        memory = model.transformer.encode(x, positions, tokens, run)
        return model.transformer.decode(memory, positions, tokens, run)[-1]

    whole = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).lower(state, images).compile()
    backbone, transformer = jax.jit(backbone), jax.jit(transformer)
    features = backbone(state, images)
    memory = whole.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
    }
    return {
        "ours": lambda: jax.block_until_ready(whole(state, images)),
        "ours, backbone": lambda: jax.block_until_ready(backbone(state, images)),
        "ours, transformer": lambda: jax.block_until_ready(transformer(state, features)),
    }, sizes | {"peak": sum(sizes.values())}


def torch_forwards(config: DetrConfig, arguments: Arguments) -> tuple[dict[str, Forward], int]:
    """The forward passes of transformers' model and its backbone, and torch's number of threads.

    Raises:
        ImportError: if torch or transformers is not installed.
        ValueError: if they cannot do the same as our model.
    """
    if config.backbone.dilate_last:
        raise InputError("transformers' ResNet has no dilated stage")
    if jax.default_backend() != "cpu":
        raise InputError(f"torch would run on the CPU and JAX on {jax.default_backend()}")
    import torch
    from transformers import DetrConfig as TorchConfig
    from transformers import DetrForObjectDetection, ResNetConfig

    resnet = ResNetConfig(
        embedding_size=config.backbone.stem_width,
        hidden_sizes=[4 * width for width in config.backbone.widths],
        depths=list(config.backbone.depths),
        out_features=[f"stage{len(config.backbone.depths)}"],
    )
    layers = TorchConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=resnet,
        num_labels=config.classes,
        num_queries=config.queries,
        d_model=config.d_model,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=config.encoder_heads,
        decoder_attention_heads=config.decoder_heads,
        encoder_ffn_dim=config.encoder_ffn_dim,
        decoder_ffn_dim=config.decoder_ffn_dim,
    )
    dtype = getattr(torch, arguments.dtype)
    model = DetrForObjectDetection(layers).eval().to(dtype)
    shape = (arguments.batch_size, arguments.height, arguments.width)
    images = torch.randn(shape[0], 3, *shape[1:], dtype=dtype)
    mask = torch.ones(shape, dtype=torch.bool)

    @torch.inference_mode()
    def whole():
        return model(pixel_values=images, pixel_mask=mask)

    @torch.inference_mode()
    def backbone():
        return model.model.backbone(images, mask)

    return {"torch": whole, "torch, backbone": backbone}, torch.get_num_threads()


def table(medians: dict[str, float], seconds: dict[str, list[float]], sizes: dict[str, int]) -> str:
    """Median, fastest and slowest turn of each, one a line; then the ratios and the memory."""
    rows = [f"{'seconds':<20}{'median':>9}{'min':>9}{'max':>9}"]
    rows += [f"{name:<20}{medians[name]:9.3f}{min(s):9.3f}{max(s):9.3f}" for name, s in seconds.items()]
    rows += [f"{name:<24}{ratio:5.2f}" for name, ratio in ratios(medians).items()]
    return "\n".join([*rows, f"{'peak memory of ours':<20}{sizes['peak'] / 2**20:9.0f} MiB"])


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """Our medians over torch's, where both were measured."""
    pairs = (("ours", "torch"), ("ours, backbone", "torch, backbone"))
    return {f"{ours} / {theirs}": medians[ours] / medians[theirs] for ours, theirs in pairs if theirs in medians}


def benchmark(arguments: Arguments) -> None:
    if arguments.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {arguments.repeats}")
    refuse_existing(arguments.out, arguments.overwrite)
    config = preset_config(arguments.preset)
    forwards, sizes = our_forwards(config, arguments)
    threads, versions = {"cpus": os.cpu_count()}, {}
    try:
        theirs, threads["torch"] = torch_forwards(config, arguments)
        forwards |= theirs
        versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    except (ImportError, ValueError) as reason:
        print(f"measuring ours alone: {reason}")

    seconds = interleaved_times(forwards, arguments.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    report = {
        "seconds": seconds,
        "medians": medians,
        "ratios": ratios(medians),
        "bytes": sizes,
        "threads": threads,
    } | cli.provenance(arguments)
    report["versions"] |= versions
    write_json(arguments.out, report)
    print(table(medians, seconds, sizes))


if __name__ == "__main__":
    cli.run(benchmark, Arguments)
