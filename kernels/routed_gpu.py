"""Narrow experts for Hopper GPUs, in Pallas.

Tokens are sorted by expert, and their rows gathered so that those of each expert begin at a multiple of 128. An item is
128 rows of one expert. There is one thread block per multiprocessor, and blocks take items in turn, those of the widest
experts first, so that small ones even out the end.

Each of the two warpgroups of a block computes 64 rows. An item goes through its expert's neurons in chunks of 64, whose
rows of both matrices the warpgroups share. These are copied two chunks ahead, also those of the next item, while the
outputs of this one are written. Hidden activations stay in registers: as the accumulator of the first product, and as
an operand of the second. No warpgroup is set aside for copying: see `hopper`.

Shapes depend on the number of tokens alone, and there is room for the items of any assignment, so that nothing
recompiles with the data and no expert can overflow. How many items there are is read at run time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from detr_jax.kernels import hopper
from detr_jax.kernels.backend import ExpertsShape
from detr_jax.kernels.experts import Experts, group_tokens, join_rows

CHUNK = 64
"""Neurons whose activations are computed at once. Experts are padded to whole chunks with rows of zeros."""
ROWS = 64
"""Rows of a warpgroup: those of an instruction of the matrix unit."""
GROUPS = 2
"""Warpgroups of a thread block."""
TILE = GROUPS * ROWS
"""Rows of an item."""
STAGES = 2
"""Chunks in shared memory at once: one in use, the next on its way."""
MULTIPROCESSORS = 132
"""Multiprocessors of an H100 or H200 with SXM, for which programs are compiled where there is no GPU."""


def unsupported_reason(shape: ExpertsShape) -> str | None:
    """Why this cannot compute some experts on the default device; None if it can."""
    return hopper.unsupported_device() or unsupported(shape)


def unsupported(shape: ExpertsShape) -> str | None:
    """Why this cannot compute some experts on any Hopper GPU; None if it can."""
    if not isinstance(shape.tokens, int):
        return "it needs a number of tokens, not a symbol"
    return hopper.unsupported_inputs(shape.dtype, shape.d_model)


def rows_computed(counts: jax.Array, tokens: int) -> jax.Array:
    """(C,) rows that experts with (C,) tokens of T in all compute: whole items."""
    return -(-counts // TILE) * TILE


def run(
    x: jax.Array, experts: Experts, assignment: jax.Array, *, blocks: int | None = None, interpret: Any = False
) -> jax.Array:
    """Narrow experts as `backend.RoutedFn`.

    Args:
        x: (T, d) bfloat16.
        experts: of the same type.
        assignment: (T,).
        blocks: thread blocks; None for one per multiprocessor.
        interpret: for tests on other devices, the `InterpretGPUParams` of the newest JAX.
    """
    count = len(experts.b_out)
    ids = jnp.minimum(assignment, count).astype(jnp.int32)
    # What is left of an expert without neurons, and 0 for no expert.
    constants = jnp.pad(experts.b_out, ((0, 1), (0, 0))).at[ids].get(mode="promise_in_bounds")
    if not any(experts.widths):
        return constants
    chunks = np.array([-(-width // CHUNK) for width in experts.widths] + [0], np.int32)
    items = _items(ids, chunks)
    rows = x.at[items.tokens.reshape(-1)].get(mode="promise_in_bounds")
    weights = join_rows(experts.w_in, CHUNK), join_rows(experts.b_in, CHUNK), join_rows(experts.w_out, CHUNK)
    lists = items.experts, items.first_chunks, items.chunks, items.ends
    outputs = _call(rows, weights, experts.b_out, lists, blocks or _multiprocessors(), interpret)
    outputs = outputs.at[items.rows].get(mode="promise_in_bounds")
    return jnp.where((jnp.asarray(chunks) > 0)[ids][:, None], outputs, constants)


class _Items(NamedTuple):
    """The work, in the order in which it is done; items behind the last end are not.

    Attributes:
        tokens: (n, TILE) the token of each row. Rows behind the last one of an expert are those of other tokens.
        experts: (n,) of each item.
        first_chunks: (n,) of the item's expert, counted over all experts.
        chunks: (n,) of the item's expert.
        ends: (W,) the items up to the last one of each expert that has neurons.
        rows: (T,) the row of each token, any for those whose expert has no neurons.
    """

    tokens: Int[Array, "n rows"]
    experts: Int[Array, " n"]
    first_chunks: Int[Array, " n"]
    chunks: Int[Array, " n"]
    ends: Int[Array, " W"]
    rows: Int[Array, " T"]


def _items(ids: jax.Array, chunks: np.ndarray) -> _Items:
    """Divides tokens into items, by their experts (T,) and the chunks of each expert, (C + 1,) with no expert last."""
    tokens, count = ids.shape[0], len(chunks) - 1
    widest_first = np.argsort(-chunks, kind="stable")[: np.count_nonzero(chunks)]
    ranks = np.full(count + 1, len(widest_first))
    ranks[widest_first] = np.arange(len(widest_first))

    groups = group_tokens(ids, count)
    starts = jnp.pad(groups.ends, (1, 0))[:-1]
    tiles = -(-(groups.ends - starts)[widest_first] // TILE)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    # What lies between the places of an expert's tokens in the order of groups and their rows.
    offsets = (ends - tiles) * TILE - starts[widest_first]
    # Barriers, because XLA would compute everything again for each element of a row that it gathers.
    ends, offsets = jax.lax.optimization_barrier((ends, offsets))

    # As many experts as possible have a tile that is not full.
    partly_full = min(len(widest_first), tokens)
    item = jnp.arange(partly_full + (tokens - partly_full) // TILE, dtype=jnp.int32)
    rank = jnp.minimum((item[:, None] >= ends).sum(1, dtype=jnp.int32), len(widest_first) - 1)
    places = (item * TILE - offsets[rank])[:, None] + jnp.arange(TILE, dtype=jnp.int32)
    of_rows = groups.order.at[jnp.clip(places, 0, tokens - 1)].get(mode="promise_in_bounds")

    place = jnp.arange(tokens, dtype=jnp.int32)
    place = jnp.zeros_like(place).at[groups.order].set(place, unique_indices=True, mode="promise_in_bounds")
    first_chunks = np.cumsum([0, *chunks[:-1]], dtype=np.int32)
    return _Items(
        jax.lax.optimization_barrier(of_rows),
        jnp.asarray(widest_first, jnp.int32)[rank],
        jnp.asarray(first_chunks[widest_first])[rank],
        jnp.asarray(chunks[widest_first])[rank],
        ends,
        place + jnp.append(offsets, 0)[ranks][ids],
    )


def _call(rows, weights, b_out, lists, blocks, interpret):
    from jax.experimental.pallas import mosaic_gpu as plgpu  # half a second: not where it does not run

    d = rows.shape[1]
    operand, swizzled = rows.dtype, hopper.swizzle()
    blocks = min(blocks, len(lists[0]))
    run = plgpu.kernel(
        partial(_kernel, blocks),
        out_type=jax.ShapeDtypeStruct(rows.shape, operand, manual_axis_type=jax.typeof(rows).manual_axis_type),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=GROUPS,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((GROUPS, ROWS, d), operand, transforms=swizzled),  # rows, in the end their outputs
            plgpu.SMEM((GROUPS, d), operand),  # b_out
            plgpu.SMEM((STAGES, CHUNK, d), operand, transforms=swizzled),  # rows of w_in
            plgpu.SMEM((STAGES, CHUNK), operand),  # b_in
            plgpu.SMEM((STAGES, CHUNK, d), operand, transforms=swizzled),  # rows of w_out
            # What has arrived: rows and b_out, w_in and b_in, w_out.
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
            # What both warpgroups have used: w_in and b_in, w_out.
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
            # Interpretation knows no operands in registers.
            *([plgpu.SMEM((GROUPS, ROWS, CHUNK), operand, transforms=swizzled)] if interpret else []),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return run(rows, *weights, b_out, *lists)


def _kernel(blocks, rows, w_in, b_in, w_out, b_out, experts, first_chunks, chunks, ends, out, *refs):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    item_rows, out_bias, chunk_in, chunk_bias, chunk_out, *others = refs
    rows_loaded, in_loaded, out_loaded, in_used, out_used, *hidden = others
    block, group = jax.lax.axis_index("block"), jax.lax.axis_index("group")
    turns = pl.cdiv(ends[ends.shape[0] - 1] - block, blocks)

    def neurons(chunk):
        return pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)

    def copy_in(chunk, stage):
        plgpu.copy_gmem_to_smem(w_in.at[neurons(chunk)], chunk_in.at[stage], in_loaded.at[stage])
        plgpu.copy_gmem_to_smem(b_in.at[neurons(chunk)], chunk_bias.at[stage], in_loaded.at[stage])

    def copy_out(chunk, stage):
        plgpu.copy_gmem_to_smem(w_out.at[neurons(chunk)], chunk_out.at[stage], out_loaded.at[stage])

    def chunks_of(turn):
        """The first chunk and the number of chunks of an item; of any item behind the last turn."""
        item = jnp.minimum(block + turn * blocks, chunks.shape[0] - 1)
        return first_chunks[item], chunks[item]

    def following(ahead):
        """The chunk that is computed after another, as (turn, chunk, chunks left of the item with this one)."""
        turn, chunk, left = ahead
        first, count = chunks_of(turn + 1)
        ends = left == 1
        return jnp.where(ends, turn + 1, turn), jnp.where(ends, first, chunk + 1), jnp.where(ends, count, left - 1)

    ahead = (jnp.int32(0), *chunks_of(0))  # the next chunk to be copied
    for stage in range(STAGES):

        @pl.when((group == 0) & (ahead[0] < turns))
        def _(chunk=ahead[1], stage=stage):
            copy_in(chunk, stage)
            copy_out(chunk, stage)

        ahead = following(ahead)

    def compute_item(turn, state):
        item = block + turn * blocks
        place = pl.ds(pl.multiple_of(item * TILE + group * ROWS, ROWS), ROWS)
        plgpu.copy_gmem_to_smem(rows.at[place], item_rows.at[group], rows_loaded.at[group])
        plgpu.copy_gmem_to_smem(b_out.at[experts[item]], out_bias.at[group], rows_loaded.at[group])
        plgpu.barrier_wait(rows_loaded.at[group])

        def add_chunks(total):
            def add_chunk(i, state):
                computed, halfway, ahead = state
                stage = computed % STAGES

                def first_product(sums):
                    plgpu.barrier_wait(in_loaded.at[stage])
                    plgpu.wgmma(sums, item_rows.at[group], hopper.transposed(chunk_in.at[stage]))

                    # While it is computed, the second matrix follows into the place of the chunk before this one.
                    @pl.when((group == 0) & (halfway >= 0))
                    def _():
                        before = (computed - 1) % STAGES
                        plgpu.barrier_wait(out_used.at[before])
                        copy_out(halfway, before)

                    return sums[...]

                h = pl.run_scoped(first_product, plgpu.ACC((ROWS, CHUNK), jnp.float32))
                h = jnp.maximum(h + hopper.along_rows(chunk_bias[stage], h.shape), 0).astype(rows.dtype)
                if hidden:
                    hidden[0][group] = h
                plgpu.commit_smem()
                # Only now: the bias, too, must have been read before a copy may overwrite it.
                plgpu.barrier_arrive(in_used.at[stage])
                plgpu.barrier_wait(out_loaded.at[stage])
                plgpu.wgmma(total, hidden[0].at[group] if hidden else h, chunk_out.at[stage])
                more = ahead[0] < turns

                @pl.when((group == 0) & more)
                def _():
                    plgpu.barrier_wait(in_used.at[stage])
                    copy_in(ahead[1], stage)

                halfway, ahead = jnp.where(more, ahead[1], -1), following(ahead)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(out_used.at[stage])
                return computed + 1, halfway, ahead

            state_after = jax.lax.fori_loop(0, chunks[item], add_chunk, state)
            return total[...], state_after

        y, state = pl.run_scoped(add_chunks, plgpu.ACC(item_rows.shape[1:], jnp.float32))
        item_rows[group] = (y + hopper.along_rows(out_bias[group], y.shape)).astype(rows.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(item_rows.at[group], out.at[place])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the place is free for the rows of the next item
        return state

    # Chunks computed, the chunk of which only the first matrix was copied, the next to be copied.
    jax.lax.fori_loop(0, turns, compute_item, (jnp.int32(0), jnp.int32(-1), ahead))
    plgpu.wait_smem_to_gmem(0)


def _multiprocessors() -> int:
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else MULTIPROCESSORS
