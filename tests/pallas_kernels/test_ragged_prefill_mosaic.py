"""The Hopper kernel of ragged_prefill in Pallas's GPU interpreter, against dense attention; and what it refuses."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import mosaic
from pallas_kernels.ragged_prefill import mosaic_gpu as kernel
from tests.pallas_kernels.aot import compile_for_h200, needs_cuda_plugin, registers_and_spills
from tests.pallas_kernels.dense import attend, quantize, random_pages, rounded

missing = mosaic.unsupported(interpret=True)
interpreted = pytest.mark.skipif(missing is not None, reason=str(missing))

# New tokens and KV lengths of each row. The first row starts at token 3: tiles start and end anywhere.
SHORT = [(5, 5), (0, 40), (1, 70), (9, 33)]
LONG = [(150, 150), (70, 135)]
CASES = {
    "rows of all kinds": dict(rows=SHORT, N=2, K=1, H=64, page_size=16),
    "several tiles": dict(rows=LONG, N=1, K=1, H=64, page_size=32),
    "grouped heads, float16": dict(rows=SHORT, N=6, K=2, H=64, page_size=64, dtype="float16"),
    "wide heads": dict(rows=[(20, 90)], N=1, K=1, H=256, page_size=16),
    "few tokens": dict(rows=[(1, 3), (2, 2)], N=1, K=1, H=96, page_size=16, before=0, after=0),
    "head dim 80": dict(rows=SHORT, N=2, K=1, H=80, page_size=16),
    "window": dict(rows=[(0, 0), (9, 200), (70, 70), (1, 90)], N=2, K=1, H=64, page_size=16, window=40),
    "window of one": dict(rows=SHORT, N=1, K=1, H=64, page_size=16, window=1),
    "soft cap": dict(rows=SHORT, N=2, K=1, H=64, page_size=16, soft_cap=2.0),
    "ALiBi": dict(rows=SHORT, N=8, K=2, H=64, page_size=16, alibi=True, blocks=2),
    "all at once": dict(
        rows=[(9, 100), (3, 5)], N=4, K=2, H=64, page_size=32, alibi=True, soft_cap=3.0, window=50, kv_dtype="int8"
    ),
    "int8": dict(rows=SHORT, N=2, K=1, H=64, page_size=32, kv_dtype="int8", blocks=2),
    "fp8, head dim 80": dict(rows=SHORT, N=2, K=1, H=80, page_size=32, kv_dtype="float8_e4m3fn"),
    "int8, little room": dict(rows=SHORT, N=1, K=1, H=192, page_size=32, kv_dtype="int8"),
    "no rows in use": dict(rows=[(0, 0), (0, 0)], N=1, K=1, H=64, page_size=16),
    "many jobs a block": dict(rows=SHORT, N=3, K=1, H=64, page_size=16, blocks=2),
    "many jobs, little room": dict(rows=SHORT, N=2, K=1, H=256, page_size=32, blocks=3),
    "eight heads a tile": dict(rows=SHORT, N=8, K=1, H=64, page_size=16, pack=8, blocks=2),
    "a head a tile": dict(rows=SHORT, N=4, K=1, H=64, page_size=16, pack=1, blocks=2),
    "a job a block": dict(rows=LONG, N=1, K=1, H=64, page_size=16, blocks=1000, stages=3),
    "one warpgroup after the other": dict(
        rows=SHORT, N=1, K=1, H=64, page_size=16, take_turns=False, heavy_first=False
    ),
}


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_dense(case):
    check(**case)


def lengths(page_size):
    """(new tokens, KV length) of a row."""
    kv_lens = st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1, 130])
    return kv_lens.flatmap(lambda length: st.tuples(st.integers(0, min(length, 40)), st.just(length)))


@interpreted
@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_random_batches(data):
    page_size = data.draw(st.sampled_from([16, 32, 64]))
    rows = data.draw(st.lists(lengths(page_size), min_size=1, max_size=4))
    N, K, H = data.draw(st.sampled_from([(4, 4, 64), (4, 1, 80), (8, 2, 64)]))
    options = data.draw(
        st.fixed_dictionaries(
            dict(
                window=st.sampled_from([None, 1, 33]),
                soft_cap=st.sampled_from([None, 2.0]),
                alibi=st.booleans(),
                kv_dtype=st.sampled_from([None, "int8", "float8_e4m3fn"]),
            )
        )
    )
    check(rows, N, K, H, page_size, blocks=2, before=data.draw(st.integers(0, 9)), **options)


@interpreted
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_no_races(kv_dtype, detecting_races):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    check([(5, 5), (9, 75)], N=2, K=1, H=64, page_size=16, blocks=2, before=11, kv_dtype=kv_dtype)
    assert not gpu_callbacks.get_races().races_found


ON_GPU = CASES | {
    "head dim 128": dict(rows=[*SHORT, (300, 300), (129, 700)], N=8, K=2, H=128, page_size=16),
    "head dim 128, window": dict(rows=[*LONG, (129, 700)], N=8, K=2, H=128, page_size=16, window=200),
    "head dim 128, soft cap": dict(rows=LONG, N=8, K=2, H=128, page_size=32, soft_cap=20.0),
    "head dim 128, ALiBi": dict(rows=LONG, N=8, K=2, H=128, page_size=64, alibi=True),
    "head dim 128, int8": dict(rows=[*LONG, (129, 700)], N=8, K=2, H=128, page_size=32, kv_dtype="int8"),
    "head dim 128, fp8": dict(rows=LONG, N=8, K=2, H=128, page_size=64, kv_dtype="float8_e4m3fn"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU.values(), ids=ON_GPU)
def test_on_gpu(case):
    check(**case, interpret=False, repeat=3)


FEATURES = {
    "plain": dict(),
    "group 7": dict(N=28, K=4),
    "head dim 64": dict(H=64),
    "head dim 80": dict(H=80),
    "head dim 96": dict(H=96),
    "head dim 256": dict(H=256, spilled=320),
    "window": dict(window=1000),
    "soft cap": dict(soft_cap=30.0),
    "ALiBi": dict(alibi=True),
    "int8": dict(kv_dtype="int8", page_size=32),
    "fp8": dict(kv_dtype="float8_e4m3fn", page_size=64),
}


@needs_cuda_plugin
@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(one, id=name, marks=() if name in ("plain", "int8") else pytest.mark.slow)
        for name, one in FEATURES.items()
    ],
)
def test_machine_code(feature, monkeypatch, tmp_path):
    """No wgmma is serialised, registers suffice but for a few words once a job, and XLA copies no pool."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    case = dict(N=32, K=8, H=128, page_size=16, kv_dtype="bfloat16", alibi=False) | feature
    options = {name: case[name] for name in ("window", "soft_cap") if name in case}
    array = jax.ShapeDtypeStruct
    q = array((2048, case["N"], case["H"]), "bfloat16")
    pages = array((512, case["K"], case["page_size"], case["H"]), case["kv_dtype"])
    scales = array(pages.shape[:3], "float32") if pages.dtype.itemsize == 1 else None
    slopes = array((case["N"],), "float32") if case["alibi"] else None
    rows = [array(shape, "int32") for shape in ((4, 64), (4,), (5,))]

    def call(q, k, v, table, kv_lens, starts, slopes, scales):
        options.update(alibi_slopes=slopes, k_scales=scales, v_scales=scales)
        return kernel.ragged_prefill(q, k, v, table, kv_lens, starts, scale=0.1, **options)

    compiled = compile_for_h200(call, q, pages, pages, *rows, slopes, scales)
    [report] = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert "serialized" not in report
    [(_, spilled)] = registers_and_spills(report)
    assert spilled <= case.get("spilled", 64)
    assert compiled.memory_analysis().temp_size_in_bytes <= (2**25 if case["H"] % 64 else 2**16)


