"""The Hopper kernel of paged_decode. What it computes and how the work is cut is said in mosaic_gpu.py.

Arrays of scores are [keys, columns] and sums are [elements of a value, columns]; a column is a query of one head.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.paged_decode.schedule import Span, divide, owner
from pallas_kernels.paged_decode.share import Share

LOG2_E = math.log2(math.e)
# Finite, so that the difference of two masked scores is 0 and not NaN.
MASKED = -1e30
LINE = 64  # rows that the tensor cores take at least
# A number for each column, where sums over the keys of a WGMMA-shaped array leave it.
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Sizes(NamedTuple):
    """Static sizes and options of a call.

    K, H        KV heads; elements of a line of pages, which holds `fold` tokens
    tile        columns that are computed at once
    group       columns of a KV head: (query, query head, fold)
    padded      whether a tile is one KV head's, filled up
    page_lines  of a page
    span        which blocks a row needs
    stages, num_ctas    Config's
    kv_dtype    of the pages
    dtype       of what the tensor cores take
    """

    S: int
    K: int
    H: int
    tile: int
    group: int
    padded: bool
    fold: int
    page_lines: int
    span: Span
    stages: int
    num_ctas: int
    kv_dtype: Any
    dtype: Any
    out_dtype: Any
    scale: float
    soft_cap: float | None
    interpret: bool

    @property
    def scaled(self):
        """Whether the pages are of 8 bits, with a scale for each token."""
        return jnp.dtype(self.kv_dtype).itemsize == 1

    @property
    def weight_unit(self):
        """What weights times scales of values are multiplied with: they are too small for float16 as they are."""
        return 2.0**12 if self.scaled and self.dtype == jnp.float16 else 1.0

    @property
    def block(self):
        """Lines of a block."""
        return self.span.block // self.fold

    @property
    def pages(self):
        """Pages of a block."""
        return self.block // self.page_lines

    @property
    def V(self):
        """Elements of a value in shared memory: the tensor cores take a multiple of 64 of its rows when transposed."""
        return self.H + -self.H % LINE

    @property
    def value_copies(self):
        """In how many copies a page's values come. Where shared memory has wider rows, only 8 of them lie together.

        What follows a value there is anything, and so is that part of the output.
        """
        return 1 if self.V == self.H else self.page_lines // 8

    @property
    def copies(self):
        """How many copies bring a page: keys, values, and the scales of both."""
        return 1 + self.value_copies + 2 * self.scaled

    @property
    def at_once(self):
        """How many parts of a sum fit in registers while they are merged."""
        alone = self.num_ctas <= mosaic.num_multiprocessors()  # with all of the multiprocessor's registers
        return max(1, (8192 if alone else 4096) // (self.tile * self.V))


class Inputs(NamedTuple):
    """References to arrays in global memory; see mosaic_gpu._call."""

    q: Any
    k: Any
    v: Any
    table: Any
    lens: Any
    starts: Any
    next_row: Any
    shares: Any
    slopes: Any = None
    k_scales: Any = None
    v_scales: Any = None


class Outputs(NamedTuple):
    """And the workspace: a part of a sum for each CTA."""

    out: Any
    weight: Any
    acc: Any
    top: Any
    total: Any


class Shared(NamedTuple):
    """Shared memory of a CTA; the first index is the slot. The last three are there for pages of 8 bits."""

    q: Any
    k: Any
    v: Any
    weights: Any
    out: Any
    q_full: Any
    full: Any
    empty: Any
    k_scales: Any
    v_scales: Any
    converted: Any  # a block's values as the tensor cores take them; interpreted, its keys before


def scratch(sizes: Sizes):
    """Types of `Shared`."""
    line = math.gcd(sizes.H, LINE)  # the tensor cores want both factors of a product in lines of the same length

    def tiled(*shape, dtype=sizes.dtype):
        swizzle = plgpu.SwizzleTransform(line * jnp.dtype(dtype).itemsize)
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, line)), swizzle))

    kv = functools.partial(tiled, dtype=sizes.kv_dtype)
    scales = plgpu.SMEM((sizes.stages, sizes.block), jnp.float32) if sizes.scaled else None
    return [
        tiled(2, sizes.tile, sizes.H),
        kv(sizes.stages, sizes.block, sizes.H),
        kv(sizes.stages, sizes.block, sizes.V),
        tiled(sizes.tile, sizes.block),
        plgpu.SMEM((sizes.tile, sizes.V), sizes.out_dtype),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=sizes.copies * sizes.pages, num_barriers=sizes.stages),
        plgpu.Barrier(num_barriers=sizes.stages),
        scales,
        scales,
        tiled(sizes.block, sizes.H) if sizes.scaled else None,
    ]


def kernel(sizes: Sizes, names, *refs):
    """A CTA. `names`: of the inputs that there are."""
    inputs = Inputs(**dict(zip(names, refs, strict=False)))
    refs = refs[len(names) :]
    cta = _Cta(sizes, inputs, Outputs(*refs[:5]), Shared(*refs[5:]))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when((warpgroup == 1) & (cta.count > 0))
    def _():
        cta.copy()

    @pl.when(warpgroup == 1)
    def _():
        cta.zero_unused_rows()

    @pl.when((warpgroup == 0) & (cta.count > 0))
    def _():
        cta.compute()

    @pl.when(warpgroup == 0)
    def _():
        plgpu.wait_smem_to_gmem(0)


def along_keys(x, rows):
    """A number for each column -> [rows, columns]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def along_columns(x, columns):
    """A number for each key -> [keys, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def _load_scales(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def add_sums(ours, theirs):
    """Sums over some keys and over others -> sums over all of them."""
    (top, total, acc), (other_top, other_total, other_acc) = ours, theirs
    new_top = jnp.maximum(top, other_top)
    keep, take = jnp.exp2(top - new_top), jnp.exp2(other_top - new_top)
    acc = acc * along_keys(keep, acc.shape[0]) + other_acc * along_keys(take, acc.shape[0])
    return new_top, total * keep + other_total * take, acc


class _Segment(NamedTuple):
    """What of one (row, head) is in this CTA: blocks `begin` to `stop` of the row's `row_blocks`."""

    row: jax.Array
    head: jax.Array
    begin: jax.Array
    stop: jax.Array
    row_blocks: jax.Array


