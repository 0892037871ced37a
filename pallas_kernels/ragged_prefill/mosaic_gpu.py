"""ragged_prefill for Hopper in Pallas Mosaic GPU.

After Shah et al., "FlashAttention-3" (2024): of three warpgroups one only fetches and two compute, 64 rows each. A
step's softmax runs beside the products of the step before and beside the other warpgroup's. A job is one tile, up to
128 rows: tokens that lie one after the other in the flat q and belong to one sequence, for one or several query heads
of a KV head. Every page is one TMA copy. There is a block for each multiprocessor, and its jobs are one pipeline: the
next one's queries and first keys are there before the last one's output leaves. 8-bit pages are made 16-bit in shared
memory by the fetching warpgroup.

What is particular to ragged and paged input:
- A tile starts at a multiple of 8 tokens, as TMA wants it, so a sequence's first tile may begin with another's queries
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
    kv_dtype: jnp.dtype
    scale: float
    window: int | None
    soft_cap: float | None
    config: Config
    pack: int
    blocks: int
    interpret: bool

    @property
    def q_slots(self):
        """For how many jobs' queries there is room."""
        return _room(self.H, self.kv_dtype, self.config)[0]

    @property
    def raw_slots(self):
        """For how many steps' 8-bit keys or values there is room; 0 for others, which need none."""
        return _room(self.H, self.kv_dtype, self.config)[2]


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

    def steps(self, sizes):
        """The first step of block_kv keys that its queries need, and the one after the last.

        There is at least one: it makes the zeros of a tile without keys.
        """
        begin = 0
        if sizes.window is not None:
            begin = lax.div(jnp.maximum(self.lo + self.offset + 1 - sizes.window, 0), jnp.int32(sizes.config.block_kv))
        return begin, self._round_up(sizes, jnp.maximum(self.hi + self.offset, 1))

    def whole_steps(self, sizes):
        """The first step whose every key every query sees, and the one after the last."""
        begin = 0
        if sizes.window is not None:
            begin = self._round_up(sizes, jnp.maximum(self.hi + self.offset - sizes.window, 0))
        return begin, lax.div(jnp.maximum(self.lo + self.offset + 1, 0), jnp.int32(sizes.config.block_kv))

    def _round_up(self, sizes, keys):
        return lax.div(keys + (sizes.config.block_kv - 1), jnp.int32(sizes.config.block_kv))


class _Shared(NamedTuple):
    """Shared memory of a block; the first index is the warpgroup or the slot."""

    q: object  # [2 * q_slots, 64, H]
    out: object  # [2, out_slots, 64, columns], a few columns in each
    k: object
    v: object
    raw: object | None  # [raw_slots, block_kv, H] of 8 bits
    raw_scales: object | None
    weights: object | None  # interpret mode alone
    q_ready: object
    k_ready: object
    v_ready: object
    v_fetched: object  # instead of v_ready, when there is something to replace first
    raw_fetched: object | None
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


def _kernel(sizes: _Sizes, names, tiles_ref, count_ref, *refs):
    """`names`: which of _Inputs there are."""
    inputs = _Inputs(**(dict.fromkeys(_Inputs._fields) | dict(zip(names, refs, strict=False))))
    out_ref, *scratch = refs[len(names) :]
    shared = _Shared(*scratch)
    warpgroup = lax.axis_index("warpgroup")
    jobs = _Jobs(sizes, tiles_ref, count_ref)
    compute_registers, fetch_registers = (192, 120) if sizes.raw_slots else (232, 40)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(compute_registers, action="increase")
        pl.when(jobs.count > 0)(lambda: _compute(sizes, jobs, warpgroup, inputs, out_ref, shared))

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(fetch_registers, action="decrease")
        _fetch(sizes, jobs, inputs, shared)


def _slot(sizes, step):
    return lax.rem(step, jnp.int32(sizes.config.stages))


class _Inputs(NamedTuple):
    """Arrays in global memory."""

    table: object
    q: object
    k: object
    v: object
    slopes: object | None
    k_scales: object | None
    v_scales: object | None


