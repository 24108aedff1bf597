"""Commands in processes of their own, with a number of devices each, alone or two of one job."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from commands import cpu_devices


def start(command: Sequence[object], out: Path, devices: int, **environment: object) -> subprocess.Popen:
    """Starts a Python script, with the end of its output in `out`; see `finish`."""
    variables = cpu_devices(devices) | {name: str(value) for name, value in environment.items()}
    out.mkdir(exist_ok=True)
    with (out / f"log-{environment.get('JAX_PROCESS_ID', 0)}.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], env=os.environ | variables, stdout=log, stderr=log
        )


def start_two(command: Sequence[object], out: Path, **environment: object) -> list[subprocess.Popen]:
    """Starts the two processes of a job with four devices each."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    job = environment | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": 2}
    return [start(command, out, 4, **job, JAX_PROCESS_ID=index) for index in range(2)]


def finish(out: Path, *processes: subprocess.Popen) -> Path:
    for process in processes:
        assert process.wait(600) == 0, "\n".join(log.read_text()[-3000:] for log in out.glob("log-*.txt"))
    return out


def kill_after_checkpoint(processes: Sequence[subprocess.Popen], checkpoints: Path) -> int:
    """Kills processes, the last one first, once there is a checkpoint; returns the step of the latest one."""

    def steps() -> list[int]:
        return [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]

    deadline = time.monotonic() + 300
    while not steps():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.005)
    for process in reversed(processes):
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * len(processes)
    return max(steps())
