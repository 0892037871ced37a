"""paged_decode for Hopper: split-KV flash decoding in Pallas Mosaic GPU.

Flash-decoding: Dao et al. (2023). Cutting the whole batch into equal parts whatever the rows' lengths: Sanovar et al.,
"Lean Attention" (2024), after "Stream-K", Osama et al. (2023).

All KV of the batch is one sequence of blocks of keys, ordered by (row, KV head, position). Each of a fixed number of
CTAs takes an equal share, so that no CTA waits for another however ragged the batch:

    row 0          row 1                   row 2
    [head 0][head 1][  head 0  ][  head 1  ][0][1]
    |- CTA 0 -|- CTA 1 -|- CTA 2 -|- CTA 3 -|CTA 4|

The part of one (row, head) in one CTA is a *segment*. A CTA whose first segment began in an earlier one writes its
sums to a workspace; the CTA that holds the beginning adds them to its own. It comes to them last and finds them ready,
for the others did them first. (The other way round, every CTA would wait for the one before it.) Shares are dealt out
from the last to the first, so that a CTA waits for such alone as have started before it.

In a CTA, one warpgroup copies pages to shared memory and runs ahead over segment ends, another computes. Scores are
computed transposed, keys x queries, for the tensor cores want 64 rows and a group of query heads has 1 to 64.

Head dims below 64 are folded: the KV of `fold` consecutive tokens, which lie one after the other in a page, are one
line of 64, and a query becomes `fold` pseudo-queries, (q, 0) and (0, q), which see every fold-th token. What they find
is joined outside the kernel.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.mosaic import pl, plgpu

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
LINE = 64  # rows that the tensor cores take at least, and so the smallest head dim
# Finite, so that the difference of two masked scores is 0 and not NaN.
MASKED = -1e30
SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor
# A number for each query, where sums over the keys of a WGMMA-shaped array leave it.
BY_QUERY = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_keys: keys of one step, a multiple of 64 and of the page size.
      stages: blocks of keys under way in a CTA.
      num_ctas: parts that the batch is cut into. They need not run at once.
    """

    block_keys: int
    stages: int
    num_ctas: int