def _fetch(sizes, jobs, inputs, shared):
    """Brings the pages of the jobs' rows, step by step, as slots become free."""

    def fetch_job(i, state):
        done, tile, head = state
        next_job = jobs[i + 1]
        kv_head = lax.div(head, jnp.int32(sizes.N // sizes.K))
        begin, end = tile.steps(sizes)
        pages = _Pages(sizes, inputs, shared, tile, kv_head, done - begin)
        if sizes.raw_slots:
            pages.convert(begin, end)
        else:
            has_tail = end * sizes.config.block_kv > tile.kv_len
            lax.fori_loop(begin, end - jnp.where(has_tail, 1, 0), lambda step, _: pages.fetch(step), None)
            pl.when(has_tail)(lambda: pages.fetch_tail(end - 1))
        return done + end - begin, *next_job

    # Nothing is left unobserved.
    def drain(step, _):
        slot = _slot(sizes, step)
        plgpu.barrier_wait(shared.k_used.at[slot])
        plgpu.barrier_wait(shared.v_used.at[slot])

    done, *_ = lax.fori_loop(0, jobs.count, fetch_job, (jnp.int32(0), *jobs[0]))
    lax.fori_loop(jnp.maximum(done - sizes.config.stages, 0), done, drain, None)


class _Pages(NamedTuple):
    """The keys and values of one job; `base` + step is the number of the step among all that the block does."""

    sizes: _Sizes
    inputs: _Inputs
    shared: _Shared
    tile: _Tile
    kv_head: jax.Array
    base: jax.Array

    def ids(self, step):
        # Clipped: entries past the row's end may hold anything, and there may be none.
        pages = self.sizes.config.block_kv // self.sizes.page_size
        entries = [jnp.minimum(step * pages + i, self.sizes.W - 1) for i in range(pages)]
        return [jnp.clip(self.inputs.table[self.tile.row, entry], 0, self.sizes.P - 1) for entry in entries]

    def copy(self, ids, source, target, barrier):
        for i, page in enumerate(ids):
            rows = pl.ds(i * self.sizes.page_size, self.sizes.page_size)
            plgpu.copy_gmem_to_smem(source.at[page, self.kv_head], target.at[rows], barrier)

    def wait_for(self, used, step):
        """Until the slot of the step is free."""
        index = self.base + step

        @pl.when(index >= self.sizes.config.stages)
        def _():
            plgpu.barrier_wait(used.at[_slot(self.sizes, index)])

    def fetch(self, step):
        shared, slot = self.shared, _slot(self.sizes, self.base + step)
        ids = self.ids(step)  # read before the waits
        self.wait_for(shared.k_used, step)
        self.copy(ids, self.inputs.k, shared.k.at[slot], shared.k_ready.at[slot])
        self.wait_for(shared.v_used, step)
        self.copy(ids, self.inputs.v, shared.v.at[slot], shared.v_ready.at[slot])

    def fetch_tail(self, step):
        """As fetch; values past the row's end become zeros."""
        shared, slot = self.shared, _slot(self.sizes, self.base + step)
        ids = self.ids(step)
        self.wait_for(shared.k_used, step)
        self.copy(ids, self.inputs.k, shared.k.at[slot], shared.k_ready.at[slot])
        self.wait_for(shared.v_used, step)
        self.copy(ids, self.inputs.v, shared.v.at[slot], shared.v_fetched)
        plgpu.barrier_wait(shared.v_fetched)
        _zero_rows(shared.v.at[slot], self.tile.kv_len - step * self.sizes.config.block_kv, self.sizes)
        plgpu.commit_smem()
        for _ in ids:
            plgpu.barrier_arrive(shared.v_ready.at[slot])

    def convert(self, begin, end):
        """Fetches the 8-bit pages of steps begin <= step < end, one step ahead where there is room for it."""
        shared, inputs = self.shared, self.inputs

        def fetch_raw(step, raw_slot, source, scales):
            ids, fetched = self.ids(step), shared.raw_fetched.at[raw_slot]
            self.copy(ids, source, shared.raw.at[raw_slot], fetched)
            self.copy(ids, scales, shared.raw_scales.at[raw_slot], fetched)

        keys = functools.partial(fetch_raw, raw_slot=0, source=inputs.k, scales=inputs.k_scales)
        v_raw_slot = self.sizes.raw_slots - 1
        values = functools.partial(fetch_raw, raw_slot=v_raw_slot, source=inputs.v, scales=inputs.v_scales)
        ahead = v_raw_slot > 0

        def convert_step(step, fetch, raw_slot, target, used, ready):
            slot = _slot(self.sizes, self.base + step)
            if not ahead:
                fetch(step)
            plgpu.barrier_wait(shared.raw_fetched.at[raw_slot])
            self.wait_for(used, step)
            valid = self.tile.kv_len - step * self.sizes.config.block_kv
            _dequantize(shared.raw.at[raw_slot], shared.raw_scales.at[raw_slot], target.at[slot], valid, self.sizes)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready.at[slot])
            if ahead:
                pl.when(step + 1 < end)(lambda: fetch(step + 1))

        def body(step, _):
            convert_step(step, keys, 0, shared.k, shared.k_used, shared.k_ready)
            convert_step(step, values, v_raw_slot, shared.v, shared.v_used, shared.v_ready)

        if ahead:
            keys(begin)
            values(begin)
        lax.fori_loop(begin, end, body, None)


def _dequantize(raw, scales, target, valid, sizes):
    """target [block_kv, H] = raw [block_kv, H] of 8 bits, times scales [block_kv]; zeros from row `valid` on."""
    columns = _swizzle(sizes.H) // 2
    for row in range(0, sizes.config.block_kv, _ROWS):
        rows = pl.ds(row, _ROWS)
        row_scales = plgpu.load(scales.at[rows], layout=plgpu.Layout.WGMMA.reduce(1))
        for column in range(0, sizes.H, columns):
            part = rows, pl.ds(column, columns)
            values = plgpu.load(raw.at[part], layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
            ids = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
            values = jnp.where(ids + row < valid, values * lax.broadcast_in_dim(row_scales, values.shape, [0]), 0.0)
            target[part] = values.astype(target.dtype)


def _zero_rows(ref, start, sizes):
    """Zeros rows `start` and after of ref [block_kv, H], in pieces: the fetching warpgroup has few registers."""
    columns = _swizzle(sizes.H) // 2
    for row in range(0, sizes.config.block_kv, _ROWS):

        @pl.when(start < row + _ROWS)
        def _(row=row):
            for column in range(0, sizes.H, columns):
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


def _compute(sizes, jobs, warpgroup, inputs, out_ref, shared):
    """Attention and output of the warpgroup's 64 rows of every job, as one pipeline: see _step."""
    queries = _Queries(sizes, jobs, warpgroup, inputs, shared)
    turns = _Turns(shared.turn, warpgroup, sizes.config.take_turns)
    step = functools.partial(_step, sizes, warpgroup, shared, turns)

    def compute_job(i, state):
        done, softmax = state
        tile, head = jobs[i]
        (begin, end), (whole_begin, whole_end) = tile.steps(sizes), tile.whole_steps(sizes)
        scores = queries.scores(tile, head)
        if sizes.q_slots > 1:
            queries.fetch(i + 1)

        def advance(masked):
            def body(j, state):
                acc, softmax = step(done + j - begin, queries.slot(i), scores.of_step(j, masked), *state)
                return acc * lax.broadcast_in_dim(softmax.decay, acc.shape, [0]), softmax

            return body

        acc = plgpu.layout_cast(jnp.zeros((_ROWS, sizes.H), jnp.float32), plgpu.Layout.WGMMA)
        state = acc, softmax
        start = begin + 1
        if sizes.window is not None:
            start = jnp.clip(whole_begin, start, end)
            state = lax.fori_loop(begin + 1, start, advance(masked=True), state)
        whole_end = jnp.clip(whole_end, start, end)
        state = lax.fori_loop(start, whole_end, advance(masked=False), state)
        acc, softmax = lax.fori_loop(whole_end, end, advance(masked=True), state)
        done += end - begin
        if sizes.q_slots == 1:
            queries.fetch(i + 1)
        queries.wait(i + 1)
        next_tile, next_head = jobs[i + 1]  # tiles are read where they are used: registers are scarce
        next_scores = queries.scores(next_tile, next_head).of_step(next_tile.steps(sizes)[0], masked=True)
        fresh = _no_scores()._replace(weights=softmax.weights)
        acc, next_softmax = step(done, queries.slot(i + 1), next_scores, acc, fresh, exists=i + 1 < jobs.count)
        acc *= lax.broadcast_in_dim(1 / softmax.total, acc.shape, [0])
        _store(sizes, acc, *jobs[i], warpgroup, out_ref, shared)
        return done, next_softmax

    queries.fetch(0)
    pl.when(warpgroup == 1)(turns.pass_on)
    queries.wait(0)
    tile, head = jobs[0]
    first_scores = queries.scores(tile, head).of_step(tile.steps(sizes)[0], masked=True)
    softmax = _first_step(sizes, warpgroup, shared, turns, first_scores)
    lax.fori_loop(0, jobs.count, compute_job, (jnp.int32(0), softmax))
    pl.when(warpgroup == 0)(turns.take)  # nothing is left unobserved
    plgpu.wait_smem_to_gmem(0)


class _Queries(NamedTuple):
    """The warpgroup's rows: for each query head of the job, one after the other, `tokens` tokens."""

    sizes: _Sizes
    jobs: _Jobs
    warpgroup: jax.Array
    inputs: _Inputs
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
                    self.inputs.q.at[pl.ds(self.first_token(tile), self.tokens), head + h],
                    self.shared.q.at[slot, pl.ds(h * self.tokens, self.tokens)],
                    self.shared.q_ready.at[slot],
                )

    def wait(self, i):
        pl.when(i < self.jobs.count)(lambda: plgpu.barrier_wait(self.shared.q_ready.at[self.slot(i)]))

    def scores(self, tile, head):
        """How the scores of a job are made."""
        slopes = None
        if self.inputs.slopes is not None:
            slopes = [self.inputs.slopes[head + h] for h in range(self.sizes.pack)]
        return _Scores(self.sizes, self.tokens, self.first_token(tile) + tile.offset, slopes)


class _Scores(NamedTuple):
    """From products of queries and keys [64, block_kv] to scores, still to be multiplied with `unit`.

    first_position  of the warpgroup's first token
    slopes          of the job's query heads, or None
    """

    sizes: _Sizes
    tokens: int
    first_position: jax.Array
    slopes: list[jax.Array] | None

    @property
    def unit(self):
        """What makes powers of two of scores."""
        if self.slopes is not None:
            return math.log2(math.e)
        return math.log2(math.e) * (self.sizes.scale if self.sizes.soft_cap is None else self.sizes.soft_cap)

    def of_step(self, step, masked):
        """The step's scores as a function of its products; `masked`: whether some query does not see some key."""

        def apply(scores):
            scores = self._capped(scores)
            if self.slopes is None and not masked:
                return scores
            row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            position = (row & (self.tokens - 1)) + (self.first_position - step * scores.shape[1])
            if self.slopes is not None:
                scores += self._slopes(row) * (key - position).astype(jnp.float32)
            if masked:
                seen = key <= position
                if self.sizes.window is not None:
                    seen &= key > position - self.sizes.window
                scores = jnp.where(seen, scores, _MASKED)
            return scores

        return apply, self.unit

    def _capped(self, scores):
        cap, scale = self.sizes.soft_cap, self.sizes.scale
        if cap is not None:  # the hyperbolic tangent; the hardware's own is off by 2^-11
            scores = 1 - 2 / (1 + jnp.exp2(scores * (2 * math.log2(math.e) * scale / cap)))
        if self.slopes is not None:
            scores *= scale if cap is None else cap
        return scores

    def _slopes(self, row):
        """Of each row's query head."""
        slopes = lax.broadcast_in_dim(self.slopes[0], row.shape, ())
        for h, slope in enumerate(self.slopes[1:], 1):
            slopes = jnp.where(row < h * self.tokens, slopes, slope)
        return slopes


def _no_scores():
    """The softmax before the first step; without weights."""
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    zeros = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), row_layout)
    return _Softmax(None, plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), row_layout), zeros, zeros)


