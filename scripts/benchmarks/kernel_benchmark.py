"""Rows of a benchmark of the sparse FFN: what is measured at one size of tiles and at one density."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from device_time import times
from ffn_baselines import FUSED, check, defined_ffn, error_of, fused_dense, random_weights, sparse_ffn
from random_gates import RandomGate, random_inputs

from detr_jax.kernels import ffn
from detr_jax.kernels.backend import FFNShape
from detr_jax.kernels.dispatch import BACKENDS, choose


@dataclass(frozen=True)
class Setting:
    """Rows that share their programs: they differ in a threshold.

    Attributes:
        tokens: of the input.
        correlation: of neighbours, see `random_inputs`.
        gate: says what tiles need.
    """

    tokens: int
    correlation: float | None
    gate: RandomGate

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "tokens": self.tokens,
            "tile_size": self.gate.tile_size,
            "correlation": self.correlation,
            "gate": self.gate.decides,
            "order": "signature" if self.gate.ordered else "given",
        }


class Measurer:
    """Measures the FFN of one size on the default device.

    Attributes:
        refusals: why each implementation cannot run here; None if it can.
        implementation: the one that is measured, which the device prefers.
        dense: names of the dense FFNs beside it.
    """

    def __init__(
        self,
        d_model: int,
        features: int,
        block_size: int,
        dtype: str,
        repeats: int,
        density_of: Literal["tiles", "tokens"],
    ):
        self.dtype, self.repeats, self.density_of = jnp.dtype(dtype), repeats, density_of
        self.blocks = features // block_size
        self.weights = random_weights(d_model, features, dtype)
        kernel = jax.random.normal(jax.random.key(1), (d_model, self.blocks)) / np.sqrt(d_model)
        self.kernel = kernel.astype(dtype)
        # No implementation refuses a size of tiles or a number of tokens.
        shape = FFNShape(self.dtype, 64, d_model, features, block_size, tokens=1)
        self.refusals = {backend.name: backend.unsupported_reason(shape) for backend in BACKENDS}
        self.implementation = choose(shape).backend.name
        self._dense = {"dense": jax.jit(lambda x, weights: ffn(x, *weights))}
        if self.refusals["mosaic_gpu"] is None:
            self._dense[FUSED] = jax.jit(fused_dense)
        self.dense = tuple(self._dense)

    def check(self, tile_sizes: Sequence[int]) -> dict[str, float]:
        """The largest error of everything that can run here, see `ffn_contestants.check`."""
        names = [name for name, reason in self.refusals.items() if reason is None]
        return check([*names, *self.dense[1:]], self.weights, self.blocks, tile_sizes)

    def rows(self, setting: Setting, densities: Sequence[float]) -> Iterator[Callable[[], dict[str, Any]]]:
        """Of each density what measures it; programs are compiled with the first."""
        names = {self.implementation: self.implementation, "auto": None}
        sparse = {name: jax.jit(sparse_ffn(setting.gate, implementation)) for name, implementation in names.items()}
        defined = jax.jit(defined_ffn(setting.gate))

        @cache
        def inputs():
            return random_inputs(setting.tokens, len(self.kernel), setting.correlation).astype(self.dtype)

        for density in densities:
            yield lambda density=density: self._row(setting, inputs(), density, sparse, defined)

    def _row(self, setting, x, density, sparse, defined):
        """Checks what is timed on what it is timed with, then times it."""
        threshold = setting.gate.threshold(x, self.kernel, density, self.density_of)
        gated = (x, self.weights, self.kernel, threshold)
        theirs, needed = defined(*gated)
        where = f"for {setting}, density {density}"
        errors = {name: error_of(name, run(*gated), theirs, where) for name, run in sparse.items()}
        baselines = {name: (run, (x, self.weights)) for name, run in self._dense.items()}
        baselines |= {name: (run, gated) for name, run in sparse.items()}
        measured = times(baselines, self.repeats)
        medians, host = (
            {name: statistics.median(seconds) for name, seconds in clock.items()}
            for clock in (measured.seconds, measured.host)
        )
        medians["auto"] = host["auto"]  # its switch is for the host's clock
        faster = {name: medians["dense"] / median for name, median in medians.items() if name not in ("dense", "auto")}
        features, d = self.weights.w_in.shape
        flops, moved = {}, {}
        for name in (*self.dense, self.implementation):
            dense = name in self.dense
            flops[name] = 4 * setting.tokens * d * features * (1 if dense else float(needed.mean()))
            # What any implementation must move: inputs, outputs, and the blocks that any tile needs.
            blocks = 1 if dense else float(needed.any(0).mean())
            moved[name] = self.dtype.itemsize * d * (2 * setting.tokens + 2 * features * blocks)
        return setting.describe() | {
            "asked": density,
            "gate_density": float((setting.gate.scores(x, self.kernel) >= threshold).mean()),
            "density": float(needed.mean()),
            "clock": measured.clock,
            "seconds": measured.seconds,
            "host_seconds": measured.host,
            "medians": medians,
            "faster_than_dense": faster | {"auto": host["dense"] / host["auto"]},
            "flops_per_second": {name: count / medians[name] for name, count in flops.items()},
            "bytes_per_second": {name: count / medians[name] for name, count in moved.items()},
            "errors": errors,
        }
