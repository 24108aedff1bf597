import getpass
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

# Tests mostly compile: workers, subprocesses and later runs share compiled programs, and few run for long enough to be
# worth optimising. JAX reads these variables when it is imported. `.ci/run` repeats what was measured with optimised
# programs, parity and the embedded detector, with such.
COMPILATION = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"detr-jax-tests-{getpass.getuser()}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's earlier code for loops compiles in a third of the time; later versions do not have it.
    COMPILATION["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
else:
    # A warpgroup of an interpreted GPU kernel holds a thread of XLA's pool while it waits for a barrier. With a thread
    # per core there may be none left for the warpgroup that it waits for.
    COMPILATION["NPROC"] = "8"
for name, value in COMPILATION.items():
    os.environ.setdefault(name, value)
if os.environ.get("JAX_PLATFORMS") == "cpu":
    # Kernels are compiled for TPUs in several processes at once; on a TPU one process at a time may have it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Parts of tests that import torch, which need not be installed; pytest would look for examples in them.
collect_ignore = ["torch_detectors.py", "golden/make_small.py"]

# Shapes in annotations are checked at every call in the tests.
jaxtyping.install_import_hook(["detr_jax.kernels", "detr_jax.models"], "shape_checks.check_shapes")
from fixtures_coco import mixed_shapes as mixed_shapes  # noqa: E402

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path += [str(SCRIPTS), str(SCRIPTS / "studies"), str(SCRIPTS / "benchmarks")]

# XLA maps every program that it compiles into memory, the larger ones in tens of maps. Linux allows a process 65,530
# (vm.max_map_count); XLA crashes where it needs one more.
MANY_MEMORY_MAPS = 40_000

# Accelerators and some CPUs multiply in less than float32 by default; the golden numbers do not.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, help="kills of runs in all in tests/test_kills.py")


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Programs of earlier tests are let go where there are many; what needs one of them takes it from the disk."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture
def unchecked_shapes():
    """Wrong shapes reach the code, whose own errors are tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