def _add_scores(products, scores, softmax):
    """The softmax with one more step's products [64, block_kv] of queries and keys; `scores`: of _Scores.of_step."""
    apply, unit = scores
    scores = apply(products)
    # In powers of two; the maximum is kept scaled, so that scaling and subtracting are one instruction.
    top = jnp.maximum(softmax.top, scores.max(axis=1) * unit)
    decay = jnp.exp2(softmax.top - top)
    weights = jnp.exp2(scores * unit - lax.broadcast_in_dim(top, scores.shape, [0]))
    return _Softmax(weights, top, softmax.total * decay + weights.sum(axis=1), decay)


def _first_step(sizes, warpgroup, shared, turns, scores):
    """The softmax of the first step of all."""

    def products_of(acc_ref):
        plgpu.wgmma(acc_ref, shared.q.at[warpgroup * sizes.q_slots], shared.k.at[0].transpose((1, 0)))
        turns.pass_on()
        return acc_ref[...]

    plgpu.barrier_wait(shared.k_ready.at[0])
    turns.take()
    products = pl.run_scoped(products_of, plgpu.ACC((_ROWS, sizes.config.block_kv), jnp.float32))
    plgpu.barrier_arrive(shared.k_used.at[0])
    return _rounded(sizes, _add_scores(products, scores, _no_scores()))


