"""What scripts/benchmarks/sparse_kernels.py is made of: its inputs, its clocks and its end."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import device_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deadline import OVERRUN
from ffn_baselines import check, defined_ffn, random_weights, sparse_ffn
from kernel_report import break_even
from random_gates import RandomGate, random_inputs
from sparse_kernels import merged


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_neighbours_correlate_as_asked(correlation):
    x = np.asarray(random_inputs(400, 64, correlation))
    for apart in (1, 3):
        measured = (x[apart:] * x[:-apart]).mean() / (x**2).mean()
        assert measured == pytest.approx(correlation**apart, abs=0.06)
    assert (x**2).mean() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        random_inputs(4, 4, 2.0)


def test_tiles_of_correlated_tokens_are_sparser_and_ordered_ones_too():
    kernel = jax.random.normal(jax.random.key(0), (64, 32))
    densities = {}
    for correlation in (0.0, 0.99):
        x = random_inputs(512, 64, correlation)
        for ordered in (False, True):
            gate = RandomGate(32, "token", ordered)
            threshold = gate.threshold(x, kernel, 0.1, "tokens")
            assert (gate.scores(x, kernel) >= threshold).mean() == pytest.approx(0.1, abs=1e-3)
            needed, order = gate.decide(x, kernel, threshold)
            densities[correlation, ordered] = float(needed.mean())
            assert (order is not None) == ordered
    assert densities[0.99, False] < 0.4 < 0.9 < densities[0.0, False]
    assert densities[0.0, True] < densities[0.0, False]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("decides", ["tile", "token"])
def test_a_threshold_gives_the_density_of_tiles(density, decides):
    x, kernel = random_inputs(50, 16, None), jax.random.normal(jax.random.key(0), (16, 8))
    gate = RandomGate(16, decides)
    needed, _ = gate.decide(x, kernel, gate.threshold(x, kernel, density, "tiles"))
    assert needed.shape == (4, 8) and needed.mean() == pytest.approx(density, abs=1 / 32)


def test_contestants_compute_what_is_defined():
    weights = random_weights(16, 64, "float32")
    assert max(check(["reference", "xla"], weights, 8, [16]).values()) < 1e-5
    x, kernel = random_inputs(50, 16, 0.9), jax.random.normal(jax.random.key(0), (16, 8))
    gate = RandomGate(8, "token", ordered=True)
    threshold = gate.threshold(x, kernel, 0.1, "tokens")
    theirs, _ = jax.jit(defined_ffn(gate))(x, weights, kernel, threshold)
    ours = jax.jit(sparse_ffn(gate, "xla"))(x, weights, kernel, threshold)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_wrong_implementation_is_refused(monkeypatch):
    def wrong(x, weights, needed, tile_size, implementation):
        return x.at[0].set(jnp.nan)

    monkeypatch.setattr("ffn_baselines.block_sparse_ffn", wrong)
    with pytest.raises(AssertionError, match="xla is wrong by nan where tiles of 8 of 25 tokens need"):
        check(["xla"], random_weights(16, 64, "float32"), 8, [8])


def test_break_even_is_below_the_first_density_that_is_slower():
    def row(tile_size, density, faster):
        return {"tile_size": tile_size, "tokens": 9, "density": density, "faster_than_dense": {"xla": faster}}

    rows = [row(4, 0.2, 3.0), row(4, 0.5, 1.1), row(4, 0.7, 0.9), row(4, 0.9, 1.2), row(2, 0.2, 0.5)]
    assert break_even(rows, "xla", {"block_size": 8}) == [
        {"tile_size": 2, "tokens": 9, "block_size": 8, "density": 0.0},
        {"tile_size": 4, "tokens": 9, "block_size": 8, "density": 0.5},
    ]


def test_break_even_densities_of_other_ffns_stay_in_the_file(tmp_path):
    path = tmp_path / "cpu.json"
    wide, narrow = {"block_size": 64}, {"block_size": 8}
    assert merged({"xla": [wide | {"density": 0.5}]}, path, wide) == {"xla": [wide | {"density": 0.5}]}
    path.write_text(json.dumps({"break_even": {"xla": [wide | {"density": 0.5}, narrow | {"density": 0.1}]}}))
    again = merged({"xla": [narrow | {"density": 0.2}]}, path, narrow)
    assert again == {"xla": [wide | {"density": 0.5}, narrow | {"density": 0.2}]}


class Profiler:
    """As `jax.experimental.mosaic.gpu.profiler`: milliseconds of each of several runs."""

    def __init__(self, milliseconds):
        self.milliseconds = milliseconds

    def measure(self, run, iterations):
        return lambda *operands: (run(*operands), self.milliseconds and [self.milliseconds] * iterations)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(device_time.jax, "default_backend", lambda: "gpu")

    def use(milliseconds):
        module = SimpleNamespace(profiler=Profiler(milliseconds))
        monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu", module)

    return use


def test_gpus_are_timed_by_their_own_clock(on_a_gpu):
    on_a_gpu(2.5)
    measured = device_time.times({"double": (lambda x: 2 * x, (jnp.ones(3),))}, 5)
    assert measured.clock == "device" and set(measured.seconds["double"]) == {0.0025}
    assert len(measured.seconds["double"]) == 6 and len(measured.host["double"]) == 5
    top = device_time.peaks("float32", 8, 64, 2)
    assert (top.flops_per_second, top.bytes_per_second) == pytest.approx((2 * 8**3 / 0.0025, 2 * 64 / 0.0025))


def test_without_the_devices_clock_times_are_the_hosts(on_a_gpu):
    on_a_gpu(None)
    with pytest.warns(UserWarning, match="times are the host's: CUPTI reports no kernel of double"):
        measured = device_time.times({"double": (lambda x: 2 * x, (jnp.ones(3),))}, 3)
    assert measured.clock == "host" and measured.seconds == measured.host


HANGING = """
import time
from deadline import Deadline
deadline = Deadline(0.5, lambda: print("so far", flush=True))
assert deadline.leaves(0.1) and not deadline.leaves(1)
time.sleep(60)
"""


def test_what_hangs_is_ended_and_says_how_far_it_came():
    folder = Path(device_time.__file__).parent
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=40, cwd=folder)
    assert (done.returncode, done.stdout) == (OVERRUN, "so far\n"), done.stderr
