"""Attention over paged KV, and the only caller of the attention kernels.

Decode rows and prefill rows have a kernel each; what a step holds of either is read from the StepBatch.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.interface import LayerKV, StepBatch
from jaxllm.models.layers.linear import Linear
from jaxllm.models.layers.param import Initializer
from jaxllm.models.layers.rope import rotate
from pallas_kernels.kv_write import kv_write
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

    `window`, `soft_cap` and `alibi_slopes` f32[N] are the kernels' (see paged_decode). Padding tokens give zeros.
    """
    attend = dict(scale=scale, window=window, soft_cap=soft_cap, alibi_slopes=alibi_slopes)
    k_pages, v_pages = kv_write(kv.k, kv.v, k.astype(kv.k.dtype), v.astype(kv.v.dtype), batch.slots)
    kv = LayerKV(k_pages, v_pages)
    if batch.decode_only:
        return paged_decode(q, *kv, batch.page_table, batch.kv_lens, **attend), kv

    # Decode rows come first with one token each, so they start where they would in a decode-only batch. Each kernel
    # is told that the other's rows are empty. (There are at most T of them, should T be less than S.)
    rows = min(batch.kv_lens.shape[0], q.shape[0])
    is_decode = jnp.arange(rows, dtype=jnp.int32) < batch.num_decodes
    decode_lens = jnp.where(is_decode, batch.kv_lens[:rows], 0)
    decoded = paged_decode(q[:rows], *kv, batch.page_table[:rows], decode_lens, **attend)
    prefill_starts = jnp.maximum(batch.query_starts, batch.num_decodes)
    out = ragged_prefill(q, *kv, batch.page_table, batch.kv_lens, prefill_starts, **attend)
    return out.at[:rows].set(jnp.where(is_decode[:, None, None], decoded, out[:rows])), kv


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
    ):
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
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
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, kv: LayerKV, batch: StepBatch
    ) -> tuple[jax.Array, LayerKV]:
        """x [T, D]; cos, sin [T, rotary_dim / 2] -> ([T, D], kv with this step's tokens)."""
        num_tokens = x.shape[0]
        q, k, v = (part.reshape(num_tokens, -1, self.head_dim) for part in self.qkv.split(x))  # [T, N or K, H]
        out, kv = paged_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, kv, batch, scale=self.scale)
        return self.out(out.reshape(num_tokens, -1)), kv
