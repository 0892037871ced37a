"""ragged_prefill for Hopper in Pallas Mosaic GPU.

After Shah et al., "FlashAttention-3" (2024): of three warpgroups one only fetches and two compute, taking turns at the
tensor cores, so that one's softmax runs beside the other's products. A job is one tile, up to 128 queries that lie one
after the other in the flat q and belong to one row, for one query head. Every page of the row is one TMA copy. There is
a block for each multiprocessor, and it does one job after the other: the next one's first keys and queries arrive while
the last one's output leaves.

What is particular to ragged and paged input:
- A tile starts at a multiple of 8 tokens, as TMA wants it, so a row's first tile may begin with another row's queries
  and its last end with them. They are computed like the others, and not stored.
- Tokens that no row owns make up two more rows, which have no keys. Their output comes out as zeros.
- Values past a row's end may be NaN, which a weight of zero does not silence: the fetching warpgroup replaces them.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.mosaic import pl, plgpu

_ROWS = 64  # queries of a warpgroup: what wgmma takes
_TILE = 2 * _ROWS
_ALIGN = 8  # rows of a swizzled tile of shared memory
_SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True)
class Config:
    """What can be tuned.

    Attributes:
      block_kv: keys of a step.
      stages: steps whose keys and values are in shared memory at once.
      take_turns: whether the warpgroups that compute hand the tensor cores to each other.
      heavy_first: whether tiles run in the order of their numbers of keys, most first.
      blocks: among how many the jobs are divided; None for as many as multiprocessors.
    """

    block_kv: int = 128
    stages: int = 2
    take_turns: bool = True
    heavy_first: bool = True
    blocks: int | None = None


class _Sizes(NamedTuple):
    """Static sizes of a call; `interpret`: for a CPU."""

    T: int
    N: int
    K: int
    H: int
    P: int
    W: int
    page_size: int
    dtype: jnp.dtype
    scale: float
    config: Config
    blocks: int
    interpret: bool


class _Tiles(NamedTuple):
    """M tiles, each i32[M].

    rows    the tile's row of the page table
    first   its first token, a multiple of 8
    lo, hi  the tokens in it that belong to the row: lo <= token < hi; an empty tile has lo == hi
    offset  what to add to a token for its position in the sequence
    kv_len  the row's
    """

    rows: jax.Array
    first: jax.Array
    lo: jax.Array
    hi: jax.Array
    offset: jax.Array
    kv_len: jax.Array


def cut_into_tiles(query_starts, kv_lens, num_tokens, heavy_first) -> tuple[_Tiles, jax.Array]:
    """The tiles of S rows and of the tokens before and after these; and how many are not empty, the first ones."""
    zero, end = jnp.zeros(1, jnp.int32), jnp.full(1, num_tokens, jnp.int32)
    starts = jnp.concatenate([zero, query_starts.astype(jnp.int32), end])
    begin, stop = starts[:-1], starts[1:]
    num_rows = begin.shape[0]
    # A row's first query is at position kv_len - count. Without keys: so far below zero that no query sees any.
    kv_len = jnp.concatenate([zero, kv_lens.astype(jnp.int32), zero])
    offset = jnp.where(kv_len > 0, kv_len - stop, -num_tokens)
    aligned = begin - begin % _ALIGN
    count = jnp.where(begin < stop, (stop - aligned + _TILE - 1) // _TILE, 0)
    ends = jnp.sum(jnp.where(jnp.tri(num_rows, dtype=bool), count, 0), axis=1)

    index = jnp.arange((num_tokens + num_rows * (_TILE + _ALIGN - 2)) // _TILE, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(index[:, None] >= ends, axis=1), num_rows - 1)
    exists = index < ends[-1]
    first = aligned[row] + (index - (ends - count)[row]) * _TILE
    lo, hi = jnp.maximum(first, begin[row]), jnp.minimum(first + _TILE, stop[row])
    tiles = _Tiles(
        rows=jnp.clip(row - 1, 0, num_rows - 3),
        first=jnp.where(exists, first, 0),
        lo=jnp.where(exists, lo, 0),
        hi=jnp.where(exists, hi, 0),
        offset=offset[row],
        kv_len=kv_len[row],
    )
    return _heaviest_first(tiles, exists) if heavy_first else tiles, ends[-1]


def _heaviest_first(tiles, exists):
    keys = jnp.where(exists, jnp.maximum(tiles.hi + tiles.offset, 0), -1)
    index = jnp.arange(keys.shape[0])
    before = (keys[:, None] < keys) | ((keys[:, None] == keys) & (index[:, None] > index))
    rank = jnp.sum(before, axis=1)  # counted, not sorted: a sort is a dozen kernels
    order = jnp.sum(jnp.where(rank == index[:, None], index, 0), axis=1)
    return _Tiles(*(x[order] for x in tiles))


class _Tile(NamedTuple):
    """One tile's numbers, scalars in a block. `steps`: how many times block_kv keys it needs."""

    row: jax.Array
    first: jax.Array
    lo: jax.Array
    hi: jax.Array
    offset: jax.Array
    kv_len: jax.Array

    def part(self, warpgroup):
        """The tokens lo <= token < hi of a warpgroup's 64 that belong to the row; lo >= hi if none does."""
        first = self.first + warpgroup * _ROWS
        return jnp.maximum(self.lo, first), jnp.minimum(self.hi, first + _ROWS)

    def steps(self, block_kv):
        return lax.div(jnp.maximum(self.hi + self.offset, 0) + (block_kv - 1), jnp.int32(block_kv))