def _step(sizes, warpgroup, shared, turns, index, q_slot, scores, acc, softmax, exists=True):
    """Adds the values of step index - 1 to acc, and the scores of step `index` to the softmax, if that `exists`.

    Both products are issued at once, and the softmax runs beside the second (FlashAttention-3, section 3.2).
    """
    k_slot, v_slot = _slot(sizes, index), _slot(sizes, index - 1)
    keys, values = shared.k.at[k_slot].transpose((1, 0)), shared.v.at[v_slot]
    products_type = plgpu.ACC((_ROWS, sizes.config.block_kv), jnp.float32)

    def add_scores(products):
        pl.when(exists)(lambda: plgpu.barrier_arrive(shared.k_used.at[k_slot]))
        return _add_scores(products, scores, softmax)

    def both(products_ref, acc_ref, out_refs):
        plgpu.wgmma(products_ref, shared.q.at[q_slot], keys)
        plgpu.barrier_wait(shared.v_ready.at[v_slot])
        plgpu.wgmma(acc_ref, softmax.weights, values)
        turns.pass_on()
        new = add_scores(plgpu.wgmma_accumulator_load(products_ref, wait_n=1))
        new = lax.optimization_barrier(new)  # lest it be computed after the wait for the values
        for ref, value in zip(out_refs, new, strict=True):
            ref[...] = value

    def one_by_one():  # interpret mode has neither run_state nor wgmma of registers
        def product(a, b):
            def of(ref):
                plgpu.wgmma(ref, a, b)
                return ref[...]

            return of

        products = pl.run_scoped(product(shared.q.at[q_slot], keys), products_type)
        shared.weights[warpgroup] = softmax.weights
        plgpu.commit_smem()
        plgpu.barrier_wait(shared.v_ready.at[v_slot])
        values_acc = plgpu.ACC(acc.shape, jnp.float32)
        new_acc = acc + pl.run_scoped(product(shared.weights.at[warpgroup], values), values_acc)
        turns.pass_on()
        return new_acc, add_scores(products)

    pl.when(exists)(lambda: plgpu.barrier_wait(shared.k_ready.at[k_slot]))
    turns.take()
    if sizes.interpret:
        acc, softmax = one_by_one()
    else:
        # float32 weights, rounded when the products are done: the old ones' registers are in use until then.
        state = plgpu.ACC.init(acc), softmax._replace(weights=softmax.weights.astype(jnp.float32))
        acc, softmax = pl.run_state(lambda refs: pl.run_scoped(lambda s: both(s, *refs), products_type))(state)
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


