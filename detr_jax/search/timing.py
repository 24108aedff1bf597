"""Run times measured in turns, so that a load on the machine slows all alternatives alike."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from detr_jax.models import Detector, FFNTrace, FFNWeights, Selection, Selector, Selectors
from detr_jax.models.ffn import forward, permute


def interleaved_times(baselines: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, by name, after two turns that warm up.

    Every turn has an order of its own: what follows a call that leaves nothing in the caches takes up to a sixth
    longer, so that none may always follow the same one.
    """
    names = list(baselines)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, repeats):
        for name in random.Random(turn).sample(names, len(names)):
            started = time.perf_counter()
            baselines[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@jax.jit
def detector_outputs(model: Detector, pixel_values: jax.Array, pixel_mask: jax.Array, selectors: Selectors) -> Any:
    """The whole detector, compiled; arguments as of `Detector.__call__`."""
    return model(pixel_values, pixel_mask, selectors=selectors)


@jax.jit
def _run(weights: FFNWeights, x: jax.Array, tokens: jax.Array, selector: Selector | None) -> jax.Array:
    return forward(weights, x, Selection() if selector is None else selector(weights, x, tokens))


Way = tuple[Selector | None, np.ndarray]
"""A selector, None for the dense FFN, and the order (F,) of the neurons that it belongs to."""


def measure_times(weights: FFNWeights, trace: FFNTrace, ways: Sequence[Way], repeats: int) -> list[float]:
    """Run times of one FFN computed in several ways, the selectors' own work included.

    Args:
        weights: of the FFN.
        trace: its inputs, of a batch of images.
        ways: to compute it.
        repeats: measured turns, in each of which all of them run once.

    Returns:
        median seconds, in the order of the ways.
    """

    def call(selector: Selector | None, order: np.ndarray) -> Callable[[], Any]:
        permuted = jax.device_put(permute(weights, order))
        return lambda: jax.block_until_ready(_run(permuted, trace.inputs, trace.tokens, selector))

    calls = {str(i): call(*way) for i, way in enumerate(ways)}
    return [statistics.median(seconds) for seconds in interleaved_times(calls, repeats).values()]
