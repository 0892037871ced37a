"""Attention in NumPy and float64, one query at a time: the reference of the references. And random paged inputs."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass
class Paged:
    """Rows of KV, dense and in pages. Everything that no row owns is NaN, or a page id that does not exist."""

    keys: list[np.ndarray]  # per row [kv_len, K, H]
    values: list[np.ndarray]
    k_pages: jnp.ndarray
    v_pages: jnp.ndarray
    page_table: jnp.ndarray
    kv_lens: jnp.ndarray


def random_pages(rng, kv_lens, *, width, num_pages, K, H, page_size, dtype="float32") -> Paged:
    def rows():
        return [np.asarray(jnp.asarray(rng.normal(size=(n, K, H)), dtype), np.float64) for n in kv_lens]

    keys, values = rows(), rows()
    pools = np.full((2, num_pages, K, page_size, H), np.nan)
    table = rng.choice([-1, num_pages, 2**30, 0], size=(len(kv_lens), width))
    free = rng.permutation(num_pages).tolist()
    for row, length in enumerate(kv_lens):
        for i in range(-(-length // page_size)):
            table[row, i] = page = free.pop()
            here = slice(i * page_size, min((i + 1) * page_size, length))
            for pool, dense in zip(pools, (keys[row], values[row]), strict=True):
                pool[page, :, : here.stop - here.start] = dense[here].transpose(1, 0, 2)
    k_pages, v_pages = (jnp.asarray(pool, dtype) for pool in pools)
    return Paged(keys, values, k_pages, v_pages, jnp.asarray(table, jnp.int32), jnp.asarray(kv_lens, jnp.int32))


def attend(q, keys, values, scale, *, window=None, soft_cap=None, alibi_slopes=None) -> np.ndarray:
    """One query [N, H], the last key's, over keys and values [n, K, H] -> [N, H], float64."""
    group = q.shape[0] // keys.shape[1]
    distances = np.arange(len(keys))[::-1]
    out = np.zeros(q.shape)
    for head in range(q.shape[0]):
        scores = keys[:, head // group] @ q[head].astype(np.float64) * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if alibi_slopes is not None:
            scores = scores - float(alibi_slopes[head]) * distances
        if window is not None:
            scores = np.where(distances < window, scores, -np.inf)
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ values[:, head // group]
    return out


def quantize(pages, dtype):
    """Pages [P, K, page_size, H] in int8 or float8_e4m3fn, and their scales f32[P, K, page_size]. NaN where NaN was."""
    largest = 127.0 if jnp.dtype(dtype) == jnp.int8 else 448.0
    scales = jnp.max(jnp.abs(pages), axis=-1).astype(jnp.float32) / largest
    scaled = pages.astype(jnp.float32) / scales[..., None]
    return (jnp.round(scaled) if largest == 127.0 else scaled).astype(dtype), scales


def rounded(x, dtype) -> np.ndarray:
    """What is left of [n, K, H] after `quantize`, float64."""
    values, scales = quantize(jnp.asarray(x, jnp.float32), dtype)
    return np.asarray(values, np.float64) * np.asarray(scales, np.float64)[..., None]