class _Cta(Share):
    """One CTA's share of the work, and the two warpgroups that do it."""

    def __init__(self, sizes, inputs, outputs, shared):
        self.outputs, self.shared = outputs, shared
        G = sizes.num_ctas
        index = G - 1 - lax.axis_index("cta")  # which share of the work this one has
        # How many parts of a CTA's last segment lie in the workspace. Interpreted, CTAs run in order: no need to wait.
        self.arrived = None if sizes.interpret else pl.get_global(plgpu.SemaphoreType.REGULAR((G,)))
        super().__init__(index, sizes, inputs, heads=sizes.K, page_tokens=sizes.page_lines * sizes.fold)

    # --- the warpgroup that copies

    def copy(self):
        """Brings the CTA's blocks, one after the other, as slots become free."""

        def copy(i, head, ids):
            slot = lax.rem(i, jnp.int32(self.sizes.stages))

            @pl.when(i >= self.sizes.stages)
            def _():
                plgpu.barrier_wait(self.shared.empty.at[slot])

            self.copy_block(slot, ids, head)

        self.for_each_block(copy)

    def copy_block(self, slot, ids, head):
        sizes, shared, full = self.sizes, self.shared, self.shared.full.at[slot]
        for page, id in enumerate(ids):
            first, rows = page * sizes.page_lines, sizes.page_lines // sizes.value_copies
            plgpu.copy_gmem_to_smem(self.inputs.k.at[id, head], shared.k.at[slot, pl.ds(first, sizes.page_lines)], full)
            for row in range(0, sizes.page_lines, rows):
                source = self.inputs.v.at[id, head, pl.ds(row, rows)]
                target = shared.v.at[slot, pl.ds(first + row, rows), pl.ds(0, sizes.H)]
                plgpu.copy_gmem_to_smem(source, target, full)
            if sizes.scaled:
                keys = pl.ds(first, sizes.page_lines)
                plgpu.copy_gmem_to_smem(self.inputs.k_scales.at[id, head], shared.k_scales.at[slot, keys], full)
                plgpu.copy_gmem_to_smem(self.inputs.v_scales.at[id, head], shared.v_scales.at[slot, keys], full)

    def zero_unused_rows(self):
        out = self.outputs.out

        def zero(row):
            shape = out.shape[1:]
            layout = plgpu.Layout.WG_STRIDED(shape, vec_size=math.gcd(4, math.prod(shape) // 128))
            out[row] = plgpu.layout_cast(jnp.zeros(shape, out.dtype), layout)

        self.for_each_unused_row(zero)

    # --- the warpgroup that computes

    def compute(self):
        sizes = self.sizes
        self.load_queries(self.row, self.head, 0)

        def next_segment(state):
            i, row, head, begin, number = state
            kv_len = self.inputs.lens[row]
            row_blocks = sizes.span.count(kv_len)
            segment = _Segment(row, head, begin, begin + jnp.minimum(row_blocks - begin, self.count - i), row_blocks)
            q_slot = lax.rem(number, jnp.int32(2))
            next_row, next_head = self.next_segment(row, head)
            stop = i + segment.stop - segment.begin

            @pl.when(stop < self.count)
            def _():
                self.load_queries(next_row, next_head, 1 - q_slot)

            plgpu.barrier_wait(self.shared.q_full.at[q_slot])
            self.finish(segment, self.attend(i, segment, kv_len, q_slot))
            return stop, next_row, next_head, jnp.int32(0), number + 1

        zero = jnp.int32(0)
        lax.while_loop(lambda state: state[0] < self.count, next_segment, (zero, self.row, self.head, self.block, zero))

    def tile_of(self, head):
        return head if self.sizes.padded else divide(head * self.sizes.group, self.sizes.tile)

    def load_queries(self, row, head, slot):
        source = self.inputs.q.at[row, self.tile_of(head)]
        plgpu.copy_gmem_to_smem(source, self.shared.q.at[slot], self.shared.q_full.at[slot])

    def attend(self, i, segment, kv_len, q_slot):
        """Sums over the segment's blocks, the first of which is the CTA's i-th: (top, total, acc)."""
        sizes = self.sizes
        start, end = i, i + segment.stop - segment.begin
        # Blocks are counted from the CTA's first one: the row's block b is number b + shift.
        shift = i - segment.begin - sizes.span.first(kv_len)
        full_start, full_stop = (b + shift for b in sizes.span.full(kv_len))
        full_start = start if sizes.span.window is None else jnp.clip(full_start, start, end)
        full_stop = jnp.clip(full_stop, full_start, end)

        def sums(rows, value):
            return plgpu.layout_cast(jnp.full((rows, sizes.tile), value, jnp.float32), plgpu.Layout.WGMMA)

        top = plgpu.layout_cast(jnp.full((sizes.tile,), MASKED, jnp.float32), BY_COLUMN)
        state = top, sums(sizes.block, 0.0), sums(sizes.V, 0.0)
        slopes = None
        if self.inputs.slopes is not None:
            slopes = plgpu.load(self.inputs.slopes.at[self.tile_of(segment.head)], layout=BY_COLUMN, optimized=False)
        left = kv_len + shift * sizes.span.block
        add = functools.partial(self.add_block, q_slot=q_slot, tokens_left=left, slopes=slopes)
        masked, full = functools.partial(add, masked=True), functools.partial(add, masked=False)
        if sizes.span.window is not None:
            state = lax.fori_loop(start, full_start, masked, state)
        state = lax.fori_loop(full_start, full_stop, full, state)
        top, total, acc = lax.fori_loop(full_stop, end, masked, state)
        return top, total.sum(axis=0), acc

    def add_block(self, i, state, *, q_slot, tokens_left, slopes, masked):
        """Online softmax over a block. `tokens_left`: from the CTA's first block to the end of the row."""
        sizes, shared = self.sizes, self.shared
        top, total, acc = state
        slot = lax.rem(i, jnp.int32(sizes.stages))
        keys = _Keys(sizes, tokens_left - i * sizes.span.block)
        plgpu.barrier_wait(shared.full.at[slot])
        if sizes.scaled:
            values_smem = shared.converted
            v_scales = _load_scales(shared.v_scales.at[slot]) * sizes.weight_unit
            products = self.products_of_8_bits(slot, q_slot, keys, masked)
        else:
            values_smem = shared.v.at[slot]
            products = self.products(slot, q_slot, keys, masked)
        scores = keys.scores(products, slopes)
        if masked:
            scores = jnp.where(keys.visible(), scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=0))
        decay = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - along_keys(new_top, sizes.block))
        total = total * along_keys(decay, sizes.block) + weights
        if sizes.scaled:
            weights *= along_columns(v_scales, sizes.tile)
            if masked:  # nor would a weight of zero silence a scale
                weights = jnp.where(keys.visible(), weights, 0.0)
        shared.weights.T[...] = weights.astype(sizes.dtype)
        plgpu.commit_smem()
        if sizes.scaled:  # what was in the slot is in registers and in shared.converted
            self.release(i, slot)

        def weighted_values(values_ref):
            plgpu.wgmma(values_ref, values_smem.T, shared.weights.T)
            return values_ref[...]

        values = pl.run_scoped(weighted_values, plgpu.ACC((sizes.V, sizes.tile), jnp.float32))
        acc = acc * along_keys(decay, sizes.V) + values
        if not sizes.scaled:
            self.release(i, slot)
        return new_top, total, acc

    def release(self, i, slot):
        """Lets the slot of block i be filled again, if there is something to fill it with."""

        @pl.when(i + self.sizes.stages < self.count)
        def _():
            plgpu.barrier_arrive(self.shared.empty.at[slot])

    def products(self, slot, q_slot, keys, masked):
        """float32 [block, tile], keys times queries. What no query sees of a masked block becomes zeros."""
        sizes, shared = self.sizes, self.shared
        if masked:
            keys.silence(shared.v.at[slot])
            if sizes.fold > 1:  # or else a key is all there or not at all, and its score is masked
                keys.silence(shared.k.at[slot])
            plgpu.commit_smem()

        def product(ref):
            plgpu.wgmma(ref, shared.k.at[slot], shared.q.at[q_slot].T)
            return ref[...]

        return pl.run_scoped(product, plgpu.ACC((sizes.block, sizes.tile), jnp.float32))

    def products_of_8_bits(self, slot, q_slot, keys, masked):
        """The same of pages of 8 bits, and their values to shared.converted.

        Keys go to the tensor cores from registers. Values cannot, for the tensor cores want them transposed.
        """
        sizes, shared = self.sizes, self.shared
        scales = _load_scales(shared.k_scales.at[slot])
        # Piece by piece, for the registers of two CTAs must fit.
        pieces = [pl.ds(column, LINE) for column in range(0, sizes.H, LINE)]

        def load(ref, piece):
            ref = ref.at[slot, :, piece]
            return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False).astype(sizes.dtype)

        def convert_values():
            for piece in pieces:
                v = load(shared.v, piece)
                if masked and sizes.kv_dtype != jnp.int8:  # which has no NaN, and weights of zero
                    v = jnp.where(keys.seen(LINE), v, jnp.zeros_like(v))
                shared.converted[:, piece] = v

        def product(ref):
            if sizes.interpret:  # has no wgmma of registers
                for piece in pieces:
                    shared.converted[:, piece] = load(shared.k, piece)
                plgpu.commit_smem()
                plgpu.wgmma(ref, shared.converted, shared.q.at[q_slot].T)
                return ref[...]
            for piece in pieces:
                plgpu.wgmma(ref, load(shared.k, piece), shared.q.at[q_slot, :, piece].T)
            return ref[...]

        products = pl.run_scoped(product, plgpu.ACC((sizes.block, sizes.tile), jnp.float32))
        convert_values()
        return products * along_columns(scales, sizes.tile)

    # --- segments become rows of the output

    def finish(self, segment, sums):
        """Takes in the sums of a segment: to the workspace, or with what lies there to the output."""
        share, rest = self.inputs.shares[0], self.inputs.shares[1]
        first_index = self.index * share + jnp.minimum(self.index, rest)

        @pl.when(segment.begin > 0)
        def _began_in_an_earlier_cta():  # which only a CTA's first segment can have done
            top, total, acc = sums
            parts = self.outputs.acc, self.outputs.top, self.outputs.total
            for ref, value in zip(parts, (acc, top, total), strict=True):
                mosaic.store(ref.at[self.index], value)
            if self.arrived is not None:
                earlier = owner(first_index - segment.begin, share, rest)
                plgpu.semaphore_signal(self.arrived.at[earlier], 1, memory_scope="gpu")

        @pl.when(segment.begin == 0)
        def _begins_here():
            # Only a CTA's last segment can go on in later ones.
            end = first_index + self.count - 1 + segment.row_blocks - segment.stop
            last_cta = jnp.where(segment.stop < segment.row_blocks, owner(end, share, rest), self.index)
            if self.arrived is not None:

                @pl.when(last_cta > self.index)
                def _():
                    others = last_cta - self.index
                    plgpu.semaphore_wait(self.arrived.at[self.index], others, decrement=False, memory_scope="gpu")

            self.store(segment, *self.merge(last_cta, sums))

    def merge(self, last_cta, sums):
        """Adds the parts of the CTAs after this one, up to the last that has any."""
        at_once = self.sizes.at_once
        load = functools.partial(plgpu.load, optimized=False)

        def step(i, sums):
            # Several at once, for each is far away. The last is taken again, without weight, to fill up.
            others = [self.index + 1 + i * at_once + n for n in range(at_once)]
            clamped = [jnp.minimum(other, last_cta) for other in others]
            tops = [load(self.outputs.top.at[n], layout=BY_COLUMN) for n in clamped]
            totals = [load(self.outputs.total.at[n], layout=BY_COLUMN) for n in clamped]
            accs = [load(self.outputs.acc.at[n], layout=plgpu.Layout.WGMMA) for n in clamped]
            for other, *theirs in zip(others, tops, totals, accs, strict=True):
                theirs[0] += jnp.where(other <= last_cta, 0.0, MASKED)
                sums = add_sums(sums, theirs)
            return sums

        return lax.fori_loop(0, divide(last_cta - self.index + (at_once - 1), at_once), step, sums)

    def store(self, segment, top, total, acc):
        sizes, shared, outputs = self.sizes, self.shared, self.outputs
        out = acc / along_keys(total * sizes.weight_unit, sizes.V)
        if sizes.fold > 1:
            mosaic.store(outputs.out.at[segment.row, segment.head], out)
            mosaic.store(outputs.weight.at[segment.row, segment.head], top + jnp.log2(total))
            return
        if sizes.span.queries > 1:  # a query before the row's beginning sees no key
            out = jnp.where(along_keys(top, sizes.V) > MASKED / 2, out, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        mosaic.store(shared.out.T, out.astype(sizes.out_dtype))
        plgpu.commit_smem()
        offset = 0 if sizes.padded else lax.rem(segment.head * sizes.group, jnp.int32(sizes.tile))
        source = shared.out.at[pl.ds(offset, sizes.group)]
        plgpu.copy_smem_to_gmem(source, outputs.out.at[segment.row, segment.head])


class _Keys(NamedTuple):
    """A block's keys. `left`: tokens from the block's first one to the end of the row."""

    sizes: Sizes
    left: jax.Array

    def _left(self, columns, token_of_column):
        """i32 [block, columns]: tokens from an element's own to the end of the row; none or fewer past the end."""
        shape = (self.sizes.block, columns)
        iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA)
        fold = self.sizes.fold
        return self.left - (iota(0) if fold == 1 else iota(0) * fold + token_of_column(iota(1)))

    def _left_of_scores(self):
        return self._left(self.sizes.tile, lambda column: column % self.sizes.fold)

    def scores(self, products, slopes):
        """Scores in powers of two. With slopes, without what is the same for all keys of a query."""
        sizes = self.sizes
        if sizes.soft_cap is None:
            scores = products * (sizes.scale * LOG2_E)
        else:  # tanh from exp2: the hardware's own tanh has 11 bits
            power = jnp.exp2(products * (2 * sizes.scale / sizes.soft_cap * LOG2_E))
            scores = (sizes.soft_cap * LOG2_E) - (2 * sizes.soft_cap * LOG2_E) / (power + 1.0)
        if slopes is not None:
            scores -= along_keys(slopes, sizes.block) * self._left_of_scores().astype(jnp.float32)
        return scores

    def visible(self):
        """Which keys a column's query sees."""
        sizes, span = self.sizes, self.sizes.span
        left, behind = self._left_of_scores(), 0
        if span.queries > 1:
            shape = (sizes.block, sizes.tile)
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            # How many tokens come after the query's own.
            behind = span.queries - 1 - column % sizes.group // (sizes.group // span.queries)
        seen = left > behind
        return seen if span.window is None else seen & (left <= behind + span.window)

    def seen(self, columns):
        """Which elements [block, columns] of keys or values belong to a token that a query sees."""
        span = self.sizes.span
        left = self._left(columns, lambda column: column // (self.sizes.H // self.sizes.fold))
        seen = left > 0
        return seen if span.window is None else seen & (left < span.queries + span.window)

    def silence(self, ref):
        """Zeros where no query sees the token: a weight of zero would not silence a NaN."""
        kv = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
        ref[...] = jnp.where(self.seen(ref.shape[1]), kv, jnp.zeros_like(kv))