class _Shared(NamedTuple):
    """Shared memory of a block; the first index is the warpgroup or the slot. `out` may be where `q` is."""

    q: object
    out: object
    k: object
    v: object
    weights: object | None  # interpret mode alone
    q_ready: object
    k_ready: object
    v_ready: object
    v_fetched: object  # instead of v_ready, when there is something to replace first
    k_used: object
    v_used: object
    turn: object


class _Jobs:
    """What a block has to do: in rounds of one job a block, from the first block to the last and back again."""

    def __init__(self, sizes, tiles_ref, count_ref):
        self.tiles_ref, self.sizes = tiles_ref, sizes
        self.total = count_ref[0] * sizes.N
        whole_rounds = lax.div(self.total, jnp.int32(sizes.blocks))
        self.count = whole_rounds + jnp.where(self._index(whole_rounds) < self.total, 1, 0)

    def _index(self, i):
        block, blocks = lax.axis_index("block"), self.sizes.blocks
        return i * blocks + jnp.where(lax.rem(i, jnp.int32(2)) == 0, block, blocks - 1 - block)

    def __getitem__(self, i):
        """Job i's tile and head; the last one's again past the end."""
        index = jnp.minimum(self._index(i), self.total - 1)
        # The heads of a tile run together: they share keys and values.
        tile, head = lax.div(index, jnp.int32(self.sizes.N)), lax.rem(index, jnp.int32(self.sizes.N))
        return _Tile(*(self.tiles_ref[tile, i] for i in range(len(_Tile._fields)))), head


def _kernel(sizes: _Sizes, tiles_ref, count_ref, table_ref, q_ref, k_ref, v_ref, out_ref, *scratch):
    q_and_out, *scratch = scratch
    shared = _Shared(*q_and_out, *scratch)
    warpgroup = lax.axis_index("warpgroup")
    jobs = _Jobs(sizes, tiles_ref, count_ref)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _compute(sizes, jobs, warpgroup, q_ref, out_ref, shared)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _fetch(sizes, jobs, table_ref, k_ref, v_ref, shared)


def _slot(sizes, step):
    return lax.rem(step, jnp.int32(sizes.config.stages))