def default_config(tile: int, H: int) -> Config:
    """Two CTAs on a multiprocessor, so that one loads while the other computes, if shared memory has room for it."""
    block = 64
    for ctas in (2, 1):
        stages = (SHARED_MEMORY // ctas - _shared_bytes(tile, H, block, 0)) // (4 * block * H)
        if stages >= 3:
            break
    return Config(block, min(stages, 8), ctas * mosaic.num_multiprocessors())


def _shared_bytes(tile, H, block, stages):
    """Of a CTA: what _call allocates, and the compiler's own."""
    return 4 * block * H * stages + 2 * tile * (3 * H + block) + 4 * 1024


def supported(q, k_pages, v_pages, page_table, kv_lens, *, scale, interpret=False, **options) -> str | None:
    """Why the kernel cannot take the call, or None."""
    del v_pages, page_table, kv_lens, scale
    N, H = q.shape[1:]
    K, page_size = k_pages.shape[1:3]
    if (reason := mosaic.unsupported(interpret)) is not None:
        return reason
    if options:
        return f"takes no {', '.join(options)}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != q.dtype:
        return f"q {q.dtype} with KV {k_pages.dtype}, one of bfloat16 and float16 for both is needed"
    if H not in (32, 64, 128, 256):
        return f"head dim {H}, one of 32, 64, 128, 256 is needed"
    fold = max(1, LINE // H)
    if page_size not in (16, 32, 64):
        return f"page size {page_size}, one of 16, 32, 64 is needed"
    group, largest = N // K, min(64, 64 * 128 // H) // fold
    if group > largest:
        return f"{group} query heads a KV head of head dim {H}, at most {largest} fit in registers"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def paged_decode(q, k_pages, v_pages, page_table, kv_lens, *, scale, config: Config | None = None, interpret=False):
    """See pallas_kernels.paged_decode."""
    S, N, H = q.shape
    P, K, page_size, _ = k_pages.shape
    fold = max(1, LINE // H)
    if fold > 1:
        q = q[:, :, None, None, :] * jnp.eye(fold, dtype=q.dtype)[:, :, None]
        k_pages, v_pages = (pages.reshape(P, K, page_size // fold, LINE) for pages in (k_pages, v_pages))
    group = N // K * fold
    q = q.reshape(S, K, group, fold * H)
    # Query heads go to the tensor cores in tiles of a multiple of 8. A tile of 8 may hold several groups: what the
    # other groups' queries give is not looked at. Groups that fit no tile are padded.
    tile = max(8, group)
    padded = tile % group or tile % 8 or K * group % tile
    if padded:
        tile = group + -group % 8
        q = jnp.pad(q, ((0, 0), (0, 0), (0, tile - group), (0, 0)))
    out, weight = _call(
        q.reshape(S, -1, tile, fold * H), k_pages, v_pages, page_table, kv_lens, group=group, fold=fold, scale=scale,
        config=config or default_config(tile, fold * H), interpret=interpret,
    )  # fmt: skip
    if fold > 1:
        columns = (jnp.arange(K) * (0 if padded else group) % tile)[:, None] + jnp.arange(group)
        out = jnp.take_along_axis(out, columns[None, :, None, :], axis=3)
        out = _unfold(out, jnp.take_along_axis(weight, columns[None], axis=2), fold)
        out = jnp.where((kv_lens > 0)[:, None, None, None], out, 0).astype(q.dtype)
    return out.reshape(S, N, H)


def _unfold(out, weight, fold):
    """Joins what pseudo-queries found: [S, K, fold * H, group] and [S, K, group] -> [S, K, group / fold, H]."""
    S, K, width, group = out.shape
    weight = jax.nn.softmax(weight.reshape(S, K, group // fold, fold) * LN_2, axis=-1)
    out = out.reshape(S, K, fold, width // fold, group // fold, fold)
    return sum(out[:, :, i, :, :, i].swapaxes(2, 3) * weight[..., i, None] for i in range(fold))


def _schedule(kv_lens, K, block, G):
    """Who computes what. Depends on kv_lens alone, so XLA computes it once for all layers of a step.

    Returns:
      starts: i32[G, 5], a CTA's first block (row, KV head, block within), that row's length, and the number of blocks.
      next_row: i32[S], the next row in use.
      shares: i32[2], (blocks of every CTA, how many CTAs have one more).
    """
    S = kv_lens.shape[0]
    rows = jnp.arange(S, dtype=jnp.int32)
    blocks = (kv_lens + block - 1) // block
    ends = jnp.sum(jnp.where(rows[None, :] <= rows[:, None], blocks[None, :], 0), axis=1) * K
    share, rest = ends[-1] // G, ends[-1] % G
    cta = jnp.arange(G, dtype=jnp.int32)
    first = cta * share + jnp.minimum(cta, rest)
    row = jnp.minimum(jnp.sum(ends[None, :] <= first[:, None], axis=1), S - 1)
    within = first - (ends - blocks * K)[row]
    row_blocks = jnp.maximum(blocks[row], 1)
    starts = jnp.stack([row, within // row_blocks, within % row_blocks, kv_lens[row], share + (cta < rest)], axis=1)
    in_use_later = (rows[None, :] > rows[:, None]) & (kv_lens > 0)[None, :]
    next_row = jnp.min(jnp.where(in_use_later, rows[None, :], S - 1), axis=1)
    return starts.astype(jnp.int32), next_row.astype(jnp.int32), jnp.stack([share, rest]).astype(jnp.int32)


def _call(q, k_pages, v_pages, page_table, kv_lens, *, group, fold, scale, config, interpret):
    """The kernel.

    Args:
      q: [S, K * group / tile, tile, H], or [S, K, tile, H] where groups are padded.
      k_pages, v_pages: [P, K, page_size / fold, H].

    Returns:
      [S, K, group, H] in q's dtype; if fold > 1, float32 [S, K, H, tile].
      If fold > 1, float32 [S, K, tile], base-2 logarithms of the sums of exponentials; uninitialised for unused rows.
    """
    S, num_tiles, tile, H = q.shape
    K, page_lines = k_pages.shape[1:3]
    padded = num_tiles * tile != K * group
    block, stages, G = config.block_keys, config.stages, config.num_ctas
    pages, block_tokens, page_tokens = block // page_lines, block * fold, page_lines * fold
    dtype = q.dtype
    at_once = max(1, 4096 // (tile * H))  # as many partial sums as fit in registers
    starts, next_row, shares = _schedule(kv_lens, K, block_tokens, G)

    def kernel(
        q_ref, k_ref, v_ref, table_ref, lens_ref, starts_ref, next_ref, shares_ref,
        out_ref, weight_ref, acc_ref, top_ref, total_ref,
        q_smem, k_smem, v_smem, p_smem, out_smem, q_full, full, empty,
    ):  # fmt: skip
        cta = G - 1 - lax.axis_index("cta")  # which share of the work this one has
        # How many parts of a CTA's last segment lie in the workspace. Interpreted, CTAs run in order: no need to wait.
        arrived = None if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR((G,)))
        warpgroup = lax.axis_index("warpgroup")
        first_row, first_head, first_block, first_len, count = (starts_ref[cta, i] for i in range(5))

        def next_segment(row, head):
            last = head == K - 1
            return jnp.where(last, next_ref[row], row), jnp.where(last, 0, head + 1)

        def num_blocks(kv_len):
            return lax.div(kv_len + (block_tokens - 1), jnp.int32(block_tokens))

        def page_ids(row, j, kv_len):
            # Past the row's last page its id is taken again: the table may hold anything there.
            last_page = lax.div(kv_len - 1, jnp.int32(page_tokens))
            return tuple(table_ref[row, jnp.minimum(j * pages + p, last_page)] for p in range(pages))

        @pl.when((warpgroup == 1) & (count > 0))
        def _copy():
            def step(i, state):
                row, head, j, kv_len, ids = state
                at_end = j + 1 == num_blocks(kv_len)
                next_r, next_h = next_segment(row, head)
                next_r, next_h = jnp.where(at_end, next_r, row), jnp.where(at_end, next_h, head)
                next_j, next_len = jnp.where(at_end, 0, j + 1), lens_ref[next_r]
                # Asked for now, used one step later: the table is far away.
                next_ids = page_ids(next_r, next_j, jnp.maximum(next_len, 1))
                slot = lax.rem(i, jnp.int32(stages))

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                for p in range(pages):
                    keys = pl.ds(p * page_lines, page_lines)
                    plgpu.copy_gmem_to_smem(k_ref.at[ids[p], head], k_smem.at[slot, keys], full.at[slot])
                    plgpu.copy_gmem_to_smem(v_ref.at[ids[p], head], v_smem.at[slot, keys], full.at[slot])
                return next_r, next_h, next_j, next_len, next_ids

            first_ids = page_ids(first_row, first_block, first_len)
            lax.fori_loop(0, count, step, (first_row, first_head, first_block, first_len, first_ids))

        @pl.when(warpgroup == 1)
        def _zero_unused_rows():
            def zero(i, _):
                row = cta + i * G

                @pl.when(lens_ref[row] == 0)
                def _():
                    shape = out_ref.shape[1:]
                    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=math.gcd(4, math.prod(shape) // 128))
                    out_ref[row] = plgpu.layout_cast(jnp.zeros(shape, out_ref.dtype), layout)

            lax.fori_loop(0, lax.div(S - cta + (G - 1), jnp.int32(G)), zero, None)

        def load_q(row, head, slot):
            of_tile = head if padded else lax.div(head * group, jnp.int32(tile))
            plgpu.copy_gmem_to_smem(q_ref.at[row, of_tile], q_smem.at[slot], q_full.at[slot])

        def queries(value):
            return plgpu.layout_cast(jnp.full((tile,), value, jnp.float32), BY_QUERY)

        def full_array(rows, value):
            return plgpu.layout_cast(jnp.full((rows, tile), value, jnp.float32), plgpu.Layout.WGMMA)

        def along_keys(x, rows):
            return lax.broadcast_in_dim(x, (rows, tile), [1])

        def is_there(tokens_left, columns, token_of_column):
            """Which elements of an array [block, columns] belong to one of the first tokens of the block."""
            iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (block, columns), layout=plgpu.Layout.WGMMA)
            token = iota(0) if fold == 1 else iota(0) * fold + token_of_column(iota(1))
            return token < tokens_left

        def silence(kv_smem, tokens_left):
            """Zeros where no token is: a weight of zero would not silence a NaN."""
            there = is_there(tokens_left, H, lambda column: column // (H // fold))
            kv = plgpu.load(kv_smem, layout=plgpu.Layout.WGMMA, optimized=False)
            kv_smem[...] = jnp.where(there, kv, jnp.zeros_like(kv))

        def add_block(i, sums, *, q_slot, tokens_left, masked):
            top, total, acc = sums
            slot = lax.rem(i, jnp.int32(stages))
            plgpu.barrier_wait(full.at[slot])
            if masked:
                silence(v_smem.at[slot], tokens_left)
                if fold > 1:  # or else a key is all there or not at all, and its score is masked
                    silence(k_smem.at[slot], tokens_left)
                plgpu.commit_smem()

            def scores_of(scores_ref):
                plgpu.wgmma(scores_ref, k_smem.at[slot], q_smem.at[q_slot].T)
                return scores_ref[...]

            scores = pl.run_scoped(scores_of, plgpu.ACC((block, tile), jnp.float32)) * (scale * LOG2_E)
            if masked:
                there = is_there(tokens_left, tile, lambda column: column % fold)
                scores = jnp.where(there, scores, MASKED)
            new_top = jnp.maximum(top, scores.max(axis=0))
            decay = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - along_keys(new_top, block))
            total = total * along_keys(decay, block) + weights
            p_smem.T[...] = weights.astype(dtype)
            plgpu.commit_smem()

            def weighted_values(values_ref):
                plgpu.wgmma(values_ref, v_smem.at[slot].T, p_smem.T)
                return values_ref[...]

            values = pl.run_scoped(weighted_values, plgpu.ACC((H, tile), jnp.float32))
            acc = acc * along_keys(decay, H) + values

            @pl.when(i + stages < count)
            def _():
                plgpu.barrier_arrive(empty.at[slot])

            return new_top, total, acc

        def owner(index):
            """The CTA that has the block of that index in the sequence of all blocks."""
            share, rest = shares_ref[0], shares_ref[1]
            in_rest = rest * (share + 1)
            after = rest + lax.div(index - in_rest, jnp.maximum(share, 1))
            return jnp.where(index < in_rest, lax.div(index, share + 1), after)

        def finish(row, head, j, stop, row_blocks, sums):
            """Takes in the sums of a segment, blocks `j` to `stop` of a row's `row_blocks`."""
            top, total, acc = sums
            first_index = cta * shares_ref[0] + jnp.minimum(cta, shares_ref[1])

            @pl.when(j > 0)
            def _began_in_an_earlier_cta():  # which only a CTA's first segment can have done
                acc_ref[cta] = acc
                top_ref[cta] = top
                total_ref[cta] = total
                if arrived is not None:
                    plgpu.semaphore_signal(arrived.at[owner(first_index - j)], 1, memory_scope="gpu")

            @pl.when(j == 0)
            def _begins_here():
                # Only a CTA's last segment can go on in later ones.
                end = first_index + count - 1 + row_blocks - stop
                last_cta = jnp.where(stop < row_blocks, owner(end), cta)
                if arrived is not None:

                    @pl.when(last_cta > cta)
                    def _():
                        plgpu.semaphore_wait(arrived.at[cta], last_cta - cta, decrement=False, memory_scope="gpu")

                def merge(i, sums):
                    # Several at once, for each is far away. The last is taken again, without weight, to fill up.
                    others = [cta + 1 + i * at_once + n for n in range(at_once)]
                    clamped = [jnp.minimum(other, last_cta) for other in others]
                    load = functools.partial(plgpu.load, optimized=False)
                    tops = [load(top_ref.at[n], layout=BY_QUERY) for n in clamped]
                    totals = [load(total_ref.at[n], layout=BY_QUERY) for n in clamped]
                    accs = [load(acc_ref.at[n], layout=plgpu.Layout.WGMMA) for n in clamped]
                    for other, *theirs in zip(others, tops, totals, accs, strict=True):
                        theirs[0] += jnp.where(other <= last_cta, 0.0, MASKED)
                        sums = add_sums(sums, theirs)
                    return sums

                steps = lax.div(last_cta - cta + (at_once - 1), jnp.int32(at_once))
                all_top, all_total, all_acc = lax.fori_loop(0, steps, merge, sums)
                out = all_acc / along_keys(all_total, H)
                if fold > 1:
                    out_ref[row, head] = out
                    weight_ref[row, head] = all_top + jnp.log2(all_total)
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem.T[...] = out.astype(dtype)
                    plgpu.commit_smem()
                    offset = 0 if padded else lax.rem(head * group, jnp.int32(tile))
                    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(offset, group)], out_ref.at[row, head])

        def add_sums(ours, theirs):
            (top, total, acc), (other_top, other_total, other_acc) = ours, theirs
            new_top = jnp.maximum(top, other_top)
            keep, take = jnp.exp2(top - new_top), jnp.exp2(other_top - new_top)
            acc = acc * along_keys(keep, H) + other_acc * along_keys(take, H)
            return new_top, total * keep + other_total * take, acc

        @pl.when((warpgroup == 0) & (count > 0))
        def _compute():
            load_q(first_row, first_head, 0)

            def segment(state):
                i, row, head, j, number = state
                kv_len = lens_ref[row]
                row_blocks = num_blocks(kv_len)
                size = jnp.minimum(row_blocks - j, count - i)
                stop = i + size
                q_slot = lax.rem(number, jnp.int32(2))
                next_r, next_h = next_segment(row, head)

                @pl.when(stop < count)
                def _():
                    load_q(next_r, next_h, 1 - q_slot)

                plgpu.barrier_wait(q_full.at[q_slot])
                sums = queries(MASKED), full_array(block, 0.0), full_array(H, 0.0)
                # Only a row's last block can be partly filled.
                left = kv_len - (j + size - 1) * block_tokens
                full_stop = jnp.where(left >= block_tokens, stop, stop - 1)
                add = functools.partial(add_block, q_slot=q_slot, tokens_left=left)
                sums = lax.fori_loop(i, full_stop, functools.partial(add, masked=False), sums)
                top, total, acc = lax.fori_loop(full_stop, stop, functools.partial(add, masked=True), sums)
                finish(row, head, j, j + size, row_blocks, (top, total.sum(axis=0), acc))
                return stop, next_r, next_h, jnp.int32(0), number + 1

            zero = jnp.int32(0)
            lax.while_loop(lambda state: state[0] < count, segment, (zero, first_row, first_head, first_block, zero))

        @pl.when(warpgroup == 0)
        def _():
            plgpu.wait_smem_to_gmem(0)

    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    scratch = [
        plgpu.SMEM((2, tile, H), dtype, transforms=swizzled),
        plgpu.SMEM((stages, block, H), dtype, transforms=swizzled),
        plgpu.SMEM((stages, block, H), dtype, transforms=swizzled),
        plgpu.SMEM((tile, block), dtype, transforms=swizzled),
        plgpu.SMEM((tile, H), dtype),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=2 * pages, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    ]
    return mosaic.kernel(
        kernel,
        interpret=interpret,
        out_type=[
            jax.ShapeDtypeStruct(*(((S, K, group, H), dtype) if fold == 1 else ((S, K, H, tile), jnp.float32))),
            jax.ShapeDtypeStruct((S, K, tile) if fold > 1 else (1, 1, tile), jnp.float32),
            jax.ShapeDtypeStruct((G, H, tile), jnp.float32),
            jax.ShapeDtypeStruct((G, tile), jnp.float32),
            jax.ShapeDtypeStruct((G, tile), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(G,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k_pages, v_pages, page_table, kv_lens, starts, next_row, shares)[:2]
