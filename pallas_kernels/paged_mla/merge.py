"""The second, small Hopper kernel of mla_decode: the parts of a row and head block that was cut become its output.

What the parts are is said in mosaic_gpu.py. A CTA merges a few heads of one row and head block, if that was cut at all.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.paged_decode.schedule import divide, owner
from pallas_kernels.paged_mla.kernel import MASKED, Sizes

LOADS = 16  # vectors of a value's size that a CTA asks for at once, for they are far away


def heads_at_once(sizes: Sizes) -> int:
    """Of a CTA. The fewer rows there are, the more CTAs each has, for it is cut into the more parts."""
    return math.gcd(sizes.heads, 1 << max(0, min(8, sizes.S * sizes.N // 1024).bit_length() - 1))


def grid(sizes: Sizes) -> tuple[int, int]:
    """Rows and head blocks; groups of heads."""
    return sizes.S * sizes.head_blocks, sizes.heads // heads_at_once(sizes)


def kernel(sizes: Sizes, lens, ends, shares, acc, top, total, out):
    """A CTA. `ends`: where each row ends in the sequence of all blocks; the others are of kernel.Inputs and Outputs."""
    segment, count = lax.axis_index("segment"), heads_at_once(sizes)
    row, head_block = divide(segment, sizes.head_blocks), lax.rem(segment, jnp.int32(sizes.head_blocks))
    heads = [lax.axis_index("heads") * count + i for i in range(count)]  # in the head block
    blocks = sizes.span.count(lens[row])
    begin = ends[row] - (sizes.head_blocks - head_block) * blocks
    first, last = (owner(index, shares[0], shares[1]) for index in (begin, begin + blocks - 1))
    layout = plgpu.Layout.WG_STRIDED((sizes.V,), vec_size=math.gcd(4, sizes.V // 128))

    def load(part, cta, head):
        values = plgpu.load(acc.at[part, cta, head], layout=layout, optimized=False)
        return top[part, cta, head], total[part, cta, head], values

    def step(i, sums):
        at_once = LOADS // count
        others = [first + 1 + i * at_once + n for n in range(at_once)]
        # The last is taken again, without weight, to fill up.
        parts = [[load(0, jnp.minimum(other, last), head) for head in heads] for other in others]
        for other, part in zip(others, parts, strict=True):
            weight = jnp.where(other <= last, 0.0, MASKED)
            sums = tuple(_add(ours, theirs, weight) for ours, theirs in zip(sums, part, strict=True))
        return sums

    @pl.when((blocks > 0) & (first < last))
    def _():
        sums = tuple(load(1, first, head) for head in heads)
        sums = lax.fori_loop(0, divide(last - first + (LOADS // count - 1), LOADS // count), step, sums)
        for head, (_, weights, values) in zip(heads, sums, strict=True):
            out[row, head_block * sizes.heads + head] = (values * (1.0 / weights)).astype(out.dtype)


def _add(ours, theirs, weight: jax.Array):
    """Sums over some keys and over others, whose scores are all changed by `weight` -> sums over all of them."""
    (top, total, acc), (other_top, other_total, other_acc) = ours, theirs
    other_top += weight
    new_top = jnp.maximum(top, other_top)
    keep, take = jnp.exp2(top - new_top), jnp.exp2(other_top - new_top)
    return new_top, total * keep + other_total * take, acc * keep + other_acc * take
