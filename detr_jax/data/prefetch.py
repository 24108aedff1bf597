"""Work while a device computes: batches are loaded by threads or processes, and dispatched one ahead."""

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import grain
from absl import flags

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
_MOST_PROCESSES = 16
_BATCHES_OF_PROCESS = 4  # in shared memory at once: one that is made, one that waits, and two that are computed
_WORTH_PROCESSES = 2000  # images from which on processes are started, which takes seconds for each


def prefetch(items: Sequence[Item], load: Callable[[Item], Loaded], processes: int) -> Iterator[Loaded]:
    """Pytrees of numpy arrays that `load` makes of each item, in their order, in processes or, of 0, in threads."""
    loaded = grain.MapDataset.source(items).map(load).to_iter_dataset(_READ_OPTIONS)
    if processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain looks for options that only absl's command lines have.
        loaded = loaded.mp_prefetch(grain.MultiprocessingOptions(processes), _end_with_parent)
    return iter(loaded)


def _end_with_parent(*_: int) -> None:
    """Ends a loading process whose parent was killed, which would keep the shared memory."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def processes_for(images: int, batch_bytes: int) -> int:
    """Number of loading processes: none where starting them takes longer than they save, or cores are few.

    `images` are loaded altogether; batches, the largest of `batch_bytes`, are handed over in shared memory, of which
    containers often have little.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores <= 4 or images < _WORTH_PROCESSES:
        return 0
    shared = Path("/dev/shm")
    fitting = shutil.disk_usage(shared).free // (_BATCHES_OF_PROCESS * batch_bytes) if shared.is_dir() else cores
    return min(cores // 2, _MOST_PROCESSES, fitting)


def dispatch_ahead(computed: Iterable[Item]) -> Iterator[Item]:
    """The same items, each once the next one has been asked for.

    JAX computes in the background, so the device has the next batch before anybody waits for this one.
    """
    computed = iter(computed)
    waiting = list(itertools.islice(computed, 1))
    for item in computed:
        waiting.append(item)
        yield waiting.pop(0)
    yield from waiting
