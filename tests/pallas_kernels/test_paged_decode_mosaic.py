"""The Hopper kernel of paged_decode, interpreted against dense NumPy attention; on a GPU against the reference."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import mosaic
from pallas_kernels.paged_decode import mosaic_gpu, reference
from pallas_kernels.paged_decode.mosaic_gpu import Config
from pallas_kernels.paged_decode.schedule import Span, cut, owner, row_ends
from pallas_kernels.paged_decode.specs import SPECS
from tests.pallas_kernels.dense import attend, forget, quantize, random_pages, rounded

interpreted = pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="interpret mode needs jax 0.11")

# Row lengths; N, K, H, page size; CTAs; dtype; options. What each is for is said on the left.
CASES = {
    "grouped": ([5, 0, 130, 64, 0], (8, 2, 64, 16), 3, "bfloat16", {}),
    "one row in many parts": ([700], (4, 1, 64, 64), 11, "bfloat16", {}),
    "more CTAs than blocks": ([70, 3], (8, 1, 128, 32), 9, "float16", {}),
    "multi-head": ([100, 1], (8, 8, 64, 16), 4, "bfloat16", {}),
    "padded groups": ([66, 64], (9, 3, 64, 16), 2, "bfloat16", {}),
    "16 to a group": ([150], (32, 2, 128, 16), 3, "bfloat16", {}),
    "head dim 256": ([90], (4, 2, 256, 32), 2, "bfloat16", {}),
    "head dim 96": ([130, 17], (4, 4, 96, 16), 2, "bfloat16", {}),
    "head dim 80": ([70, 0], (4, 1, 80, 32), 2, "float16", {}),
    "folded": ([5, 0, 260, 63, 1], (8, 4, 32, 16), 3, "bfloat16", {}),
    "folded and padded": ([131, 2], (6, 2, 32, 32), 2, "bfloat16", {}),
    "window within a block": ([300, 3, 64, 0], (8, 2, 64, 16), 3, "bfloat16", dict(window=20)),
    "window over blocks": ([300, 140, 129], (4, 2, 64, 16), 4, "bfloat16", dict(window=129)),
    "window of one key": ([65, 1], (4, 1, 64, 32), 2, "bfloat16", dict(window=1)),
    "folded window": ([300, 3], (4, 2, 32, 16), 3, "bfloat16", dict(window=50)),
    "soft cap": ([90, 1], (4, 2, 64, 16), 2, "bfloat16", dict(soft_cap=2.0)),
    "slopes": ([200, 3], (4, 2, 64, 16), 3, "bfloat16", dict(slopes=True)),
    "slopes, padded": ([130], (3, 1, 64, 16), 2, "bfloat16", dict(slopes=True)),
    "slopes, folded": ([130, 5], (4, 2, 32, 16), 2, "bfloat16", dict(slopes=True, soft_cap=3.0)),
    "four queries": ([200, 64, 2, 0, 67], (4, 2, 64, 16), 4, "bfloat16", dict(queries=4)),
    "three queries, padded": ([66, 1], (6, 2, 64, 32), 2, "bfloat16", dict(queries=3)),
    "two queries, folded": ([130, 1], (4, 2, 32, 16), 2, "bfloat16", dict(queries=2)),
    "int8": ([100, 0, 1], (4, 2, 64, 32), 2, "bfloat16", dict(kv_dtype="int8")),
    "int8 and float16": ([70], (4, 1, 128, 64), 2, "float16", dict(kv_dtype="int8")),
    "float8": ([100, 0, 64], (4, 2, 128, 32), 2, "bfloat16", dict(kv_dtype="float8_e4m3fn")),
    "float8, windowed": ([200, 70], (2, 1, 64, 64), 2, "bfloat16", dict(kv_dtype="float8_e4m3fn", window=70)),
    "int8, four queries": ([130, 3], (2, 1, 64, 32), 2, "bfloat16", dict(kv_dtype="int8", queries=4)),
    "all at once": ([300, 2], (4, 2, 64, 16), 3, "bfloat16", dict(queries=2, window=70, soft_cap=3.0, slopes=True)),
}


def slopes_of(N):
    return jnp.asarray(2.0 ** -np.arange(1, N + 1), jnp.float32)


def expected_of(q, paged, scale, **options):
    """Dense attention of q [S, N, H] or [S, Q, N, H], float64."""
    expected = np.zeros(q.shape)
    for row, (keys, values) in enumerate(zip(paged.keys, paged.values, strict=True)):
        if q.ndim == 3 and len(keys):
            expected[row] = attend(np.asarray(q[row], np.float64), keys, values, scale, **options)
        for i in range(q.shape[1] if q.ndim == 4 else 0):
            seen = len(keys) - q.shape[1] + 1 + i
            if seen > 0:
                query = np.asarray(q[row, i], np.float64)
                expected[row, i] = attend(query, keys[:seen], values[:seen], scale, **options)
    return expected


def inputs_of(case):
    kv_lens, (N, K, H, page_size), _, dtype, options = case
    queries, window = options.get("queries"), options.get("window")
    rng = np.random.default_rng(0)
    used = sum(-(-n // page_size) for n in kv_lens)
    width = -(-max(kv_lens) // page_size) + 1
    paged = random_pages(rng, kv_lens, width=width, num_pages=used + 1, K=K, H=H, page_size=page_size, dtype=dtype)
    if window is not None:
        paged = forget(paged, [max(0, n - (queries or 1) + 1 - window) for n in kv_lens], page_size)
    q = jnp.asarray(rng.normal(size=(len(kv_lens), *([queries] if queries else []), N, H)), dtype)
    scales = {}
    if (kv_dtype := options.get("kv_dtype")) is not None:
        (k, k_scales), (v, v_scales) = (quantize(x, kv_dtype) for x in (paged.k_pages, paged.v_pages))
        scales = dict(k_scales=k_scales, v_scales=v_scales)
        keys, values = ([rounded(x, kv_dtype) for x in rows] for rows in (paged.keys, paged.values))
        paged = replace(paged, k_pages=k, v_pages=v, keys=keys, values=values)
    slopes = dict(alibi_slopes=slopes_of(N)) if options.get("slopes") else {}
    return q, paged, {name: x for name, x in options.items() if name in ("window", "soft_cap")} | slopes, scales


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted(case):
    q, paged, options, scales = inputs_of(case)
    args = (q, paged.k_pages, paged.v_pages, paged.page_table, paged.kv_lens)
    assert mosaic_gpu.supported(*args, scale=0.2, interpret=True, **options, **scales) is None
    config = Config(block_keys=64, stages=2, num_ctas=case[2])
    out = mosaic_gpu.paged_decode(*args, scale=0.2, config=config, interpret=True, **options, **scales)
    assert out.shape == q.shape and out.dtype == q.dtype
    expected = expected_of(q, paged, 0.2, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_of_the_same(case):
    q, paged, options, scales = inputs_of(case)
    args = (q, paged.k_pages, paged.v_pages, paged.page_table, paged.kv_lens)
    out = reference.paged_decode(*args, scale=0.2, **options, **scales)
    expected = expected_of(q, paged, 0.2, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-2, rtol=2e-2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=6, max_size=6),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 4, 40]),
    st.sampled_from([(1, None), (3, None), (1, 1), (1, 70), (4, 130)]),
)
def test_schedule_takes_every_block_once(lens, K, G, queries_and_window):
    span, page = Span(64, *queries_and_window), 16
    table = jnp.arange(6 * 20, dtype=jnp.int32).reshape(6, 20)
    schedule = jax.jit(cut, static_argnums=range(2, 6))(jnp.array(lens, jnp.int32), table, K, span, page, G)
    starts, next_row, (share, rest) = map(np.asarray, schedule)
    blocks = [blocks_seen(n, span) for n in lens]
    wanted = [(row, head, j) for row, n in enumerate(blocks) for head in range(K) for j in n]
    taken = []
    for cta, (row, head, j, length, count, *ids) in enumerate(starts.tolist()):
        assert count == share + (cta < rest)
        if count:
            assert length == lens[row]
            seen = [i for i in range(20) if i * page < length and (i + 1) * page > span.first_token(length)]
            entries = np.clip((blocks[row][j] * 4) + np.arange(4), seen[0], seen[-1])
            assert ids == (row * 20 + entries).tolist()
        for _ in range(count):
            taken.append((row, head, blocks[row][j]))
            j += 1
            if j == len(blocks[row]):
                row, head, j = (next_row[row], 0, 0) if head == K - 1 else (row, head + 1, 0)
    assert taken == wanted
    owners = np.repeat(np.arange(G), starts[:, 4])
    np.testing.assert_array_equal(owners_of(jnp.arange(90), share, rest)[: len(taken)], owners)
    np.testing.assert_array_equal(row_ends(jnp.array(lens), K, span), K * np.cumsum([len(n) for n in blocks]))


owners_of = jax.jit(jax.vmap(owner, in_axes=(0, None, None)))


def blocks_seen(length, span):
    """The blocks with a token that a query sees, found token by token."""
    last = range(max(0, length - span.queries), length)
    seen = {key for query in last for key in range(query + 1) if span.window is None or query - key < span.window}
    return sorted({key // span.block for key in seen})


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("segments", [8, 512])
@pytest.mark.parametrize(("tile", "H"), [(8, 64), (8, 96), (8, 128), (16, 128), (64, 128), (8, 256), (32, 256)])
def test_default_config_fits_in_shared_memory(tile, H, segments, kv_dtype):
    config = mosaic_gpu.default_config(tile, H, kv_dtype, segments)
    ctas = config.num_ctas // mosaic.num_multiprocessors()
    assert config.stages >= 2 and (segments > 8 or ctas == 1)
    bytes_of_cta = mosaic_gpu._shared_bytes(tile, H, config.block_keys, config.stages, kv_dtype)
    assert ctas * bytes_of_cta <= mosaic.SHARED_MEMORY


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "q float32 with KV float32, bfloat16 or float16 for q"),
        ({"kv_dtype": jnp.float8_e5m2}, "q bfloat16 with KV float8_e5m2"),
        ({"H": 40}, "head dim 40 with KV bfloat16, one of 32, 64, 80, 96, 128, 256"),
        ({"H": 32, "kv_dtype": jnp.int8}, "head dim 32 with KV int8, one of 64, 128, 256"),
        ({"page_size": 24}, "page size 24 with KV bfloat16, one of 16, 32, 64"),
        ({"kv_dtype": jnp.int8}, "page size 16 with KV int8, one of 32, 64"),
        ({"N": 128}, "128 query heads a KV head of head dim 64, at most 64"),
    ],
)
@interpreted
def test_the_reason_why_not(change, reason):
    with_ = {"N": 8, "H": 64, "page_size": 16, "dtype": jnp.bfloat16} | change
    q = jnp.zeros((2, with_["N"], with_["H"]), with_["dtype"])
    pages = jnp.zeros((3, 1, with_["page_size"], with_["H"]), with_.get("kv_dtype", with_["dtype"]))
    table, lens = jnp.zeros((2, 1), jnp.int32), jnp.zeros(2, jnp.int32)
    assert reason in mosaic_gpu.supported(q, pages, pages, table, lens, scale=1.0, interpret=True)


def test_no_hopper_gpu_is_a_reason():
    if jax.default_backend() == "cpu":
        assert "is needed" in mosaic.unsupported()


def on_the_gpu(spec, garbage):
    """Arguments of a spec's call, every third row unused; what no row owns is `garbage`."""
    rng = np.random.default_rng(0)
    lens = rng.integers(spec.min_len, spec.max_len + 1, spec.num_rows)
    lens[1::3] = 0
    width = -(-spec.max_len // spec.page_size)
    shape = (spec.num_rows * width, spec.num_kv_heads, spec.page_size, spec.head_dim)
    table = rng.permutation(shape[0]).reshape(spec.num_rows, width)
    valid = np.zeros((shape[0], spec.page_size), bool)
    valid[table] = np.arange(width * spec.page_size).reshape(width, -1) < lens[:, None, None]
    keys = jax.random.split(jax.random.key(0), 3)
    queries = () if spec.queries is None else (spec.queries,)
    q = jax.random.normal(keys[0], (spec.num_rows, *queries, spec.num_heads, spec.head_dim), jnp.bfloat16)
    pages = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:]]
    pages = [jnp.where(valid[:, None, :, None], x, garbage) for x in pages]
    options = dict(window=spec.window, soft_cap=spec.soft_cap, scale=spec.head_dim**-0.5)
    if spec.alibi:
        options["alibi_slopes"] = slopes_of(spec.num_heads)
    if spec.kv_dtype != "bfloat16":
        pages, scales = zip(*(quantize(x, spec.kv_dtype) for x in pages), strict=True)
        options |= dict(zip(("k_scales", "v_scales"), scales, strict=True))
    return (q, *pages, jnp.asarray(table, jnp.int32), jnp.asarray(lens, jnp.int32)), options


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_spec_on_the_gpu(spec):
    args, options = on_the_gpu(spec, jnp.nan)
    expected = np.asarray(reference.paged_decode(*args, **options), np.float32)
    outs = []
    for _ in range(3):
        poison = [jnp.full(size, jnp.nan, jnp.float32) for size in (args[0].size // 2, 2**20, 2**12)]
        jax.block_until_ready(poison)
        del poison  # likely what the output and the workspace are allocated from
        outs.append(np.asarray(mosaic_gpu.paged_decode(*args, **options), np.float32))
    np.testing.assert_allclose(outs[0], expected, atol=1e-2, rtol=2e-2)
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@interpreted
@pytest.mark.parametrize("case", ["multi-head", "folded", "four queries", "window over blocks", "int8"])
def test_no_races(case, detecting_races, capfd):
    test_interpreted(CASES[case])
    assert "RACE" not in "".join(capfd.readouterr())
