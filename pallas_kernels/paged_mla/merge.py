"""The second, small Hopper kernel of mla_decode: sums of one row and head block that lie in several CTAs' parts become
its output. What the parts are is said in mosaic_gpu.py.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.paged_decode.schedule import divide, owner
from pallas_kernels.paged_mla.kernel import BY_HEAD, HEADS, MASKED, Sizes, along_row

COLUMNS = 32  # elements of a value that a CTA merges
AT_ONCE = 4  # parts that it reads at once, for each is far away


def grid(sizes: Sizes) -> tuple[int, int]:
    """A CTA for each one of the other kernel's and each piece of a value."""
    return sizes.num_ctas, sizes.V // COLUMNS


def scratch(sizes: Sizes):
    """Types of the body's last argument."""
    return [plgpu.SMEM((HEADS, COLUMNS), sizes.dtype)]


def kernel(sizes: Sizes, starts, shares, acc, top, total, out, staged):
    """Merges the row and head block that begins in CTA number `cta` and goes on in the next, if there is one."""
    cta, piece = lax.axis_index("cta"), lax.axis_index("piece")
    columns = pl.ds(piece * COLUMNS, COLUMNS)

    following = jnp.minimum(cta + 1, sizes.num_ctas - 1)
    row, head_block, block, kv_len, count = (starts[following, i] for i in range(5))
    share, rest = shares[0], shares[1]
    begin = following * share + jnp.minimum(following, rest) - block  # which of all blocks it begins with
    begins_here = (block > 0) & (begin >= cta * share + jnp.minimum(cta, rest))

    def load(part, index):
        return (
            plgpu.load(top.at[part, index], layout=BY_HEAD, optimized=False),
            plgpu.load(total.at[part, index], layout=BY_HEAD, optimized=False),
            plgpu.load(acc.at[part, index, :, columns], layout=plgpu.Layout.WGMMA, optimized=False),
        )

    @pl.when((cta < following) & (count > 0) & begins_here)
    def _():
        last = owner(begin + sizes.span.count(kv_len) - 1, share, rest)

        def step(i, sums):
            # The last is taken again, without weight, to fill up.
            others = [following + i * AT_ONCE + n for n in range(AT_ONCE)]
            parts = [load(0, jnp.minimum(other, last)) for other in others]
            for other, (part_top, *part) in zip(others, parts, strict=True):
                sums = _add(sums, (part_top + jnp.where(other <= last, 0.0, MASKED), *part))
            return sums

        _, total, acc = lax.fori_loop(0, divide(last - cta + (AT_ONCE - 1), AT_ONCE), step, load(1, cta))
        staged[...] = (acc * along_row(1.0 / total, COLUMNS)).astype(out.dtype)
        plgpu.commit_smem()
        heads = pl.ds(pl.multiple_of(head_block * sizes.heads, 8), sizes.heads)
        target = out.at[row, heads, columns]
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, sizes.heads)], target)
        plgpu.wait_smem_to_gmem(0)


def _add(ours, theirs):
    """Sums over some keys and over others -> sums over all of them."""
    (top, total, acc), (other_top, other_total, other_acc) = ours, theirs
    new_top = jnp.maximum(top, other_top)
    keep, take = jnp.exp2(top - new_top), jnp.exp2(other_top - new_top)
    acc = acc * along_row(keep, COLUMNS) + other_acc * along_row(take, COLUMNS)
    return new_top, total * keep + other_total * take, acc
