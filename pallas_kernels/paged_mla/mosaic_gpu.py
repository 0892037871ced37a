"""mla_decode for Hopper: split-KV latent attention in Pallas Mosaic GPU.

All heads share one key a token, and the key's first elements are the value, so a block of keys is brought to shared
memory once and multiplied twice. With 64 heads or more the tensor cores have as much to do as the memory. In a CTA of
four warpgroups:

- one copies pages to shared memory and runs ahead, over segment ends as well;
- one multiplies 64 heads' queries with a block of 64 keys, makes weights of the scores (online softmax), and leaves
  them in shared memory, where the block's rotary parts were: these nobody needs any more;
- two multiply the weights with the values, each half of a value's elements, for a sum of 64 x 512 numbers fills the
  registers of two warpgroups. Meanwhile the other one makes the next block's weights.

Dividing the sum and sharing the weights: after FlashMLA (DeepSeek-AI, 2025).

How the batch is cut into equal shares is paged_decode's (see there), a block of 64 heads in the place of a KV head.
What is not whole in a CTA goes to a workspace, and a second kernel merges it. paged_decode does without: a CTA adds the
others' parts to its own. Here a part is up to 128 KB, and for one long row a single CTA would read as much as all of
them have read of the keys.

Fewer than 64 heads leave rows empty, in shared memory and in the products. The workspace has them, the output hasn't.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.paged_decode.schedule import cut, row_ends
from pallas_kernels.paged_mla import merge
from pallas_kernels.paged_mla.kernel import BLOCK, HALVES, HEADS, ROTARY, Inputs, Sizes, kernel, scratch

PAGE_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      stages: blocks of 64 keys that are in shared memory at once.
      num_ctas: parts that the batch is cut into.
    """

    stages: int
    num_ctas: int


def default_config(value_dim: int) -> Config:
    """One CTA a multiprocessor, and as many stages, up to 4, as have room: 2 of DeepSeek's."""
    line = 2 * (value_dim + ROTARY)
    left = mosaic.SHARED_MEMORY - 2048 - HEADS * line  # barriers and the like; queries
    return Config(min(4, left // (BLOCK * line + 8 * HEADS)), mosaic.num_multiprocessors())


def supported(q, pages, page_table, kv_lens, *, value_dim, scale, interpret=False) -> str | None:
    """Why the kernel cannot take the call, or None."""
    del page_table, kv_lens, scale
    _, N, H = q.shape
    if (reason := mosaic.unsupported(interpret)) is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16) or pages.dtype != q.dtype:
        return f"q {q.dtype} with pages {pages.dtype}, bfloat16 or float16 for both is needed"
    if N % (8 if N < HEADS else HEADS):
        return f"{N} query heads, a multiple of 8 below {HEADS} or a multiple of {HEADS} is needed"
    if H - value_dim != ROTARY or value_dim % 128 or value_dim > 512:
        return f"value_dim {value_dim} of {H}, 128, 256, 384 or 512 of {ROTARY} more is needed"
    if pages.shape[1] not in PAGE_SIZES:
        return f"page size {pages.shape[1]}, one of {', '.join(map(str, PAGE_SIZES))} is needed"
    return None


@functools.partial(jax.jit, static_argnames=("value_dim", "scale", "config", "interpret"))
def mla_decode(q, pages, page_table, kv_lens, *, value_dim, scale, config: Config | None = None, interpret=False):
    """See pallas_kernels.paged_mla. `config`: instead of default_config's; `interpret`: for a CPU, slowly."""
    S, N, _ = q.shape
    config = config or default_config(value_dim)
    sizes = Sizes(S, N, value_dim, pages.shape[1], config.stages, config.num_ctas, q.dtype, scale, interpret)
    schedule = cut(kv_lens, page_table, sizes.head_blocks, sizes.span, sizes.page_size, sizes.num_ctas)
    out, *parts = _attend(sizes, Inputs(q, pages, page_table, kv_lens, *schedule))
    ends = row_ends(kv_lens, sizes.head_blocks, sizes.span)
    return _merge(sizes, (kv_lens, ends, schedule.shares, *parts), out)


def _attend(sizes: Sizes, inputs: Inputs):
    """The first kernel: kernel.Outputs. What goes to the workspace is missing in the output."""
    parts = (2, sizes.num_ctas)
    return mosaic.kernel(
        functools.partial(kernel, sizes),
        interpret=sizes.interpret,
        out_type=[
            jax.ShapeDtypeStruct((sizes.S, sizes.N, sizes.V), sizes.dtype),
            jax.ShapeDtypeStruct((*parts, HEADS, sizes.V), jnp.float32),
            jax.ShapeDtypeStruct((*parts, HEADS), jnp.float32),
            jax.ShapeDtypeStruct((*parts, HEADS), jnp.float32),
        ],
        scratch_types=scratch(sizes),
        grid=(sizes.num_ctas,),
        grid_names=("cta",),
        num_threads=HALVES + 2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs)


def _merge(sizes: Sizes, inputs, out):
    """The second kernel: `out`, in place, with what the workspace has. `inputs`: of merge.kernel."""
    ref = jax.new_ref(out)
    mosaic.kernel(
        functools.partial(merge.kernel, sizes),
        interpret=sizes.interpret,
        in_place=True,
        out_type=(),
        grid=merge.grid(sizes),
        grid_names=("segment", "heads"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs, ref)
    return ref[...]