def _fetch(sizes, jobs, table_ref, k_ref, v_ref, shared):
    """Brings the pages of the jobs' rows, step by step, as slots become free."""

    def fetch_job(i, done):
        tile, head = jobs[i]
        kv_head = lax.div(head, jnp.int32(sizes.N // sizes.K))
        fetch = functools.partial(_fetch_step, sizes, tile, kv_head, done, table_ref, k_ref, v_ref, shared)
        steps = tile.steps(sizes.config.block_kv)
        has_tail = steps * sizes.config.block_kv > tile.kv_len
        lax.fori_loop(0, steps - jnp.where(has_tail, 1, 0), lambda step, _: fetch(step, False), None)
        pl.when(has_tail & (steps > 0))(lambda: fetch(steps - 1, True))
        return done + steps

    # Nothing is left unobserved.
    def drain(step, _):
        slot = _slot(sizes, step)
        plgpu.barrier_wait(shared.k_used.at[slot])
        plgpu.barrier_wait(shared.v_used.at[slot])

    done = lax.fori_loop(0, jobs.count, fetch_job, jnp.int32(0))
    lax.fori_loop(jnp.maximum(done - sizes.config.stages, 0), done, drain, None)


def _fetch_step(sizes, tile, kv_head, done, table_ref, k_ref, v_ref, shared, step, has_tail):
    """Brings block_kv keys and values, `done` steps of other jobs before. A tail, past the row's end, becomes zeros."""
    block_kv = sizes.config.block_kv
    pages = block_kv // sizes.page_size
    slot = _slot(sizes, done + step)
    # Read before the wait. Clipped: entries past the row's end may hold anything, and there may be none.
    entries = [jnp.minimum(step * pages + i, sizes.W - 1) for i in range(pages)]
    ids = [jnp.clip(table_ref[tile.row, entry], 0, sizes.P - 1) for entry in entries]

    def copy(source, target, used, ready):
        @pl.when(done + step >= sizes.config.stages)
        def _():
            plgpu.barrier_wait(used.at[slot])

        for i, page in enumerate(ids):
            rows = pl.ds(i * sizes.page_size, sizes.page_size)
            plgpu.copy_gmem_to_smem(source.at[page, kv_head], target.at[slot, rows], ready)

    copy(k_ref, shared.k, shared.k_used, shared.k_ready.at[slot])
    if not has_tail:
        copy(v_ref, shared.v, shared.v_used, shared.v_ready.at[slot])
        return
    copy(v_ref, shared.v, shared.v_used, shared.v_fetched)
    plgpu.barrier_wait(shared.v_fetched)
    _zero_rows(shared.v.at[slot], tile.kv_len - step * block_kv, block_kv, sizes.H)
    plgpu.commit_smem()
    for _ in range(pages):
        plgpu.barrier_arrive(shared.v_ready.at[slot])


def _zero_rows(ref, start, num_rows, H):
    """Zeros rows `start` and after of ref [num_rows, H], in pieces: the fetching warpgroup has few registers."""
    columns = _swizzle(H) // 2
    for row in range(0, num_rows, _ROWS):

        @pl.when(start < row + _ROWS)
        def _(row=row):
            for column in range(0, H, columns):
                piece = ref.at[pl.ds(row, _ROWS), pl.ds(column, columns)]
                ids = plgpu.broadcasted_iota(jnp.int32, (_ROWS, columns), 0, layout=plgpu.Layout.WGMMA)
                values = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                piece[...] = jnp.where(ids + row < start, values, jnp.zeros_like(values))


def _compute(sizes, jobs, warpgroup, q_ref, out_ref, shared):
    """Attention of 64 queries of every job's tile, and its output."""
    q_smem, q_ready = shared.q.at[warpgroup], shared.q_ready.at[warpgroup]

    def fetch_queries(i, tile, head):
        @pl.when(i < jobs.count)
        def _():
            first = pl.multiple_of(tile.first + warpgroup * _ROWS, _ALIGN)
            plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(first, _ROWS), head], q_smem, q_ready)

    def compute_job(i, state):
        done, tile, head = state
        next_job = jobs[i + 1]
        plgpu.barrier_wait(q_ready)
        out = _attend(sizes, tile, done, warpgroup, shared)
        if not _out_in_place(sizes):
            fetch_queries(i + 1, *next_job)
        _store(out.astype(out_ref.dtype), tile, head, warpgroup, out_ref, shared)
        if _out_in_place(sizes):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fetch_queries(i + 1, *next_job)
        return done + tile.steps(sizes.config.block_kv), *next_job

    first_job = jobs[0]
    fetch_queries(0, *first_job)
    lax.fori_loop(0, jobs.count, compute_job, (jnp.int32(0), *first_job))
    plgpu.wait_smem_to_gmem(0)


def _attend(sizes, tile, done, warpgroup, shared):
    """float32 [64, H], the output of the warpgroup's queries; `done`: the steps of jobs before."""
    block_kv = sizes.config.block_kv
    first = tile.first + warpgroup * _ROWS
    lo, hi = tile.part(warpgroup)
    # Steps whose every key is seen by every query; all that some query sees; the other warpgroup's as well.
    keys = jnp.where(lo < hi, jnp.maximum(hi + tile.offset, 0), 0)
    mine = lax.div(keys + (block_kv - 1), jnp.int32(block_kv))
    full = jnp.minimum(lax.div(jnp.maximum(lo + tile.offset + 1, 0), jnp.int32(block_kv)), mine)
    steps = tile.steps(block_kv)

    row_layout = plgpu.Layout.WGMMA.reduce(1)
    state = (
        plgpu.layout_cast(jnp.zeros((_ROWS, sizes.H), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), row_layout),
        plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), row_layout),
    )
    turns = _Turns(shared.turn, sizes.config.take_turns)
    step = functools.partial(_step, sizes, first + tile.offset, done, mine, warpgroup, shared, turns)

    @pl.when(mine > 0)
    def _():
        plgpu.barrier_wait(shared.k_ready.at[_slot(sizes, done)])

    pl.when(warpgroup == 1)(turns.swap)
    state = lax.fori_loop(0, full, functools.partial(step, masked=False), state)
    acc, _, total = lax.fori_loop(full, mine, functools.partial(step, masked=True), state)
    lax.fori_loop(mine, steps, functools.partial(_skip, sizes, done, shared, turns), None)
    pl.when(warpgroup == 0)(turns.swap)
    return acc * lax.broadcast_in_dim(1 / jnp.maximum(total, 1e-30), acc.shape, [0])


