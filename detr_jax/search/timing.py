"""Run times measured in turns, so that a load on the machine slows all alternatives alike."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from detr_jax.models import FFNTrace, FFNWeights, Selection, Selector
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
def _run(weights: FFNWeights, x: jax.Array, tokens: jax.Array, selector: Selector | None) -> jax.Array:
    return forward(weights, x, Selection() if selector is None else selector(weights, x, tokens))


def measure_times(
    weights: FFNWeights,
    trace: FFNTrace,
    selectors: Sequence[Selector | None],
    permutations: Sequence[np.ndarray],
    repeats: int,
) -> list[float]:
    """Run times of one FFN with each of several selectors, the selectors' own work included.

    Args:
        weights: of the FFN.
        trace: its inputs, of a batch of images.
        selectors: None for the dense FFN.
        permutations: (F,) of the FFN's neurons, for each selector.
        repeats: measured turns, in each of which all of them run once.

    Returns:
        median seconds, in the order of the selectors.
    """
    calls = {}
    for index, (selector, permutation) in enumerate(zip(selectors, permutations, strict=True)):
        permuted = jax.device_put(permute(weights, permutation))
        calls[index] = partial(_wait, permuted, trace.inputs, trace.tokens, selector)
    seconds = interleaved_times(calls, repeats)
    return [statistics.median(seconds[index]) for index in calls]


def _wait(*operands) -> None:
    jax.block_until_ready(_run(*operands))