def choose_config(H: int, kv_dtype: jnp.dtype, alibi: bool = False) -> Config:
    """The configuration for heads of size H and pages of kv_dtype."""
    # Narrow steps leave registers to slopes, and to the warpgroup that converts 8-bit pages.
    narrow = H > 128 or alibi or jnp.dtype(kv_dtype).itemsize == 1
    return Config(block_kv=64 if narrow else 128)


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
    return padded, 64 if padded == H else padded


def _room(H, kv_dtype, config):
    """Slots of queries, of output and of 8-bit pages in shared memory; None if there is not enough of it."""
    queries = 2 * _TILE * H
    out_columns, piece = _out_columns(H)
    pieces = out_columns // piece
    raw = config.block_kv * (H + 4) if jnp.dtype(kv_dtype).itemsize == 1 else 0
    left = _SHARED_MEMORY - 2048 - 4 * config.stages * config.block_kv * H  # barriers and the like; keys and values
    raw_wanted = 2 if raw else 0
    for slots in ((2, pieces, raw_wanted), (1, pieces, raw_wanted), (1, 1, raw_wanted), (1, 1, raw_wanted // 2)):
        q_slots, out_slots, raw_slots = slots
        if q_slots * queries + out_slots * _TILE * piece * 2 + raw_slots * raw <= left:
            return slots
    return None


def supported(
    q,
    k_pages,
    v_pages,
    page_table,
    kv_lens,
    query_starts,
    *,
    scale,
    config=None,
    interpret=False,
    window=None,
    soft_cap=None,
    alibi_slopes=None,
    k_scales=None,
    v_scales=None,
):
    """None, or why this kernel cannot take the call."""
    H, page_size = q.shape[2], k_pages.shape[2]
    config = config or choose_config(H, k_pages.dtype, alibi_slopes is not None)
    if (reason := mosaic.unsupported(interpret)) is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes queries of bfloat16 or float16, got {q.dtype}"
    if k_pages.dtype not in (q.dtype, jnp.int8, jnp.float8_e4m3fn) or k_pages.dtype != v_pages.dtype:
        return f"takes pages of {q.dtype}, int8 or float8_e4m3fn, got {k_pages.dtype} and {v_pages.dtype}"
    if H % 16 or H > 256:
        return f"takes a head dim that is a multiple of 16 up to 256, got {H}"
    if page_size % _ALIGN or config.block_kv % page_size:
        return f"takes a page size that is a multiple of {_ALIGN} and divides {config.block_kv}, got {page_size}"
    if _room(H, k_pages.dtype, config) is None:
        return f"{config} needs more shared memory than there is for head dim {H}"
    if not scale > 0:
        return f"takes a positive scale, got {scale}"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "interpret"))
