"""Work that is done while a device computes: batches are loaded by threads or processes, and computed one ahead."""

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import grain
from absl import flags

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
_MOST_PROCESSES = 16
_BATCHES_OF_PROCESS = 4
"""At most in shared memory at once: one that is made, one that waits, and two that are computed."""
_WORTH_PROCESSES = 2000
"""Images from which on processes are started, which takes seconds for each."""


def prefetch(items: Sequence[Item], load: Callable[[Item], Loaded], processes: int) -> Iterator[Loaded]:
    """What `load` makes of each item, in their order.

    Args:
        items: what to load.
        load: makes a pytree of numpy arrays.
        processes: that call it; 0 for threads of this one.
    """
    loaded = grain.MapDataset.source(items).map(load).to_iter_dataset(_READ_OPTIONS)
    if processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain looks for options that only absl's command lines have.
        loaded = loaded.mp_prefetch(grain.MultiprocessingOptions(processes), _end_with_parent)
    return iter(loaded)


def _end_with_parent(*_: int) -> None:
    """In a process that loads: without this, it would outlive a parent that was killed, and keep the shared memory."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def processes_for(images: int, batch_bytes: int) -> int:
    """Processes that load: none where starting them takes longer than they save, or cores are few.

    Args:
        images: that are loaded altogether.
        batch_bytes: of the largest batch. Processes hand batches over in shared memory, of which containers often have
            little.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores <= 4 or images < _WORTH_PROCESSES:
        return 0
    shared = Path("/dev/shm")
    fitting = shutil.disk_usage(shared).free // (_BATCHES_OF_PROCESS * batch_bytes) if shared.is_dir() else cores
    return min(cores // 2, _MOST_PROCESSES, fitting)


def dispatch_ahead(computed: Iterable[Item]) -> Iterator[Item]:
    """The same items, each once the next one has been asked for.

    What JAX computes it computes in the background: so the device has the next batch before anybody waits for this one.
    """
    waiting: deque[Item] = deque()
    for item in computed:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.popleft()
    yield from waiting