class _Turns(NamedTuple):
    """The tensor cores' right of way. The barrier takes two arrivals: one of each warpgroup."""

    barrier: object
    enabled: bool

    def swap(self):
        self.done()
        self.wait()

    def done(self):
        if self.enabled:
            plgpu.barrier_arrive(self.barrier)

    def wait(self):
        if self.enabled:
            plgpu.barrier_wait(self.barrier)


def _skip(sizes, done, shared, turns, step, _):
    """A step that is the other warpgroup's alone."""
    slot = _slot(sizes, done + step)
    plgpu.barrier_wait(shared.k_ready.at[slot])
    plgpu.barrier_arrive(shared.k_used.at[slot])
    turns.swap()
    plgpu.barrier_wait(shared.v_ready.at[slot])
    plgpu.barrier_arrive(shared.v_used.at[slot])
    turns.swap()


def _step(sizes, first_position, done, steps, warpgroup, shared, turns, step, state, *, masked):
    """Online softmax over block_kv keys. The step's keys are there when it begins, and the next step's when it ends."""
    acc, top, total = state
    block_kv = sizes.config.block_kv
    slot, next_slot = _slot(sizes, done + step), _slot(sizes, done + step + 1)
    shape = (_ROWS, block_kv)

    def scores_of(acc_ref):
        plgpu.wgmma(acc_ref, shared.q.at[warpgroup], shared.k.at[slot].transpose((1, 0)))
        turns.swap()
        return acc_ref[...]

    scores = pl.run_scoped(scores_of, plgpu.ACC(shape, jnp.float32))
    plgpu.barrier_arrive(shared.k_used.at[slot])
    if masked:
        query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        scores = jnp.where(key + step * block_kv <= query + first_position, scores, -jnp.inf)

    # In powers of two; the maximum is kept scaled, so that scaling and subtracting are one instruction.
    scale = sizes.scale * math.log2(math.e)
    new_top = jnp.maximum(top, scores.max(axis=1) * scale)
    decay = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, shape, [0]))
    acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
    total = total * decay + weights.sum(axis=1)
    weights = weights.astype(sizes.dtype)
    if not sizes.interpret:  # keeps the softmax before the turn's end, where it runs beside the other's products
        acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
    turns.done()
    plgpu.barrier_wait(shared.v_ready.at[slot])
    turns.wait()

    def wait_for_next_keys():
        @pl.when(step + 1 < steps)
        def _():
            plgpu.barrier_wait(shared.k_ready.at[next_slot])

    if not sizes.interpret:

        def add_values(acc_ref):
            plgpu.wgmma(acc_ref, weights, shared.v.at[slot])
            wait_for_next_keys()

        acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
    else:  # has neither run_state nor wgmma of registers

        def values_of(acc_ref):
            plgpu.wgmma(acc_ref, shared.weights.at[warpgroup], shared.v.at[slot])
            return acc_ref[...]

        shared.weights[warpgroup] = weights
        plgpu.commit_smem()
        acc += pl.run_scoped(values_of, plgpu.ACC(acc.shape, jnp.float32))
        wait_for_next_keys()
    plgpu.barrier_arrive(shared.v_used.at[slot])
    return acc, new_top, total


def _store(out, tile, head, warpgroup, out_ref, shared):
    """Stores the output of the warpgroup's queries: all 64 rows at once, or those of the tile's row one by one."""
    lo, hi = tile.part(warpgroup)
    first = pl.multiple_of(tile.first + warpgroup * _ROWS, _ALIGN)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last job's
    num_pieces, columns = shared.out.shape[1], shared.out.shape[3]
    for i in range(num_pieces):
        shared.out[warpgroup, i] = out[:, i * columns : (i + 1) * columns]
    plgpu.commit_smem()

    def store(rows, tokens):
        for i in range(num_pieces):
            target = out_ref.at[tokens, head, pl.ds(i * columns, columns)]
            plgpu.copy_smem_to_gmem(shared.out.at[warpgroup, i, rows], target)

    is_full = hi - lo == _ROWS

    @pl.when(is_full)
    def _():
        store(pl.ds(0, _ROWS), pl.ds(first, _ROWS))

    @pl.when(jnp.logical_not(is_full))
    def _():
        @pl.loop(lo, hi)
        def _(token):
            store(pl.ds(token - first, 1), pl.ds(token, 1))


