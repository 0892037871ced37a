"""The body of ragged_prefill's Hopper kernel: what each warpgroup does. See mosaic_gpu."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.ragged_prefill.sizes import ALIGN, MASKED, ROWS, Sizes, line_bytes, out_columns, room


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


def kernel(sizes: Sizes, names, tiles_ref, count_ref, *refs):
    """`names`: which of Inputs there are."""
    inputs = Inputs(**(dict.fromkeys(Inputs._fields) | dict(zip(names, refs, strict=False))))
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


class Inputs(NamedTuple):
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

    sizes: Sizes
    inputs: Inputs
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
        """Fetches the 8-bit pages of steps begin <= step < end, one step ahead, and makes 16-bit ones of them."""
        shared, inputs = self.shared, self.inputs

        def fetch_raw(step, raw_slot, source, scales):
            ids, fetched = self.ids(step), shared.raw_fetched.at[raw_slot]
            self.copy(ids, source, shared.raw.at[raw_slot], fetched)
            self.copy(ids, scales, shared.raw_scales.at[raw_slot], fetched)

        keys = functools.partial(fetch_raw, raw_slot=0, source=inputs.k, scales=inputs.k_scales)
        values = functools.partial(fetch_raw, raw_slot=1, source=inputs.v, scales=inputs.v_scales)

        def convert_step(step, fetch, raw_slot, target, used, ready):
            slot = _slot(self.sizes, self.base + step)
            plgpu.barrier_wait(shared.raw_fetched.at[raw_slot])
            self.wait_for(used, step)
            valid = self.tile.kv_len - step * self.sizes.config.block_kv
            _dequantize(shared.raw.at[raw_slot], shared.raw_scales.at[raw_slot], target.at[slot], valid, self.sizes)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready.at[slot])
            pl.when(step + 1 < end)(lambda: fetch(step + 1))

        def body(step, _):
            convert_step(step, keys, 0, shared.k, shared.k_used, shared.k_ready)
            convert_step(step, values, 1, shared.v, shared.v_used, shared.v_ready)

        keys(begin)
        values(begin)
        lax.fori_loop(begin, end, body, None)


def _dequantize(raw, scales, target, valid, sizes):
    """target [block_kv, H] = raw [block_kv, H] of 8 bits, times scales [block_kv]; zeros from row `valid` on."""
    columns = line_bytes(sizes.H) // 2
    for row in range(0, sizes.config.block_kv, ROWS):
        rows = pl.ds(row, ROWS)
        row_scales = plgpu.load(scales.at[rows], layout=plgpu.Layout.WGMMA.reduce(1))
        for column in range(0, sizes.H, columns):
            part = rows, pl.ds(column, columns)
            values = plgpu.load(raw.at[part], layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
            ids = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
            values = jnp.where(ids + row < valid, values * lax.broadcast_in_dim(row_scales, values.shape, [0]), 0.0)
            target[part] = values.astype(target.dtype)


def _zero_rows(ref, start, sizes):
    """Zeros rows `start` and after of ref [block_kv, H], in pieces: the fetching warpgroup has few registers."""
    columns = line_bytes(sizes.H) // 2
    for row in range(0, sizes.config.block_kv, ROWS):

        @pl.when(start < row + ROWS)
        def _(row=row):
            for column in range(0, sizes.H, columns):
                piece = ref.at[pl.ds(row, ROWS), pl.ds(column, columns)]
                ids = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 0, layout=plgpu.Layout.WGMMA)
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

        acc = plgpu.layout_cast(jnp.zeros((ROWS, sizes.H), jnp.float32), plgpu.Layout.WGMMA)
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

    sizes: Sizes
    jobs: _Jobs
    warpgroup: jax.Array
    inputs: Inputs
    shared: _Shared

    @property
    def tokens(self):
        return ROWS // self.sizes.pack

    def first_token(self, tile):
        return pl.multiple_of(tile.first + self.warpgroup * self.tokens, ALIGN)

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

    sizes: Sizes
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
                scores = jnp.where(seen, scores, MASKED)
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
    zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
    return _Softmax(None, plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), row_layout), zeros, zeros)


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
    products = pl.run_scoped(products_of, plgpu.ACC((ROWS, sizes.config.block_kv), jnp.float32))
    plgpu.barrier_arrive(shared.k_used.at[0])
    return _rounded(sizes, _add_scores(products, scores, _no_scores()))


def _step(sizes, warpgroup, shared, turns, index, q_slot, scores, acc, softmax, exists=True):
    """Adds the values of step index - 1 to acc, and the scores of step `index` to the softmax, if that `exists`.

    Both products are issued at once, and the softmax runs beside the second (FlashAttention-3, section 3.2).
    """
    k_slot, v_slot = _slot(sizes, index), _slot(sizes, index - 1)
    keys, values = shared.k.at[k_slot].transpose((1, 0)), shared.v.at[v_slot]
    products_type = plgpu.ACC((ROWS, sizes.config.block_kv), jnp.float32)

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
    tokens = ROWS // sizes.pack
    first = pl.multiple_of(tile.first + warpgroup * tokens, ALIGN)
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
                target = shared.out.at[warpgroup, slot, :, pl.ds(c, width)]
                mosaic.store(target, out[:, part.start + c : part.start + c + width])
        plgpu.commit_smem()
        start, count = lo - first, tokens
        while count:  # a copy's size is static: the largest first that fit
            fits = start + count <= hi - first

            @pl.when(fits)
            def _(start=start, count=count, parts=parts):
                for slot, part in enumerate(parts):
                    store(start, count, slot, part)

            start, count = start + jnp.where(fits, count, 0), count // 2


def scratch(sizes):
    """The types of _Shared's fields."""
    block_kv, stages, H = sizes.config.block_kv, sizes.config.stages, sizes.H

    def tiled(*shape, line, rows=ALIGN):
        transforms = plgpu.TilingTransform((rows, line // 2)), plgpu.SwizzleTransform(line)
        return plgpu.SMEM(shape, sizes.dtype, transforms=transforms)

    line = line_bytes(H)
    q_slots, out_slots, raw_slots = room(H, sizes.kv_dtype, sizes.config)
    piece = out_columns(H)[1]
    pages = block_kv // sizes.page_size
    return [
        tiled(2 * q_slots, ROWS, H, line=line),
        tiled(2, out_slots, ROWS, piece, line=128, rows=1)
        if piece == 64
        else plgpu.SMEM((2, 1, ROWS, piece), sizes.dtype),
        tiled(stages, block_kv, H, line=line),
        tiled(stages, block_kv, H, line=line),
        plgpu.SMEM((raw_slots, block_kv, H), sizes.kv_dtype) if raw_slots else None,
        plgpu.SMEM((raw_slots, block_kv), jnp.float32) if raw_slots else None,
        tiled(2, ROWS, block_kv, line=128) if sizes.interpret else None,
        plgpu.Barrier(num_arrivals=sizes.pack, num_barriers=2 * q_slots),
        plgpu.Barrier(num_arrivals=1 if raw_slots else pages, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1 if raw_slots else pages, num_barriers=stages),
        None if raw_slots else plgpu.Barrier(num_arrivals=pages),
        plgpu.Barrier(num_arrivals=2 * pages, num_barriers=raw_slots) if raw_slots else None,
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_barriers=2),
    ]
