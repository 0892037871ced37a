"""kv_write: every token in its place, padding nowhere, no copy of donated pages; and its rounding to 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import kv_write, kv_write_quantized
from pallas_kernels.kv_write.specs import SPECS
from pallas_kernels.paged_decode import paged_decode
from tests.pallas_kernels import dense


def test_every_token_in_its_place():
    rng = np.random.default_rng(0)
    P, K, size, H, T = 5, 2, 4, 8, 9
    before = rng.normal(size=(2, P, K, size, H)).astype(np.float32)
    new = rng.normal(size=(2, T, K, H)).astype(np.float32)
    slots = rng.permutation(P * size)[:T]
    slots[3], slots[7] = P * size, P * size + 1000  # padding
    after = before.copy()
    for token, slot in enumerate(slots):
        if slot < P * size:
            after[:, slot // size, :, slot % size] = new[:, token]
    out = kv_write(*map(jnp.asarray, (*before, *new, slots.astype(np.int32))))
    np.testing.assert_array_equal(np.stack(out), after)
    one_by_one = before
    for token in range(T):
        one = (x[token : token + 1] for x in (*new, slots.astype(np.int32)))
        one_by_one = kv_write(*map(jnp.asarray, (*one_by_one, *one)))
    np.testing.assert_array_equal(np.stack(one_by_one), after)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_in_place_when_donated(spec):
    pages = jax.ShapeDtypeStruct((spec.num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim), jnp.float32)
    new = jax.ShapeDtypeStruct((spec.num_tokens, spec.num_kv_heads, spec.head_dim), jnp.float32)
    slots = jax.ShapeDtypeStruct((spec.num_tokens,), jnp.int32)
    memory = (
        jax.jit(lambda *args: kv_write(*args), donate_argnums=(0, 1))
        .lower(pages, pages, new, new, slots)
        .compile()
        .memory_analysis()
    )
    pool = pages.size * 4
    assert memory.alias_size_in_bytes >= 2 * pool and memory.temp_size_in_bytes < pool


def test_bad_shapes():
    pages, new = jnp.zeros((3, 2, 4, 8)), jnp.zeros((5, 2, 8))
    with pytest.raises(ValueError, match=r"v must be \[T, K, H\] with T=5"):
        kv_write(pages, pages, new, new[:4], jnp.zeros(5, jnp.int32))


EIGHT_BITS = ["int8", "float8_e4m3fn"]


def empty_pages(P, K, page_size, H, dtype):
    """Pages and scales that are full of what a float of 8 bits has for NaN."""
    codes = jnp.full((P, K, page_size, H), jnp.nan if dtype != "int8" else -128, dtype)
    return codes, codes, *(jnp.full((P, K, page_size), jnp.nan),) * 2


def values(codes, scales, slots):
    """What the pages hold at the slots: [T, K, H], float64."""
    page_size = codes.shape[2]
    held = np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[..., None]
    return held[slots // page_size, :, slots % page_size]


@pytest.mark.parametrize("new_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_rounded_to_the_nearest_code(dtype, new_dtype):
    rng = np.random.default_rng(1)
    P, K, size, H, T = 5, 2, 4, 16, 9
    magnitudes = 10.0 ** rng.uniform(-6, 6, (2, T, K, 1))
    new = jnp.asarray(rng.normal(size=(2, T, K, H)) * magnitudes, new_dtype)
    slots = rng.permutation(P * size)[:T]
    slots[3] = P * size + 7  # padding
    before = empty_pages(P, K, size, H, dtype)
    after = kv_write_quantized(*before, *new, jnp.asarray(slots, jnp.int32))
    assert [x.dtype for x in after] == [x.dtype for x in before]
    real = slots < P * size
    for x, codes, scales in zip(np.asarray(new, np.float64), after[:2], after[2:], strict=True):
        found, exact = values(codes, scales, slots[real]), x[real]
        largest = np.abs(exact).max(axis=-1, keepdims=True)
        # Half a step: of int8 all are alike, of e4m3 they are an eighth of the value's power of two, but at its bottom.
        allowed = largest / 254 if dtype == "int8" else np.maximum(np.abs(exact) / 16, largest / 448 * 2.0**-10)
        assert np.all(np.abs(found - exact) <= allowed * (1 + 1e-5))
        np.testing.assert_allclose(np.abs(found).max(axis=-1), largest[..., 0], rtol=1e-6)
        untouched = np.ones(P * size, bool)
        untouched[slots[real]] = False
        assert np.isnan(np.asarray(scales).transpose(0, 2, 1).reshape(P * size, K)[untouched]).all()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_zeros_and_the_smallest_and_largest_values(dtype):
    rows = [0.0, -0.0, 1e-45, 1e-38, 1e-35, 3e38]
    new = jnp.broadcast_to(jnp.asarray(rows, jnp.float32)[:, None, None], (len(rows), 1, 4))
    slots = np.arange(len(rows))
    codes, _, scales, _ = kv_write_quantized(*empty_pages(2, 1, 4, 4, dtype), new, new, jnp.asarray(slots, jnp.int32))
    found = values(codes, scales, slots)[:, 0, 0]
    assert np.isfinite(np.asarray(scales).reshape(-1)[: len(rows)]).all()
    np.testing.assert_allclose(found, [0, 0, 0, 0, 1e-35, 3e38], rtol=1e-6)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_attention_reads_what_was_written(dtype):
    """A row's tokens written in two calls and in any order of pages, then attended to: as in float64 on the values that
    the codes stand for."""
    rng = np.random.default_rng(2)
    P, K, N, size, H, length = 6, 2, 4, 8, 32, 29
    keys, vals = (rng.normal(size=(length, K, H)).astype(np.float32) for _ in range(2))
    table = rng.permutation(P)[:4]
    slots = table[np.arange(length) // size] * size + np.arange(length) % size
    kv = empty_pages(P, K, size, H, dtype)
    for part in (slice(0, 11), slice(11, length)):
        kv = kv_write_quantized(*kv, *(jnp.asarray(x[part]) for x in (keys, vals, slots.astype(np.int32))))
    q = rng.normal(size=(1, N, H)).astype(np.float32)
    out = paged_decode(
        jnp.asarray(q), *kv[:2], jnp.asarray(table[None], jnp.int32), jnp.asarray([length], jnp.int32),
        scale=H**-0.5, k_scales=kv[2], v_scales=kv[3],
    )  # fmt: skip
    expected = dense.attend(q[0], dense.rounded(keys, dtype), dense.rounded(vals, dtype), H**-0.5)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
    exact = dense.attend(q[0], keys.astype(np.float64), vals.astype(np.float64), H**-0.5)
    np.testing.assert_allclose(out[0], exact, atol=0.02 if dtype == "int8" else 0.1)


def test_quantized_in_place_when_donated():
    spec, dtype = SPECS[1], "int8"
    pages = jax.ShapeDtypeStruct((spec.num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim), dtype)
    scales = jax.ShapeDtypeStruct(pages.shape[:-1], jnp.float32)
    new = jax.ShapeDtypeStruct((spec.num_tokens, spec.num_kv_heads, spec.head_dim), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((spec.num_tokens,), jnp.int32)
    lowered = jax.jit(lambda *args: kv_write_quantized(*args), donate_argnums=(0, 1, 2, 3)).lower(
        pages, pages, scales, scales, new, new, slots
    )
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * (pages.size + 4 * scales.size) and memory.temp_size_in_bytes < pages.size


def test_bad_quantized_arguments():
    pages, new, slots = jnp.zeros((3, 2, 4, 8), jnp.int8), jnp.zeros((5, 2, 8)), jnp.zeros(5, jnp.int32)
    with pytest.raises(ValueError, match=r"v_scales must be \[P, K, page_size\] with page_size=4"):
        kv_write_quantized(pages, pages, jnp.zeros((3, 2, 4)), jnp.zeros((3, 2, 5)), new, new, slots)
    floats = pages.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="k_pages must be int8 or float8_e4m3fn, got bfloat16"):
        kv_write_quantized(floats, floats, jnp.zeros((3, 2, 4)), jnp.zeros((3, 2, 4)), new, new, slots)