def choose_config(H: int, page_size: int) -> Config:
    """The configuration for heads of size H."""
    del page_size
    return Config(block_kv=128 if H <= 128 else 64)


def _swizzle(H):
    """Bytes of a line of the queries, keys and values in shared memory: the widest that divides a row of H."""
    return 128 if H % 64 == 0 else 64


def _out_dtype(H, dtype):
    """TMA stores a single row only from a multiple of 128 bytes, so a row must be made of lines that long."""
    return dtype if H % 64 == 0 else jnp.float32


def _shared_memory(H, dtype, config, in_place):
    """Bytes; with room for barriers and the like."""
    queries, out = (_TILE * H * jnp.dtype(x).itemsize for x in (dtype, _out_dtype(H, dtype)))
    return (max(queries, out) if in_place else queries + out) + 4 * config.stages * config.block_kv * H + 4096


def _out_in_place(sizes):
    """Whether a warpgroup's output takes its queries' place, for lack of another."""
    return _shared_memory(sizes.H, sizes.dtype, sizes.config, in_place=False) > _SHARED_MEMORY


def supported(
    q, k_pages, v_pages, page_table, kv_lens, query_starts, *, scale, config=None, interpret=False, **options
):
    """None, or why this kernel cannot take the call."""
    H, page_size = q.shape[2], k_pages.shape[2]
    config = config or choose_config(H, page_size)
    if (reason := mosaic.unsupported(interpret)) is not None:
        return reason
    if options:
        return f"takes no {', '.join(options)}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k_pages.dtype == v_pages.dtype:
        return f"takes bfloat16 or float16 throughout, got {q.dtype}, {k_pages.dtype} and {v_pages.dtype}"
    if H % 32 or H > 256:
        return f"takes a head dim that is a multiple of 32 up to 256, got {H}"
    if page_size % _ALIGN or config.block_kv % page_size:
        return f"takes a page size that is a multiple of {_ALIGN} and divides {config.block_kv}, got {page_size}"
    if _shared_memory(H, q.dtype, config, in_place=_out_dtype(H, q.dtype) == q.dtype) > _SHARED_MEMORY:
        return f"{config} needs more shared memory than there is for head dim {H}"
    if not scale > 0:
        return f"takes a positive scale, got {scale}"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def ragged_prefill(
    q, k_pages, v_pages, page_table, kv_lens, query_starts, *, scale, config: Config | None = None, interpret=False
):
    """See pallas_kernels.ragged_prefill. `config`: instead of choose_config's; `interpret`: for a CPU, slowly."""
    T, N, H = q.shape
    P, K, page_size, _ = k_pages.shape
    config = config or choose_config(H, page_size)
    padded = max(_ROWS, T + -T % _ALIGN)
    q = jnp.pad(q, ((0, padded - T), (0, 0), (0, 0)))
    tiles, count = cut_into_tiles(query_starts, kv_lens, padded, config.heavy_first)
    blocks = min(tiles.rows.shape[0] * N, config.blocks or mosaic.num_multiprocessors())
    sizes = _Sizes(padded, N, K, H, P, page_table.shape[1], page_size, q.dtype, scale, config, blocks, interpret)
    out = mosaic.kernel(
        functools.partial(_kernel, sizes),
        out_type=jax.ShapeDtypeStruct(q.shape, _out_dtype(H, q.dtype)),
        scratch_types=_scratch(sizes),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(jnp.stack(tiles, axis=1), count[None], page_table, q, k_pages, v_pages)
    return out[:T].astype(q.dtype)


def _scratch(sizes):
    block_kv, stages, H = sizes.config.block_kv, sizes.config.stages, sizes.H

    def tiled(*shape, dtype=sizes.dtype, line, rows=_ALIGN):
        tiling = plgpu.TilingTransform((rows, line // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(line)))

    line = _swizzle(H)
    out_dtype = jnp.dtype(_out_dtype(H, sizes.dtype))
    columns = 128 // out_dtype.itemsize
    queries = tiled(2, _ROWS, H, line=line)
    out = tiled(2, H // columns, _ROWS, columns, dtype=out_dtype, line=128, rows=1)
    pages = block_kv // sizes.page_size
    return [
        plgpu.RefUnion(queries, out) if _out_in_place(sizes) else (queries, out),
        tiled(stages, block_kv, H, line=line),
        tiled(stages, block_kv, H, line=line),
        tiled(2, _ROWS, block_kv, line=128) if sizes.interpret else None,
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
        plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
        plgpu.Barrier(num_arrivals=pages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
    ]