# XLA runs on as many threads as there are cores, or as the variable NPROC says. With few and larger arrays, the
# interpreter's three warpgroups wait for one another for ever.
@interpreted
@pytest.mark.slow
@pytest.mark.skipif(int(os.environ.get("NPROC", os.cpu_count())) < 8, reason="needs 8 cores, or NPROC=8")
def test_long_rows_in_wide_steps():
    check(rows=[(128, 128), (200, 461)], N=2, K=1, H=128, page_size=16, block_kv=128)


def check(
    rows, N, K, H, page_size, before=3, after=6, dtype="bfloat16", kv_dtype=None, alibi=False, window=None,
    soft_cap=None, interpret=True, repeat=1, **config,
):  # fmt: skip
    rng = np.random.default_rng(0)
    new, kv_lens = zip(*rows, strict=True)
    width = -(-max(*kv_lens, 1) // page_size)
    paged = random_pages(
        rng, kv_lens, width=width, num_pages=width * len(rows), K=K, H=H, page_size=page_size, dtype=dtype
    )
    starts = before + np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    q = jnp.asarray(rng.normal(size=(int(starts[-1]) + after, N, H)), dtype)
    scoring = dict(window=window, soft_cap=soft_cap, alibi_slopes=rng.uniform(0.01, 0.5, N) if alibi else None)
    options = scoring | dict(alibi_slopes=jnp.asarray(scoring["alibi_slopes"], jnp.float32) if alibi else None)
    k_pages, v_pages, keys, values = paged.k_pages, paged.v_pages, paged.keys, paged.values
    if kv_dtype is not None:
        (k_pages, k_scales), (v_pages, v_scales) = quantize(k_pages, kv_dtype), quantize(v_pages, kv_dtype)
        options |= dict(k_scales=k_scales, v_scales=v_scales)
        keys, values = ([rounded(x, kv_dtype) for x in rows] for rows in (keys, values))
    config = kernel.Config(**{"block_kv": 64, **config}) if interpret or config else None
    expected = np.zeros(q.shape)
    for row, (count, length) in enumerate(rows):
        for i in range(count):
            seen, token = length - count + i + 1, starts[row] + i
            query = np.asarray(q[token], np.float64)
            expected[token] = attend(query, keys[row][:seen], values[row][:seen], 0.2, **scoring)
    for _ in range(repeat):
        if not interpret:  # freed at once: the output will most likely lie in it
            jax.block_until_ready([jnp.full(q.shape, jnp.nan, q.dtype) for _ in range(4)])
        out = kernel.ragged_prefill(
            q, k_pages, v_pages, paged.page_table, paged.kv_lens, jnp.asarray(starts), scale=0.2,
            config=config, interpret=interpret, **options,
        )  # fmt: skip
        assert out.dtype == q.dtype
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("heavy_first", [False, True])
def test_every_token_is_in_one_tile(size, heavy_first):
    rng = np.random.default_rng(1)
    cut = jax.jit(kernel.cut_into_tiles, static_argnums=(2, 3, 4))
    for _ in range(30):
        counts = rng.choice([0, 0, 1, 7, 8, 127, 128, 129, 300], size=6)
        starts = np.cumsum([rng.integers(0, 20), *counts])
        kv_lens = np.where(counts > 0, counts + rng.choice([0, 5, 500], size=6), 0)
        tiles, count = jax.tree.map(np.asarray, cut(starts, kv_lens, 2048, size, heavy_first))
        owner = np.full(2048, -1)
        for row, first, lo, hi, offset, kv_len in zip(*tiles, strict=True):
            assert first % 8 == 0 and (lo == hi or first <= lo < hi <= first + size)
            assert (owner[lo:hi] == -1).all()
            owner[lo:hi] = row
            if lo < hi and kv_len == 0:
                assert hi + offset <= 0 and (hi <= starts[0] or lo >= starts[-1])
            elif lo < hi:
                assert starts[row] <= lo and hi <= starts[row + 1] and kv_len == kv_lens[row]
                assert lo + offset == kv_len - counts[row] + lo - starts[row]
        assert (owner >= 0).all()
        assert (tiles.lo < tiles.hi).tolist() == [i < count for i in range(len(tiles.lo))]
        if heavy_first:
            order = np.stack([-tiles.kv_len, tiles.rows, -(tiles.hi + tiles.offset)], axis=1)[:count].tolist()
            assert order == sorted(order)


@interpreted
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(), None),
        (dict(dtype="float32"), "bfloat16 or float16"),
        (dict(kv_dtype="int8", page_size=32), None),
        (dict(kv_dtype="int8"), "pages of int8 of a multiple of 32 tokens, got 16"),
        (dict(kv_dtype="int8", H=192, page_size=64), None),
        (dict(kv_dtype="int8", H=256, page_size=64), "more shared memory than there is for head dim 256"),
        (dict(kv_dtype="float16"), "pages of bfloat16, int8 or float8_e4m3fn, got float16"),
        (dict(H=40), "head dim that is a multiple of 16 from 64 to 256, got 40"),
        (dict(page_size=4), "page size that is a multiple of 8 and divides 128, got 4"),
        (dict(scale=-1.0), "a positive scale"),
        (dict(config=kernel.Config(block_kv=128, stages=4)), "shared memory"),
    ],
)
def test_supported(change, reason):
    case = dict(H=128, page_size=16, dtype="bfloat16", scale=0.1, config=None) | change
    q = jax.ShapeDtypeStruct((8, 4, case["H"]), case["dtype"])
    pages = jax.ShapeDtypeStruct((3, 2, case["page_size"], case["H"]), case.get("kv_dtype", case["dtype"]))
    scales = jax.ShapeDtypeStruct(pages.shape[:3], "float32") if pages.dtype.itemsize == 1 else None
    said = kernel.supported(
        q, pages, pages, None, None, None, scale=case["scale"], config=case["config"], interpret=True,
        k_scales=scales, v_scales=scales,
    )  # fmt: skip
    assert said is None if reason is None else reason in said