def ragged_prefill(
    q,
    k_pages,
    v_pages,
    page_table,
    kv_lens,
    query_starts,
    *,
    scale,
    window=None,
    soft_cap=None,
    alibi_slopes=None,
    k_scales=None,
    v_scales=None,
    config: Config | None = None,
    interpret=False,
):
    """See pallas_kernels.ragged_prefill. `config`: instead of choose_config's; `interpret`: for a CPU, slowly."""
    T, N, H = q.shape
    P, K, page_size, _ = k_pages.shape
    config = config or choose_config(H, k_pages.dtype, alibi_slopes is not None)
    pack = _pack(N // K, config)
    padded = max(_ROWS // pack, T + -T % _ALIGN)
    q = jnp.pad(q, ((0, padded - T), (0, 0), (0, 0)))
    tiles, count = cut_into_tiles(query_starts, kv_lens, padded, _TILE // pack, config.heavy_first)
    blocks = min(tiles.rows.shape[0] * N // pack, config.blocks or mosaic.num_multiprocessors())
    sizes = _Sizes(
        padded, N, K, H, P, page_table.shape[1], page_size, q.dtype, k_pages.dtype, scale, window, soft_cap, config,
        pack, blocks, interpret,
    )  # fmt: skip
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.astype(jnp.float32)
    inputs = _Inputs(page_table, q, k_pages, v_pages, alibi_slopes, k_scales, v_scales)._asdict()
    inputs = {name: array for name, array in inputs.items() if array is not None}
    out = mosaic.kernel(
        functools.partial(_kernel, sizes, tuple(inputs)),
        out_type=jax.ShapeDtypeStruct((padded, N, _out_columns(H)[0]), q.dtype),
        scratch_types=_scratch(sizes),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(jnp.stack(tiles, axis=1), count[None], *inputs.values())
    return out[:T, :, :H]


def _scratch(sizes):
    """The types of _Shared's fields."""
    block_kv, stages, H = sizes.config.block_kv, sizes.config.stages, sizes.H

    def tiled(*shape, line, rows=_ALIGN):
        transforms = plgpu.TilingTransform((rows, line // 2)), plgpu.SwizzleTransform(line)
        return plgpu.SMEM(shape, sizes.dtype, transforms=transforms)

    line = _swizzle(H)
    q_slots, out_slots, raw_slots = _room(H, sizes.kv_dtype, sizes.config)
    piece = _out_columns(H)[1]
    pages = block_kv // sizes.page_size
    return [
        tiled(2 * q_slots, _ROWS, H, line=line),
        tiled(2, out_slots, _ROWS, piece, line=128, rows=1)
        if piece == 64
        else plgpu.SMEM((2, 1, _ROWS, piece), sizes.dtype),
        tiled(stages, block_kv, H, line=line),
        tiled(stages, block_kv, H, line=line),
        plgpu.SMEM((raw_slots, block_kv, H), sizes.kv_dtype) if raw_slots else None,
        plgpu.SMEM((raw_slots, block_kv), jnp.float32) if raw_slots else None,
        tiled(2, _ROWS, block_kv, line=128) if sizes.interpret else None,
        plgpu.Barrier(num_arrivals=sizes.pack, num_barriers=2 * q_slots),
        plgpu.Barrier(num_arrivals=1 if raw_slots else pages, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1 if raw_slots else pages, num_barriers=stages),
        None if raw_slots else plgpu.Barrier(num_arrivals=pages),
        plgpu.Barrier(num_arrivals=2 * pages, num_barriers=raw_slots) if raw_slots else None,
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_barriers=2),
    ]
