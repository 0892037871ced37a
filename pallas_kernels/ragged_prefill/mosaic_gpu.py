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

_ROWS = 64  # of a warpgroup, in each a token of a query head: what wgmma takes
_TILE = 2 * _ROWS
# Finite: a row that sees no key of a step must not become NaN. A power of two: exact when scaled, fused or not.
_MASKED = -(2.0**100)
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
      pack: at most so many query heads of a KV head are in a tile, 1, 2, 4 or 8; the more, the fewer its tokens.
    """

    block_kv: int = 128
    stages: int = 2
    take_turns: bool = True
    heavy_first: bool = True
    blocks: int | None = None
    pack: int = 4


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
    pack: int
    blocks: int
    interpret: bool

    @property
    def q_slots(self):
        """For how many jobs' queries there is room."""
        return _room(self.H, self.dtype, self.config)[0]


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


def cut_into_tiles(query_starts, kv_lens, num_tokens, size, heavy_first) -> tuple[_Tiles, jax.Array]:
    """The tiles of `size` tokens of S rows and of the tokens before and after these; and how many are not empty."""
    zero, end = jnp.zeros(1, jnp.int32), jnp.full(1, num_tokens, jnp.int32)
    starts = jnp.concatenate([zero, query_starts.astype(jnp.int32), end])
    begin, stop = starts[:-1], starts[1:]
    num_rows = begin.shape[0]
    # A row's first query is at position kv_len - count. Without keys: so far below zero that no query sees any.
    kv_len = jnp.concatenate([zero, kv_lens.astype(jnp.int32), zero])
    offset = jnp.where(kv_len > 0, kv_len - stop, -num_tokens)
    aligned = begin - begin % _ALIGN
    count = jnp.where(begin < stop, (stop - aligned + size - 1) // size, 0)
    ends = jnp.sum(jnp.where(jnp.tri(num_rows, dtype=bool), count, 0), axis=1)

    index = jnp.arange((num_tokens + num_rows * (size + _ALIGN - 2)) // size, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(index[:, None] >= ends, axis=1), num_rows - 1)
    exists = index < ends[-1]
    first = aligned[row] + (index - (ends - count)[row]) * size
    lo, hi = jnp.maximum(first, begin[row]), jnp.minimum(first + size, stop[row])
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
    """One tile's numbers, scalars in a block."""

    row: jax.Array
    first: jax.Array
    lo: jax.Array
    hi: jax.Array
    offset: jax.Array
    kv_len: jax.Array

    def steps(self, block_kv):
        """How many times block_kv keys its queries need. At least one: it makes the zeros of a tile without keys."""
        return lax.div(jnp.maximum(self.hi + self.offset, 1) + (block_kv - 1), jnp.int32(block_kv))

    def whole_steps(self, block_kv):
        """How many steps have keys alone that every query sees."""
        return lax.div(jnp.maximum(self.lo + self.offset + 1, 0), jnp.int32(block_kv))


class _Shared(NamedTuple):
    """Shared memory of a block; the first index is the warpgroup or the slot."""

    q: object  # [2 * q_slots, 64, H]
    out: object  # [2, out_slots, 64, columns], a few columns in each
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
        self.total = count_ref[0] * (sizes.N // sizes.pack)
        whole_rounds = lax.div(self.total, jnp.int32(sizes.blocks))
        self.count = whole_rounds + jnp.where(self._index(whole_rounds) < self.total, 1, 0)

    def _index(self, i):
        block, blocks = lax.axis_index("block"), self.sizes.blocks
        return i * blocks + jnp.where(lax.rem(i, jnp.int32(2)) == 0, block, blocks - 1 - block)

    def __getitem__(self, i):
        """Job i's tile and first query head; the last one's again past the end."""
        index = jnp.minimum(self._index(i), self.total - 1)
        # The heads of a tile run together: they may share keys and values.
        heads = jnp.int32(self.sizes.N // self.sizes.pack)
        tile, head = lax.div(index, heads), lax.rem(index, heads) * self.sizes.pack
        return _Tile(*(self.tiles_ref[tile, i] for i in range(len(_Tile._fields)))), head


def _kernel(sizes: _Sizes, tiles_ref, count_ref, table_ref, q_ref, k_ref, v_ref, out_ref, *scratch):
    shared = _Shared(*scratch)
    warpgroup = lax.axis_index("warpgroup")
    jobs = _Jobs(sizes, tiles_ref, count_ref)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")
        pl.when(jobs.count > 0)(lambda: _compute(sizes, jobs, warpgroup, q_ref, out_ref, shared))

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _fetch(sizes, jobs, table_ref, k_ref, v_ref, shared)


def _slot(sizes, step):
    return lax.rem(step, jnp.int32(sizes.config.stages))


def _fetch(sizes, jobs, table_ref, k_ref, v_ref, shared):
    """Brings the pages of the jobs' rows, step by step, as slots become free."""

    def fetch_job(i, state):
        done, tile, head = state
        next_job = jobs[i + 1]
        kv_head = lax.div(head, jnp.int32(sizes.N // sizes.K))
        fetch = functools.partial(_fetch_step, sizes, tile, kv_head, done, table_ref, k_ref, v_ref, shared)
        steps = tile.steps(sizes.config.block_kv)
        has_tail = steps * sizes.config.block_kv > tile.kv_len
        lax.fori_loop(0, steps - jnp.where(has_tail, 1, 0), lambda step, _: fetch(step, False), None)
        pl.when(has_tail)(lambda: fetch(steps - 1, True))
        return done + steps, *next_job

    # Nothing is left unobserved.
    def drain(step, _):
        slot = _slot(sizes, step)
        plgpu.barrier_wait(shared.k_used.at[slot])
        plgpu.barrier_wait(shared.v_used.at[slot])

    done, *_ = lax.fori_loop(0, jobs.count, fetch_job, (jnp.int32(0), *jobs[0]))
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


class _Softmax(NamedTuple):
    """The online softmax of 64 rows between two steps.

    weights  [64, block_kv], of the step whose values are not added yet
    top      float32 [64], the largest score, times scale and log2(e)
    total    float32 [64], the sum of all weights
    decay    float32 [64], what the output so far is to be multiplied with once it has those values
    """

    weights: jax.Array
    top: jax.Array
    total: jax.Array
    decay: jax.Array


class _Turns(NamedTuple):
    """The tensor cores' right of way: a warpgroup issues its products, then it is the other's turn."""

    barriers: object
    warpgroup: jax.Array
    enabled: bool

    def take(self):
        if self.enabled:
            plgpu.barrier_wait(self.barriers.at[self.warpgroup])

    def pass_on(self):
        if self.enabled:
            plgpu.barrier_arrive(self.barriers.at[1 - self.warpgroup])


def _compute(sizes, jobs, warpgroup, q_ref, out_ref, shared):
    """Attention and output of the warpgroup's 64 rows of every job, as one pipeline: see _step."""
    queries = _Queries(sizes, jobs, warpgroup, q_ref, shared)
    turns = _Turns(shared.turn, warpgroup, sizes.config.take_turns)
    step = functools.partial(_step, sizes, warpgroup, shared, turns)
    block_kv = sizes.config.block_kv

    def compute_job(i, state):
        done, softmax = state
        tile, _ = jobs[i]
        steps = tile.steps(block_kv)
        whole = jnp.clip(tile.whole_steps(block_kv), 1, steps)
        if sizes.q_slots > 1:
            queries.fetch(i + 1)

        def advance(masked):
            def body(j, state):
                acc, softmax = step(done + j, queries.slot(i), queries.mask(tile, j) if masked else None, *state)
                return acc * lax.broadcast_in_dim(softmax.decay, acc.shape, [0]), softmax

            return body

        acc = plgpu.layout_cast(jnp.zeros((_ROWS, sizes.H), jnp.float32), plgpu.Layout.WGMMA)
        state = lax.fori_loop(1, whole, advance(masked=False), (acc, softmax))
        acc, softmax = lax.fori_loop(whole, steps, advance(masked=True), state)
        if sizes.q_slots == 1:
            queries.fetch(i + 1)
        queries.wait(i + 1)
        next_tile, _ = jobs[i + 1]  # tiles are read where they are used: registers are scarce
        fresh = _no_scores()._replace(weights=softmax.weights)
        acc, next_softmax = step(
            done + steps, queries.slot(i + 1), queries.mask(next_tile, 0), acc, fresh, exists=i + 1 < jobs.count
        )
        acc *= lax.broadcast_in_dim(1 / softmax.total, acc.shape, [0])
        _store(sizes, acc, *jobs[i], warpgroup, out_ref, shared)
        return done + steps, next_softmax

    queries.fetch(0)
    pl.when(warpgroup == 1)(turns.pass_on)
    queries.wait(0)
    softmax = _first_step(sizes, warpgroup, shared, turns, queries.mask(jobs[0][0], 0))
    lax.fori_loop(0, jobs.count, compute_job, (jnp.int32(0), softmax))
    pl.when(warpgroup == 0)(turns.take)  # nothing is left unobserved
    plgpu.wait_smem_to_gmem(0)


class _Queries(NamedTuple):
    """The warpgroup's rows: for each query head of the job, one after the other, `tokens` tokens."""

    sizes: _Sizes
    jobs: _Jobs
    warpgroup: jax.Array
    source: object
    shared: _Shared

    @property
    def tokens(self):
        return _ROWS // self.sizes.pack

    def first_token(self, tile):
        return pl.multiple_of(tile.first + self.warpgroup * self.tokens, _ALIGN)

    def slot(self, i):
        """Where job i's queries are."""
        return self.warpgroup * self.sizes.q_slots + lax.rem(i, jnp.int32(self.sizes.q_slots))

    def fetch(self, i):
        """Starts to bring the queries of job i, if there is one."""

        @pl.when(i < self.jobs.count)
        def _():
            tile, head = self.jobs[i]
            slot = self.slot(i)
            for h in range(self.sizes.pack):
                plgpu.copy_gmem_to_smem(
                    self.source.at[pl.ds(self.first_token(tile), self.tokens), head + h],
                    self.shared.q.at[slot, pl.ds(h * self.tokens, self.tokens)],
                    self.shared.q_ready.at[slot],
                )

    def wait(self, i):
        pl.when(i < self.jobs.count)(lambda: plgpu.barrier_wait(self.shared.q_ready.at[self.slot(i)]))

    def mask(self, tile, step):
        """The scores' mask in a step of the tile: a function of an array [64, block_kv]."""

        def apply(scores):
            row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            position = (row & (self.tokens - 1)) + (self.first_token(tile) + tile.offset - step * scores.shape[1])
            return jnp.where(key <= position, scores, _MASKED)

        return apply


def _no_scores():
    """The softmax before the first step; without weights."""
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    zeros = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), row_layout)
    return _Softmax(None, plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), row_layout), zeros, zeros)


def _add_scores(sizes, scores, mask, softmax):
    """The softmax with one more step's scores, products [64, block_kv] of queries and keys."""
    if mask is not None:
        scores = mask(scores)
    # In powers of two; the maximum is kept scaled, so that scaling and subtracting are one instruction.
    scale = sizes.scale * math.log2(math.e)
    top = jnp.maximum(softmax.top, scores.max(axis=1) * scale)
    decay = jnp.exp2(softmax.top - top)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(top, scores.shape, [0]))
    return _Softmax(weights, top, softmax.total * decay + weights.sum(axis=1), decay)


def _first_step(sizes, warpgroup, shared, turns, mask):
    """The softmax of the first step of all."""

    def scores_of(acc_ref):
        plgpu.wgmma(acc_ref, shared.q.at[warpgroup * sizes.q_slots], shared.k.at[0].transpose((1, 0)))
        turns.pass_on()
        return acc_ref[...]

    plgpu.barrier_wait(shared.k_ready.at[0])
    turns.take()
    scores = pl.run_scoped(scores_of, plgpu.ACC((_ROWS, sizes.config.block_kv), jnp.float32))
    plgpu.barrier_arrive(shared.k_used.at[0])
    return _rounded(sizes, _add_scores(sizes, scores, mask, _no_scores()))


def _step(sizes, warpgroup, shared, turns, index, q_slot, mask, acc, softmax, exists=True):
    """Adds the values of step index - 1 to acc, and the scores of step `index` to the softmax, if that `exists`.

    Both products are issued at once, and the softmax runs beside the second (FlashAttention-3, section 3.2).
    """
    k_slot, v_slot = _slot(sizes, index), _slot(sizes, index - 1)
    keys, values = shared.k.at[k_slot].transpose((1, 0)), shared.v.at[v_slot]
    scores_type = plgpu.ACC((_ROWS, sizes.config.block_kv), jnp.float32)

    def add_scores(scores):
        pl.when(exists)(lambda: plgpu.barrier_arrive(shared.k_used.at[k_slot]))
        return _add_scores(sizes, scores, mask, softmax)

    def both(scores_ref, acc_ref, out_refs):
        plgpu.wgmma(scores_ref, shared.q.at[q_slot], keys)
        plgpu.barrier_wait(shared.v_ready.at[v_slot])
        plgpu.wgmma(acc_ref, softmax.weights, values)
        turns.pass_on()
        new = add_scores(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
        new = lax.optimization_barrier(new)  # lest it be computed after the wait for the values
        for ref, value in zip(out_refs, new, strict=True):
            ref[...] = value

    def one_by_one():  # interpret mode has neither run_state nor wgmma of registers
        def product(a, b):
            def of(ref):
                plgpu.wgmma(ref, a, b)
                return ref[...]

            return of

        scores = pl.run_scoped(product(shared.q.at[q_slot], keys), scores_type)
        shared.weights[warpgroup] = softmax.weights
        plgpu.commit_smem()
        plgpu.barrier_wait(shared.v_ready.at[v_slot])
        values_acc = plgpu.ACC(acc.shape, jnp.float32)
        new_acc = acc + pl.run_scoped(product(shared.weights.at[warpgroup], values), values_acc)
        turns.pass_on()
        return new_acc, add_scores(scores)

    pl.when(exists)(lambda: plgpu.barrier_wait(shared.k_ready.at[k_slot]))
    turns.take()
    if sizes.interpret:
        acc, softmax = one_by_one()
    else:
        # float32 weights, rounded when the products are done: the old ones' registers are in use until then.
        state = plgpu.ACC.init(acc), softmax._replace(weights=softmax.weights.astype(jnp.float32))
        acc, softmax = pl.run_state(lambda refs: pl.run_scoped(lambda s: both(s, *refs), scores_type))(state)
    plgpu.barrier_arrive(shared.v_used.at[v_slot])
    return acc, _rounded(sizes, softmax)


def _rounded(sizes, softmax):
    return softmax._replace(weights=softmax.weights.astype(sizes.dtype))


def _store(sizes, out, tile, head, warpgroup, out_ref, shared):
    """Stores the warpgroup's output for those of its tokens that belong to the tile's row."""
    tokens = _ROWS // sizes.pack
    first = pl.multiple_of(tile.first + warpgroup * tokens, _ALIGN)
    lo, hi = jnp.maximum(tile.lo, first), jnp.minimum(tile.hi, first + tokens)
    slots, columns = shared.out.shape[1], shared.out.shape[3]
    out = out.astype(out_ref.dtype)

    def store(start, count, slot, part):
        for h in range(sizes.pack):
            source = shared.out.at[warpgroup, slot, pl.ds(h * tokens + start, count)]
            plgpu.copy_smem_to_gmem(source, out_ref.at[pl.ds(first + start, count), head + h, part])

    for begin in range(0, sizes.H, slots * columns):
        parts = [pl.ds(c, columns) for c in range(begin, min(begin + slots * columns, sizes.H), columns)]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was stored from there before
        width = math.gcd(sizes.H, columns)
        for slot, part in enumerate(parts):
            for c in range(0, min(columns, sizes.H - part.start), width):
                shared.out[warpgroup, slot, :, c : c + width] = out[:, part.start + c : part.start + c + width]
        plgpu.commit_smem()
        start, count = lo - first, tokens
        while count:  # a copy's size is static: the largest first that fit
            fits = start + count <= hi - first

            @pl.when(fits)
            def _(start=start, count=count, parts=parts):
                for slot, part in enumerate(parts):
                    store(start, count, slot, part)

            start, count = start + jnp.where(fits, count, 0), count // 2


def choose_config(H: int, page_size: int) -> Config:
    """The configuration for heads of size H."""
    del page_size
    return Config(block_kv=128 if H <= 128 else 64)


def _pack(group, config):
    """Query heads in a tile, of `group` that share a KV head."""
    return math.gcd(group, config.pack)


def _swizzle(H):
    """Bytes of a line of the queries, keys and values in shared memory: the widest that divides a row of H."""
    return math.gcd(2 * H, 128)


def _out_columns(H):
    """Columns of the output array, and of a piece of it in shared memory.

    TMA stores a single row only from a multiple of 128 bytes: a piece has lines that long, or is made of whole rows
    that are padded to it.
    """
    padded = H + -H % 64
    return padded, 64 if H == padded else padded


def _room(H, dtype, config):
    """Slots of queries and of output in shared memory; None if there is not enough of it."""
    queries = _TILE * H * jnp.dtype(dtype).itemsize
    out_columns, piece = _out_columns(H)
    pieces = out_columns // piece
    left = _SHARED_MEMORY - 2048 - 4 * config.stages * config.block_kv * H  # barriers and the like; keys and values
    for q_slots, out_slots in ((2, pieces), (1, pieces), (1, 1)):
        if q_slots * queries + out_slots * _TILE * piece * 2 <= left:
            return q_slots, out_slots
    return None


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
    if H % 16 or H > 256:
        return f"takes a head dim that is a multiple of 16 up to 256, got {H}"
    if page_size % _ALIGN or config.block_kv % page_size:
        return f"takes a page size that is a multiple of {_ALIGN} and divides {config.block_kv}, got {page_size}"
    if _room(H, q.dtype, config) is None:
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
    pack = _pack(N // K, config)
    padded = max(_ROWS // pack, T + -T % _ALIGN)
    q = jnp.pad(q, ((0, padded - T), (0, 0), (0, 0)))
    tiles, count = cut_into_tiles(query_starts, kv_lens, padded, _TILE // pack, config.heavy_first)
    jobs = tiles.rows.shape[0] * N // pack
    blocks = min(jobs, config.blocks or mosaic.num_multiprocessors())
    sizes = _Sizes(padded, N, K, H, P, page_table.shape[1], page_size, q.dtype, scale, config, pack, blocks, interpret)
    out = mosaic.kernel(
        functools.partial(_kernel, sizes),
        out_type=jax.ShapeDtypeStruct((padded, N, _out_columns(H)[0]), q.dtype),
        scratch_types=_scratch(sizes),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(jnp.stack(tiles, axis=1), count[None], page_table, q, k_pages, v_pages)
    return out[:T, :, :H]


def _scratch(sizes):
    block_kv, stages, H = sizes.config.block_kv, sizes.config.stages, sizes.H

    def tiled(*shape, line, rows=_ALIGN):
        transforms = plgpu.TilingTransform((rows, line // 2)), plgpu.SwizzleTransform(line)
        return plgpu.SMEM(shape, sizes.dtype, transforms=transforms)

    line = _swizzle(H)
    q_slots, out_slots = _room(H, sizes.dtype, sizes.config)
    pages = block_kv // sizes.page_size
    return [
        tiled(2 * q_slots, _ROWS, H, line=line),
        tiled(2, out_slots, _ROWS, 64, line=128, rows=1)
        if H % 64 == 0
        else plgpu.SMEM((2, 1, _ROWS, _out_columns(H)[1]), sizes.dtype),
        tiled(stages, block_kv, H, line=line),
        tiled(stages, block_kv, H, line=line),
        tiled(2, _ROWS, block_kv, line=128) if sizes.interpret else None,
        plgpu.Barrier(num_arrivals=sizes.pack, num_barriers=2 * q_slots),
        plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
        plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
        plgpu.Barrier(num_arrivals=pages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_barriers=2),
    ]
