"""mla_decode and mla_prefill against dense NumPy attention, on random ragged batches with poison all around."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_mla import mla_decode, mla_prefill
from tests.pallas_kernels.dense import attend, random_pages

H, VALUE_DIM, PAGE = 48, 32, 16
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def expected(q, keys):
    """One query [N, H] over the keys [n, 1, H] of a row."""
    return attend(np.asarray(q, np.float64), keys, keys[..., :VALUE_DIM], 0.2)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 100, 140]), min_size=4, max_size=4),
    st.sampled_from([1, 5]),
    st.sampled_from(sorted(TOLERANCE)),
    st.integers(0, 2**31),
)
def test_against_dense(kv_lens, N, dtype, seed):
    rng = np.random.default_rng(seed)
    paged = random_pages(rng, kv_lens, width=9, num_pages=36, K=1, H=H, page_size=PAGE, dtype=dtype)
    pages = paged.k_pages[:, 0], paged.page_table, paged.kv_lens
    tolerance = dict(atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    q = jnp.asarray(rng.normal(size=(4, N, H)), dtype)
    out = mla_decode(q, *pages, value_dim=VALUE_DIM, scale=0.2)
    assert out.shape == (4, N, VALUE_DIM) and out.dtype == dtype
    for row, length in enumerate(kv_lens):
        wanted = expected(q[row], paged.keys[row]) if length else np.zeros((N, VALUE_DIM))
        np.testing.assert_allclose(np.asarray(out[row], np.float64), wanted, **tolerance)

    new = [min(length, int(rng.integers(0, 30))) for length in kv_lens]
    starts = np.concatenate([[2], 2 + np.cumsum(new)])  # and a few tokens that no row owns, before and after
    q = jnp.asarray(rng.normal(size=(125, N, H)), dtype)
    out = mla_prefill(q, *pages, jnp.asarray(starts, jnp.int32), value_dim=VALUE_DIM, scale=0.2)
    wanted = np.zeros((125, N, VALUE_DIM))
    for row, count in enumerate(new):
        for i in range(count):
            wanted[starts[row] + i] = expected(q[starts[row] + i], paged.keys[row][: kv_lens[row] - count + i + 1])
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, **tolerance)


GOOD = dict(
    q=jnp.zeros((2, 4, H)), pages=jnp.zeros((3, PAGE, H)), page_table=jnp.zeros((2, 1), jnp.int32),
    kv_lens=jnp.zeros(2, jnp.int32), value_dim=VALUE_DIM, scale=1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", jnp.zeros((2, H)), r"q must be \[S, N, H\], got shape \[2, 48\]"),
        ("pages", jnp.zeros((3, PAGE, 64)), r"pages must be \[P, page_size, H\] with H=48, got shape"),
        ("value_dim", 49, "value_dim=49 must be from 1 to H=48"),
    ],
)
def test_bad_arguments_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        mla_decode(**(GOOD | {name: value}))


def test_bad_query_starts():
    with pytest.raises(ValueError, match=r"query_starts must be \[S \+ 1\] with S=2, got shape \[2\]"):
        mla_prefill(**GOOD, query_starts=jnp.zeros(2, jnp.int32))
