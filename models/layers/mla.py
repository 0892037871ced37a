"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1), absorbed: the pages hold latents alone.

A token's KV is its latent (C elements), from which every head's keys and values are projected, and one rotary key (R
elements) that all heads share. The projections are moved to the other side of the dot products: queries are taken to
the latent's space, and what attention gives there is taken to each head's values.

Letters, besides those of interface.py: C latent, R rotary dimensions.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.interface import LayerKV, StepBatch
from jaxllm.models.layers.attention import by_phase
from jaxllm.models.layers.linear import Linear, per_head
from jaxllm.models.layers.norm import RMSNorm
from jaxllm.models.layers.param import Initializer, param
from jaxllm.models.layers.rope import rotate
from pallas_kernels.paged_mla import mla_decode, mla_prefill

_NORM_EPS = 1e-6  # of the latents' norms, whatever the config says of the others


class LatentAttention(nnx.Module):
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        latent_size: int,
        query_latent_size: int | None,
        key_size: int,
        rope_size: int,
        value_size: int,
        scale: float,
        bias: bool,
        interleaved_rope: bool,
        dtype,
        initializer: Initializer,
    ):
        """`key_size` and `rope_size` are the parts of a head's query without and with rotation. With
        `query_latent_size`, queries are projected by way of a latent of their own. `bias`: of projections to latents
        and of the last one."""
        self.key_size, self.latent_size, self.interleaved_rope = key_size, latent_size, interleaved_rope
        self.attend = dict(value_dim=latent_size, scale=scale)
        linear = functools.partial(Linear, dtype=dtype, initializer=initializer)
        norm = functools.partial(RMSNorm, eps=_NORM_EPS, dtype=dtype, axis=None)
        queries = num_heads * (key_size + rope_size)
        if query_latent_size is None:
            self.q = linear(hidden_size, queries, axes=("heads", "embed"))
        else:
            self.q_a = linear(hidden_size, query_latent_size, axes=(None, "embed"), bias=bias)
            self.q_a_norm = norm(query_latent_size)
            self.q_b = linear(query_latent_size, queries, axes=("heads", None))
        self.has_query_latent = query_latent_size is not None
        self.kv_a = linear(hidden_size, {"latent": latent_size, "rope": rope_size}, axes=(None, "embed"), bias=bias)
        self.kv_a_norm = norm(latent_size)
        self.kv_b = HeadProjections(num_heads, key_size, value_size, latent_size, dtype=dtype, initializer=initializer)
        self.out = linear(num_heads * value_size, hidden_size, axes=("embed", "heads"), bias=bias)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, kv: LayerKV, batch: StepBatch
    ) -> tuple[jax.Array, LayerKV]:
        """x [T, D]; cos, sin [T, R / 2] -> ([T, D], kv with this step's tokens)."""
        num_tokens = x.shape[0]
        q = self.q_b(self.q_a_norm(self.q_a(x))) if self.has_query_latent else self.q(x)
        q, q_rope = jnp.split(q.reshape(num_tokens, self.kv_b.num_heads, -1), (self.key_size,), axis=-1)
        latent, k_rope = self.kv_a.split(x)
        q_rope, k_rope = (
            rotate(part, cos, sin, interleaved=self.interleaved_rope) for part in (q_rope, k_rope[:, None, :])
        )
        of_keys, of_values = self.kv_b()
        queries = jnp.concatenate((per_head(q, of_keys), q_rope), axis=-1)  # [T, N, C + R]
        keys = jnp.concatenate((self.kv_a_norm(latent), k_rope[:, 0]), axis=-1)  # [T, C + R]
        pages = _written(kv.k, keys, batch.slots)
        attended = by_phase(
            queries,
            batch,
            decode=lambda q, *rows: mla_decode(q, pages, *rows, **self.attend),
            prefill=lambda q, *rows: mla_prefill(q, pages, *rows, **self.attend),
        )
        values = per_head(attended, jnp.swapaxes(of_values, 1, 2))  # [T, N, V]
        return self.out(values.reshape(num_tokens, -1)), LayerKV(pages, None)


class HeadProjections(nnx.Module):
    """From the latent to each head's keys and values: weight [N * (key_size + value_size), C], head by head."""

    def __init__(self, num_heads: int, key_size: int, value_size: int, latent_size: int, *, dtype, initializer):
        self.num_heads, self.key_size = num_heads, key_size
        rows = num_heads * (key_size + value_size)
        self.weight = param((rows, latent_size), dtype, ("heads", None), initializer)

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """(of keys [N, key_size, C], of values [N, value_size, C])."""
        both = self.weight[...].reshape(self.num_heads, -1, self.weight.shape[-1])
        return both[:, : self.key_size], both[:, self.key_size :]


def _written(pages: jax.Array, keys: jax.Array, slots: jax.Array) -> jax.Array:
    """pages [P, page_size, C + R] with keys [T, C + R] at their slots; slots out of range are dropped."""
    page_size = pages.shape[1]
    return pages.at[slots // page_size, slots % page_size].set(keys.astype(pages.dtype), mode="drop")
