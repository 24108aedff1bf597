"""Times of things that take turns, so that whatever else the machine does slows all of them."""

import time
from collections.abc import Callable
from typing import Any


def interleaved_times(baselines: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, by name; every turn begins with another one, and two turns before them warm up."""
    names = list(baselines)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            baselines[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds
