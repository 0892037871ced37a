"""The body of mla_decode's Hopper kernel: what each warpgroup does. What is computed is said in mosaic_gpu.py.

Arrays of scores and weights are [heads, keys], sums are [heads, elements of a value].
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.paged_decode.schedule import Span
from pallas_kernels.paged_decode.share import Share

LOG2_E = math.log2(math.e)
# Finite, so that the difference of two masked scores is 0 and not NaN.
MASKED = -1e30
HEADS = 64  # rows that the tensor cores take
BLOCK = 64  # keys of a step
ROTARY = 64  # elements of a key that are not the value; the weights of a step, [HEADS, BLOCK], take their place
HALVES = 2  # a value's elements are divided among so many warpgroups
# A number for each head, where sums over the keys of a WGMMA-shaped array leave it.
BY_HEAD = plgpu.Layout.WGMMA.reduce(1)


class Sizes(NamedTuple):
    """Static sizes and options of a call. `num_ctas` and `stages` are Config's."""

    S: int
    N: int
    V: int
    page_size: int
    stages: int
    num_ctas: int
    dtype: Any
    scale: float
    interpret: bool

    @property
    def H(self):
        """Elements of a query or key."""
        return self.V + ROTARY

    @property
    def half(self):
        """Elements of a value that one warpgroup sums."""
        return self.V // HALVES

    @property
    def piece(self):
        """Elements of a value that one instruction sums: 256 need more registers than 512 threads can start with."""
        return math.gcd(self.half, 128)

    @property
    def heads(self):
        """In a head block."""
        return min(self.N, HEADS)

    @property
    def head_blocks(self):
        return self.N // self.heads

    @property
    def span(self):
        return Span(BLOCK, queries=1, window=None)

    @property
    def pages(self):
        """Of a block."""
        return BLOCK // self.page_size


class Inputs(NamedTuple):
    """References to arrays in global memory; the last three are the schedule's."""

    q: Any  # [S, N, H]
    pages: Any  # [P, page_size, H]
    table: Any  # i32[S, W]
    lens: Any  # i32[S]
    starts: Any
    next_row: Any
    shares: Any


class Outputs(NamedTuple):
    """And the workspace: for each CTA, part 0 is of a row and head block that began earlier, 1 of one that goes on."""

    out: Any  # [S, N, V]
    acc: Any  # float32 [2, num_ctas, HEADS, V]
    top: Any  # float32 [2, num_ctas, HEADS], and so is `total`
    total: Any


class Shared(NamedTuple):
    """Shared memory of a CTA; the first index, but of the queries, is the slot.

    full    a block's pages are there
    ready   its weights are where its rotary parts were, and their `decay` and `total` are there
    empty   both warpgroups have taken in its values
    """

    q: Any
    keys: Any
    decay: Any  # what sums up to the block before are to be multiplied with
    total: Any  # of the weights up to this block
    q_full: Any
    full: Any
    ready: Any
    empty: Any


def scratch(sizes: Sizes):
    """Types of `Shared`."""

    def tiled(*shape):
        return plgpu.SMEM(shape, sizes.dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    return [
        tiled(1, HEADS, sizes.H),
        tiled(sizes.stages, BLOCK, sizes.H),
        plgpu.SMEM((sizes.stages, HEADS), jnp.float32),
        plgpu.SMEM((sizes.stages, HEADS), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=sizes.pages, num_barriers=sizes.stages),
        plgpu.Barrier(num_barriers=sizes.stages),
        plgpu.Barrier(num_arrivals=HALVES, num_barriers=sizes.stages),
    ]


def kernel(sizes: Sizes, *refs):
    """A CTA of four warpgroups."""
    num_inputs, num_outputs = len(Inputs._fields), len(Outputs._fields)
    inputs, refs = Inputs(*refs[:num_inputs]), refs[num_inputs:]
    shared, warpgroup = Shared(*refs[num_outputs:]), lax.axis_index("warpgroup")

    def run(role):
        """What a warpgroup does. Each reads its CTA's share for itself: registers before this would be all roles'."""
        role(_Cta(sizes, inputs, Outputs(*refs[:num_outputs]), shared))

    for half in range(HALVES):

        @pl.when(warpgroup == half)
        def _(half=half):
            plgpu.set_max_registers(192, action="increase")
            run(functools.partial(_Cta.sum_values, half=half))

    @pl.when(warpgroup == HALVES)
    def _():
        plgpu.set_max_registers(96, action="decrease")
        run(_Cta.weigh)

    @pl.when(warpgroup == HALVES + 1)
    def _():
        plgpu.set_max_registers(32, action="decrease")
        run(_Cta.copy)


def along_row(x, columns):
    """A number for each head -> [heads, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


class _Segment(NamedTuple):
    """What of one (row, head block) is in this CTA: blocks `begin` to `stop` of the row's `row_blocks`.

    Among the CTA's own blocks they are number `first` to `end`.
    """

    row: jax.Array
    head_block: jax.Array
    kv_len: jax.Array
    begin: jax.Array
    stop: jax.Array
    row_blocks: jax.Array
    first: jax.Array
    end: jax.Array

    @property
    def is_whole(self):
        return (self.begin == 0) & (self.stop == self.row_blocks)

    @property
    def part(self):
        """Where in the workspace its sums go, if it is not whole."""
        return jnp.where(self.begin > 0, 0, 1)


class _Cta(Share):
    """One CTA's share of the work, and the warpgroups that do it. A head of the share is a block of HEADS."""

    def __init__(self, sizes, inputs, outputs, shared):
        self.outputs, self.shared = outputs, shared
        index = lax.axis_index("cta")
        super().__init__(index, sizes, inputs, heads=sizes.head_blocks, page_tokens=sizes.page_size)

    def slot(self, i):
        return lax.rem(i, jnp.int32(self.sizes.stages))

    def for_each_segment(self, body):
        """Calls body(segment) on the CTA's segments, one after the other."""

        def step(state):
            i, row, head_block, begin = state
            kv_len = self.inputs.lens[row]
            row_blocks = self.sizes.span.count(kv_len)
            stop = begin + jnp.minimum(row_blocks - begin, self.count - i)
            segment = _Segment(row, head_block, kv_len, begin, stop, row_blocks, i, i + stop - begin)
            body(segment)
            return segment.end, *self.next_segment(row, head_block), jnp.int32(0)

        start = jnp.int32(0), self.row, self.head, self.block
        lax.while_loop(lambda state: state[0] < self.count, step, start)

    # --- the warpgroup that copies

    def copy(self):
        """Brings the CTA's blocks, one after the other, as slots become free."""
        sizes = self.sizes

        def copy(i, _, ids):
            slot = self.slot(i)

            @pl.when(i >= sizes.stages)
            def _():
                plgpu.barrier_wait(self.shared.empty.at[slot])

            for page, id in enumerate(ids):
                rows = pl.ds(page * sizes.page_size, sizes.page_size)
                target = self.shared.keys.at[slot, rows]
                plgpu.copy_gmem_to_smem(self.inputs.pages.at[id], target, self.shared.full.at[slot])

        self.for_each_block(copy)
        self.zero_unused_rows()

    def zero_unused_rows(self):
        sizes, out = self.sizes, self.outputs.out

        def zero(row):
            layout = plgpu.Layout.WG_STRIDED((8, sizes.V), vec_size=4)
            for head in range(0, sizes.N, 8):
                out[row, head : head + 8] = plgpu.layout_cast(jnp.zeros((8, sizes.V), out.dtype), layout)

        self.for_each_unused_row(zero)

    # --- the warpgroup that makes weights of keys

    def weigh(self):
        pl.when(self.count > 0)(lambda: self.load_queries(self.row, self.head))

        def weigh_segment(segment):
            plgpu.barrier_wait(self.shared.q_full)
            zeros = plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), BY_HEAD)
            state = zeros + MASKED, zeros
            step = functools.partial(self.weigh_block, segment=segment)
            top, total = lax.fori_loop(segment.first, segment.end, step, state)

            @pl.when(~segment.is_whole)
            def _():
                self.outputs.top[segment.part, self.index] = top
                self.outputs.total[segment.part, self.index] = total

        self.for_each_segment(weigh_segment)

    def load_queries(self, row, head_block):
        heads = self.sizes.heads
        source = self.inputs.q.at[row, pl.ds(pl.multiple_of(head_block * heads, 8), heads)]
        plgpu.copy_gmem_to_smem(source, self.shared.q.at[0, pl.ds(0, heads)], self.shared.q_full)

    def weigh_block(self, i, state, *, segment):
        """Online softmax over block number i; leaves in shared memory what sum_values takes."""
        shared, V = self.shared, self.sizes.V
        top, total = state
        slot = self.slot(i)
        left = segment.kv_len - (i - segment.first + segment.begin) * BLOCK
        plgpu.barrier_wait(shared.full.at[slot])
        pl.when(left < BLOCK)(lambda: self.silence_values(slot, left))

        def product(ref):
            # i is never negative, but the compiler does not know and so keeps no 36 addresses in registers.
            plgpu.wgmma(ref, shared.q.at[jnp.minimum(i, 0)], shared.keys.at[slot].T)
            return ref[...]

        scores = pl.run_scoped(product, plgpu.ACC((HEADS, BLOCK), jnp.float32)) * (self.sizes.scale * LOG2_E)

        @pl.when((i + 1 == segment.end) & (i + 1 < self.count))
        def _():
            self.load_queries(*self.next_segment(segment.row, segment.head_block))

        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        scores = jnp.where(key < left, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=1))
        decay = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - along_row(new_top, BLOCK))
        total = total * decay + weights.sum(axis=1)
        shared.keys[slot, :, V : V + BLOCK] = weights.astype(self.sizes.dtype)
        shared.decay[slot] = decay
        shared.total[slot] = total
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.ready.at[slot])
        return new_top, total

    def silence_values(self, slot, left):
        """Zeros in values past the row's end, `left` keys on: a weight of zero would not silence a NaN."""
        for column in range(0, self.sizes.V, 64):  # piece by piece, for registers are few
            ref = self.shared.keys.at[slot, :, pl.ds(column, 64)]
            values = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
            key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
            ref[...] = jnp.where(key < left, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    # --- the two warpgroups that sum values, each half of their elements

    def sum_values(self, half):
        sizes, width = self.sizes, self.sizes.piece
        pieces = range(half * sizes.half, (half + 1) * sizes.half, width)

        def sum_segment(segment):
            zeros = plgpu.layout_cast(jnp.zeros((HEADS, width), jnp.float32), plgpu.Layout.WGMMA)
            total = plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), BY_HEAD)
            step = functools.partial(self.add_values, pieces=pieces, end=segment.end)
            accs, total = lax.fori_loop(segment.first, segment.end, step, ((zeros,) * len(pieces), total))

            @pl.when(segment.is_whole)
            def _():
                factor = along_row(1.0 / total, width)
                self.store(segment, pieces, [acc * factor for acc in accs])

            @pl.when(~segment.is_whole)
            def _():
                for first, acc in zip(pieces, accs, strict=True):
                    self.outputs.acc[segment.part, self.index, :, first : first + width] = acc

            self.release(segment.end - 1)

        self.for_each_segment(sum_segment)
        plgpu.wait_smem_to_gmem(0)

    def add_values(self, i, state, *, pieces, end):
        """Adds block number i's weighted values to the sums. Releases its slot, unless it is the segment's last."""
        shared, slot, width = self.shared, self.slot(i), self.sizes.piece
        weights = shared.keys.at[slot, :, pl.ds(self.sizes.V, BLOCK)]
        values = [shared.keys.at[slot, :, pl.ds(first, width)] for first in pieces]
        plgpu.barrier_wait(shared.full.at[slot])
        plgpu.barrier_wait(shared.ready.at[slot])
        accs, _ = state
        total = plgpu.load(shared.total.at[slot], layout=BY_HEAD, optimized=False)
        decay = along_row(plgpu.load(shared.decay.at[slot], layout=BY_HEAD, optimized=False), width)
        accs = tuple(acc * decay for acc in accs)

        def multiply(refs):
            for ref, piece in zip(refs, values, strict=True):
                plgpu.wgmma(ref, weights, piece)

        def product(ref, piece):
            plgpu.wgmma(ref, weights, piece)
            return ref[...]

        if self.sizes.interpret:  # has no run_state
            acc_type = plgpu.ACC((HEADS, width), jnp.float32)
            products = [pl.run_scoped(functools.partial(product, piece=piece), acc_type) for piece in values]
            accs = tuple(acc + product for acc, product in zip(accs, products, strict=True))
        else:
            accs = pl.run_state(multiply)(tuple(plgpu.ACC.init(acc) for acc in accs))
        pl.when(i + 1 < end)(lambda: self.release(i))
        return accs, total

    def release(self, i):
        """Lets the slot of block number i be filled again, if there is something to fill it with."""

        @pl.when(i + self.sizes.stages < self.count)
        def _():
            plgpu.barrier_arrive(self.shared.empty.at[self.slot(i)])

    def store(self, segment, pieces, outs):
        """Stores the segment's output, by way of where its last block's values were."""
        heads, slot = self.sizes.heads, self.slot(segment.end - 1)
        for first, out in zip(pieces, outs, strict=True):
            self.shared.keys[slot, :, first : first + self.sizes.piece] = out.astype(self.outputs.out.dtype)
        plgpu.commit_smem()
        columns = pl.ds(pieces.start, self.sizes.half)
        for head in range(0, heads, 8):  # what lies together in shared memory
            target = pl.ds(pl.multiple_of(segment.head_block * heads + head, 8), 8)
            source = self.shared.keys.at[slot, pl.ds(head, 8), columns]
            plgpu.copy_smem_to_gmem(source, self.outputs.out.at[segment.row, target, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
