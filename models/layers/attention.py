"""Attention over paged KV, and the only caller of the attention kernels.

Decode rows and prefill rows have a kernel each; what a step holds of either is read from the StepBatch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.interface import LayerKV, StepBatch
from jaxllm.models.layers.linear import Linear
from jaxllm.models.layers.param import Initializer
from jaxllm.models.layers.rope import rotate
from pallas_kernels.kv_write import kv_write, kv_write_quantized
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.ragged_prefill import ragged_prefill


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    batch: StepBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
) -> tuple[jax.Array, LayerKV]:
    """Write k, v [T, K, H] to their pages, then attend q [T, N, H] to each row's KV, causally -> ([T, N, H], kv).

    Keys and values are rounded to the pages' dtype, and a token meets its own as they are in the pages. `window`,
    `soft_cap` and `alibi_slopes` f32[N] are the kernels' (see paged_decode). Padding tokens give zeros.
    """
    kv = _written(kv, k, v, batch.slots)
    attend = dict(
        scale=scale, window=window, soft_cap=soft_cap, alibi_slopes=alibi_slopes,
        k_scales=kv.k_scales, v_scales=kv.v_scales,
    )  # fmt: skip
    out = by_phase(
        q,
        batch,
        decode=lambda q, *rows: paged_decode(q, kv.k, kv.v, *rows, **attend),
        prefill=lambda q, *rows: ragged_prefill(q, kv.k, kv.v, *rows, **attend),
    )
    return out, kv


def _written(kv: LayerKV, k: jax.Array, v: jax.Array, slots: jax.Array) -> LayerKV:
    if kv.k_scales is not None:
        return LayerKV(*kv_write_quantized(*kv, k, v, slots))
    return LayerKV(*kv_write(kv.k, kv.v, k.astype(kv.k.dtype), v.astype(kv.v.dtype), slots))


def by_phase(
    q: jax.Array, batch: StepBatch, *, decode: Callable[..., jax.Array], prefill: Callable[..., jax.Array]
) -> jax.Array:
    """Attention of q [T, N, H]: `decode`(q, page_table, kv_lens) for the decode rows, `prefill`(q, page_table, kv_lens,
    query_starts) for the others."""
    if batch.decode_only:
        return decode(q, batch.page_table, batch.kv_lens)
    # Decode rows come first with one token each, so they start where they would in a decode-only batch. Each kernel
    # is told that the other's rows are empty. (There are at most T of them, should T be less than S.)
    rows = min(batch.kv_lens.shape[0], q.shape[0])
    index = jnp.arange(rows, dtype=jnp.int32)
    is_decode = index < batch.num_decodes
    decoded = decode(q[:rows], batch.page_table[:rows], jnp.where(is_decode, batch.kv_lens[:rows], 0))
    out = prefill(q, batch.page_table, batch.kv_lens, jnp.maximum(batch.query_starts, batch.num_decodes))
    # A scatter works in place. Choosing between both for the first rows would read what it writes, and so copy all.
    return out.at[jnp.where(is_decode, index, q.shape[0] + index)].set(decoded, mode="drop", unique_indices=True)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention, by the numbers of heads (Ainslie et al. 2023, "GQA")."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
        dtype,
        initializer: Initializer,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        norm: Callable[[int], nnx.Module] | None = None,
        interleaved_rope: bool = False,
        alibi: bool = False,
    ):
        """`scale` is head_dim ** -0.5 unless given; `norm` makes the norm of each head's queries and of its keys."""
        self.head_dim = head_dim
        self.attend = dict(scale=head_dim**-0.5 if scale is None else scale, window=window, soft_cap=soft_cap)
        self.q_norm = None if norm is None else norm(head_dim)
        self.k_norm = None if norm is None else norm(head_dim)
        self.interleaved_rope = interleaved_rope
        self.alibi_slopes = alibi_slopes(num_heads) if alibi else None
        self.qkv = Linear(
            hidden_size,
            {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim},
            axes=("qkv", "embed"),
            dtype=dtype,
            initializer=initializer,
            bias=qkv_bias,
        )
        self.out = Linear(
            num_heads * head_dim,
            hidden_size,
            axes=("embed", "heads"),
            dtype=dtype,
            initializer=initializer,
            bias=out_bias,
        )

    def __call__(
        self, x: jax.Array, cos: jax.Array | None, sin: jax.Array | None, kv: LayerKV, batch: StepBatch
    ) -> tuple[jax.Array, LayerKV]:
        """x [T, D]; cos, sin [T, rotary_dim / 2], or None for no rotation -> ([T, D], kv with this step's tokens)."""
        num_tokens = x.shape[0]
        q, k, v = (part.reshape(num_tokens, -1, self.head_dim) for part in self.qkv.split(x))  # [T, N or K, H]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None:
            q, k = (rotate(part, cos, sin, interleaved=self.interleaved_rope) for part in (q, k))
        slopes = None if self.alibi_slopes is None else jnp.asarray(self.alibi_slopes, jnp.float32)
        out, kv = paged_attention(self.scaled(q, batch), k, v, kv, batch, alibi_slopes=slopes, **self.attend)
        return self.out(out.reshape(num_tokens, -1)), kv

    def scaled(self, q: jax.Array, batch: StepBatch) -> jax.Array:
        """q [T, N, H] as it is; for families whose queries have a scale for each token."""
        return q


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """ALiBi's slope of each head (Press et al., ICLR 2022): a geometric series from 2^(-8/n) for a power of two n. Any
    other number of heads has those of the power of two below it, then every second one of the power above it."""
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    between = [2.0 ** (-4 * (2 * i + 1) / below) for i in range(num_heads - below)]
    return (*slopes, *between)
