import sys
from pathlib import Path

import jax

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path += [str(SCRIPTS), str(SCRIPTS / "studies"), str(SCRIPTS / "benchmarks")]

# Accelerators and some CPUs multiply in less than float32 by default; the golden numbers do not.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, help="kills of runs in all in tests/test_kills.py")
