"""paged_decode and ragged_prefill against dense NumPy attention, on random ragged batches with poison all around.

The suite is written once; a backend is a parameter.
"""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode.specs import SPECS as DECODE_SPECS
from pallas_kernels.ragged_prefill import ragged_prefill
from pallas_kernels.ragged_prefill.specs import SPECS as PREFILL_SPECS
from tests.pallas_kernels.dense import attend, quantize, random_pages, rounded

BACKENDS = ["reference"]
HEADS = [(4, 4, 32), (8, 2, 64), (6, 1, 80)]  # N, K, H: multi-head, grouped-query, multi-query
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def lengths(page_size):
    return st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1, 100, 140])


@st.composite
def batches(draw):
    page_size, heads = draw(st.sampled_from([16, 32])), draw(st.sampled_from(HEADS))
    kv_lens = draw(st.lists(lengths(page_size), min_size=5, max_size=5))
    new = [draw(st.integers(0, min(length, 40))) for length in kv_lens]
    return page_size, heads, kv_lens, new, draw(st.sampled_from(["float32", "bfloat16"])), draw(st.integers(0, 2**31))


def check(out, expected, dtype):
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_decode(backend, batch):
    page_size, (N, K, H), kv_lens, _, dtype, seed = batch
    rng = np.random.default_rng(seed)
    width = 160 // page_size
    paged = random_pages(rng, kv_lens, width=width, num_pages=5 * width, K=K, H=H, page_size=page_size, dtype=dtype)
    q = jnp.asarray(rng.normal(size=(5, N, H)), dtype)
    out = paged_decode(q, paged.k_pages, paged.v_pages, paged.page_table, paged.kv_lens, scale=0.2, backend=backend)
    expected = np.zeros((5, N, H))
    for row, length in enumerate(kv_lens):
        if length:
            expected[row] = attend(np.asarray(q[row], np.float64), paged.keys[row], paged.values[row], 0.2)
    check(out, expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_prefill(backend, batch):
    page_size, (N, K, H), kv_lens, new, dtype, seed = batch
    rng = np.random.default_rng(seed)
    width, T = 160 // page_size, 208  # a few tokens that no row owns at the end, and one at the beginning
    paged = random_pages(rng, kv_lens, width=width, num_pages=5 * width, K=K, H=H, page_size=page_size, dtype=dtype)
    q = jnp.asarray(rng.normal(size=(T, N, H)), dtype)
    starts = np.concatenate([[1], 1 + np.cumsum(new)]).astype(np.int32)
    out = ragged_prefill(
        q,
        paged.k_pages,
        paged.v_pages,
        paged.page_table,
        paged.kv_lens,
        jnp.asarray(starts),
        scale=0.2,
        backend=backend,
    )
    expected = np.zeros((T, N, H))
    for row, (length, count) in enumerate(zip(kv_lens, new, strict=True)):
        for i in range(count):
            seen, token = length - count + i + 1, starts[row] + i
            query = np.asarray(q[token], np.float64)
            expected[token] = attend(query, paged.keys[row][:seen], paged.values[row][:seen], 0.2)
    check(out, expected, dtype)


@pytest.mark.parametrize("window", [None, 5])
def test_what_fits_into_one_round_is_no_loop(window):
    kv_lens = [0, 1, 17, 64]
    rng = np.random.default_rng(3)
    paged = random_pages(rng, kv_lens, width=4, num_pages=16, K=2, H=32, page_size=16)
    q = jnp.asarray(rng.normal(size=(4, 4, 32)), jnp.float32)
    arrays = q, paged.k_pages, paged.v_pages, paged.page_table, paged.kv_lens
    decode = functools.partial(paged_decode, scale=0.2, window=window, backend="reference")
    assert "while" not in str(jax.make_jaxpr(decode)(*arrays))
    expected = np.zeros(q.shape)
    for row, length in enumerate(kv_lens):
        seen = slice(0 if window is None else max(length - window, 0), length)
        if length:
            expected[row] = attend(np.asarray(q[row], np.float64), paged.keys[row][seen], paged.values[row][seen], 0.2)
    check(decode(*arrays), expected, "float32")


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("gpu", "float32"), ("gpu", "bfloat16")])
def test_what_the_products_of_queries_and_keys_are_made_of(platform, dtype, monkeypatch):
    """A GPU would round float32 to 10 bits, if it were let; 16-bit numbers it need not convert."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    pages = jax.ShapeDtypeStruct((8, 2, 16, 48), dtype)  # like no other test's, which would be traced already
    q, table, lens = (jax.ShapeDtypeStruct(*one) for one in (((3, 4, 48), dtype), ((3, 4), "i4"), ((3,), "i4")))
    decode = functools.partial(paged_decode, scale=0.2, backend="reference")
    scores, values = re.findall(
        r"dot_general.*?: \(.*?\) ->.*", jax.jit(decode).lower(q, pages, pages, table, lens).as_text()
    )
    assert ("bf16" in scores) == (dtype == "bfloat16") and "bf16" not in values
    assert all(("[HIGHEST, HIGHEST]" in one) == (dtype == "float32") for one in (scores, values))


OPTIONS = [
    dict(window=1), dict(window=20), dict(window=1000), dict(soft_cap=0.5), dict(alibi_slopes=[0.5, 0.1, 0.02, 0.7]),
    dict(window=33, soft_cap=2.0, alibi_slopes=[0.5, 0.1, 0.02, 0.7]),
]  # fmt: skip


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, kv_dtype):
    rng = np.random.default_rng(5)
    lens, new, starts = [1, 0, 50, 130], [1, 0, 7, 40], [0, 1, 1, 8, 48]
    paged = random_pages(rng, lens, width=9, num_pages=40, K=2, H=32, page_size=16)
    options = {name: jnp.asarray(x) if isinstance(x, list) else x for name, x in options.items()}
    pages, scales, keys, values = (paged.k_pages, paged.v_pages), {}, paged.keys, paged.values
    if kv_dtype != "float32":
        (k, k_scales), (v, v_scales) = (quantize(x, kv_dtype) for x in pages)
        pages, scales = (k, v), dict(k_scales=k_scales, v_scales=v_scales)
        keys, values = ([rounded(x, kv_dtype) for x in rows] for rows in (keys, values))
    table = paged.page_table, paged.kv_lens
    q = jnp.asarray(rng.normal(size=(48, 4, 32)), jnp.float32)
    out = ragged_prefill(q, *pages, *table, jnp.asarray(starts), scale=0.3, **options, **scales)
    last = jnp.maximum(jnp.asarray(starts[1:]) - 1, 0)
    decoded = paged_decode(q[last], *pages, *table, scale=0.3, **options, **scales)
    for row in (0, 2, 3):
        for i in range(new[row]):
            seen, token = lens[row] - new[row] + i + 1, starts[row] + i
            expected = attend(np.asarray(q[token]), keys[row][:seen], values[row][:seen], 0.3, **options)
            np.testing.assert_allclose(out[token], expected, atol=2e-5)
        np.testing.assert_allclose(decoded[row], out[starts[row + 1] - 1], atol=1e-6)
    assert not decoded[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=0), "window=0 must be at least 1"),
        (dict(soft_cap=0.0), "soft_cap=0.0 must be above 0"),
        (dict(alibi_slopes=jnp.zeros(3)), r"alibi_slopes must be \[N\] with N=4"),
        (dict(k_scales=jnp.zeros((3, 2, 16))), "k_scales must be given for pages of an 8-bit dtype and for no other"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        paged_decode(**GOOD, scale=1.0, **options)


def test_prefill_of_single_tokens_is_decode():
    rng = np.random.default_rng(1)
    paged = random_pages(rng, [7, 33, 1, 60], width=4, num_pages=16, K=2, H=32, page_size=16)
    q = jnp.asarray(rng.normal(size=(4, 4, 32)), jnp.float32)
    pages = (paged.k_pages, paged.v_pages, paged.page_table, paged.kv_lens)
    decoded = paged_decode(q, *pages, scale=0.3)
    prefilled = ragged_prefill(q, *pages, jnp.arange(5), scale=0.3)
    np.testing.assert_allclose(decoded, prefilled, atol=1e-6)


@pytest.mark.parametrize("spec", [spec for spec in DECODE_SPECS if spec.name.startswith("default-model")], ids=str)
def test_decode_spec(spec):
    rng = np.random.default_rng(2)
    kv_lens = rng.integers(spec.min_len, spec.max_len + 1, spec.num_rows).tolist()
    width = -(-spec.max_len // spec.page_size)
    paged = random_pages(
        rng, kv_lens, width=width, num_pages=width * spec.num_rows, K=spec.num_kv_heads, H=spec.head_dim,
        page_size=spec.page_size,
    )  # fmt: skip
    q = jnp.asarray(rng.normal(size=(spec.num_rows, spec.num_heads, spec.head_dim)), jnp.float32)
    out = paged_decode(q, paged.k_pages, paged.v_pages, paged.page_table, paged.kv_lens, scale=0.2)
    expected = [attend(np.asarray(q[i]), paged.keys[i], paged.values[i], 0.2) for i in range(spec.num_rows)]
    check(out, np.array(expected), "float32")


@pytest.mark.parametrize("spec", [spec for spec in PREFILL_SPECS if spec.name.startswith("default-model")], ids=str)
def test_prefill_spec(spec):
    rng = np.random.default_rng(3)
    new = rng.integers(spec.min_new, spec.max_new + 1, spec.num_rows)
    kv_lens = (new + spec.cached).tolist()
    width = -(-max(kv_lens) // spec.page_size)
    paged = random_pages(
        rng, kv_lens, width=width, num_pages=width * spec.num_rows, K=spec.num_kv_heads, H=spec.head_dim,
        page_size=spec.page_size,
    )  # fmt: skip
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    q = jnp.asarray(rng.normal(size=(int(starts[-1]), spec.num_heads, spec.head_dim)), jnp.float32)
    pages = (paged.k_pages, paged.v_pages, paged.page_table, paged.kv_lens)
    out = ragged_prefill(q, *pages, jnp.asarray(starts), scale=0.2)
    for row, count in enumerate(new.tolist()):
        for i in {0, count // 2, count - 1}:
            seen = spec.cached + i + 1
            expected = attend(np.asarray(q[starts[row] + i]), paged.keys[row][:seen], paged.values[row][:seen], 0.2)
            np.testing.assert_allclose(out[starts[row] + i], expected, atol=2e-5)


def test_prefill_in_chunks_is_prefill_at_once():
    rng = np.random.default_rng(4)
    paged = random_pages(rng, [75], width=5, num_pages=5, K=2, H=32, page_size=16)
    q = jnp.asarray(rng.normal(size=(75, 4, 32)), jnp.float32)
    pages = (paged.k_pages, paged.v_pages, paged.page_table)
    whole = ragged_prefill(q, *pages, paged.kv_lens, jnp.array([0, 75]), scale=0.3)
    for start, stop in [(0, 20), (20, 40), (40, 75)]:
        chunk = jnp.zeros_like(q).at[: stop - start].set(q[start:stop])  # one shape, one compilation
        out = ragged_prefill(chunk, *pages, jnp.array([stop]), jnp.array([0, stop - start]), scale=0.3)
        np.testing.assert_allclose(out[: stop - start], whole[start:stop], atol=1e-6)


def test_cost_follows_the_context_and_not_the_table():
    """16 tokens in a table for 16 million: 2 to 4 ms, and several hundred if the loop went through all of it."""
    kv = jnp.ones((8, 1, 16, 32))
    table, kv_lens = jnp.zeros((1, 2**20), jnp.int32), jnp.array([16])

    def seconds():
        start = time.perf_counter()
        paged_decode(jnp.ones((1, 1, 32)), kv, kv, table, kv_lens, scale=1.0).block_until_ready()
        return time.perf_counter() - start

    seconds()  # compiles
    assert min(seconds() for _ in range(5)) < 0.05


GOOD = dict(
    q=jnp.zeros((2, 4, 32)), k_pages=jnp.zeros((3, 2, 16, 32)), v_pages=jnp.zeros((3, 2, 16, 32)),
    page_table=jnp.zeros((2, 1), jnp.int32), kv_lens=jnp.zeros(2, jnp.int32),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", jnp.zeros((2, 32)), r"q must be \[S, N, H\], got shape \[2, 32\]"),
        ("q", jnp.zeros((2, 3, 32)), "N=3 heads, which must be a multiple of the K=2"),
        ("v_pages", jnp.zeros((3, 2, 16, 64)), "v_pages must be .* with H=32, got shape"),
        ("kv_lens", jnp.zeros(3, jnp.int32), r"kv_lens must be \[S\] with S=2"),
    ],
)
def test_bad_shapes_name_the_argument(name, value, message):
    with pytest.raises(ValueError, match=message):
        paged_decode(**(GOOD | {name: value}), scale=1.0)


def test_bad_query_starts():
    with pytest.raises(ValueError, match=r"query_starts must be \[S \+ 1\] with S=2, got shape \[2\]"):
        ragged_prefill(**GOOD, query_starts=jnp.zeros(2, jnp.int32), scale=1.0)
