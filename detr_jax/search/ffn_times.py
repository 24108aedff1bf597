"""How long the ways to compute one FFN take on this device, on real inputs."""

import statistics
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from detr_jax.calibration.permutation import permute
from detr_jax.models import FFNTrace, FFNWeights, Selection, Selector
from detr_jax.models.ffn import forward
from detr_jax.search.timing import interleaved_times


@jax.jit
def _run(weights: FFNWeights, x: jax.Array, tokens: jax.Array, selector: Selector | None) -> jax.Array:
    return forward(weights, x, Selection() if selector is None else selector(weights, x, tokens))


def measure_times(
    weights: FFNWeights, trace: FFNTrace, selectors: Sequence[Selector | None], orders: Sequence[np.ndarray], turns: int
) -> list[float]:
    """Times of one FFN with each of several selectors, the selectors' own work included.

    Args:
        weights: of the FFN.
        trace: its inputs, of a batch of images.
        selectors: None for the dense FFN.
        orders: (F,) of the FFN's neurons, for each selector.
        turns: measured turns, in each of which all of them run once.

    Returns:
        median seconds, in the order of the selectors.
    """
    calls = {}
    for index, (selector, order) in enumerate(zip(selectors, orders, strict=True)):
        ordered = jax.device_put(permute(weights, order))
        calls[index] = partial(_wait, ordered, trace.inputs, trace.tokens, selector)
    seconds = interleaved_times(calls, turns)
    return [statistics.median(seconds[index]) for index in calls]


def _wait(*operands) -> None:
    jax.block_until_ready(_run(*operands))
