"""The Hopper kernel of paged_decode, interpreted against dense NumPy attention; on a GPU against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import mosaic
from pallas_kernels.paged_decode import mosaic_gpu, reference
from pallas_kernels.paged_decode.mosaic_gpu import Config
from pallas_kernels.paged_decode.specs import SPECS
from tests.pallas_kernels.dense import attend, random_pages

interpreted = pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="interpret mode needs jax 0.11")

# Row lengths; N, K, H, page size; CTAs; dtype. What each is for is said on the left.
CASES = {
    "grouped": ([5, 0, 130, 64, 0], (8, 2, 64, 16), 3, "bfloat16"),
    "one row in many parts": ([700], (4, 1, 64, 64), 11, "bfloat16"),
    "more CTAs than blocks": ([70, 3], (8, 1, 128, 32), 9, "float16"),
    "multi-head": ([100, 1], (8, 8, 64, 16), 4, "bfloat16"),
    "padded groups": ([66, 64], (9, 3, 64, 16), 2, "bfloat16"),
    "16 to a group": ([150], (32, 2, 128, 16), 3, "bfloat16"),
    "head dim 256": ([90], (4, 2, 256, 32), 2, "bfloat16"),
    "folded": ([5, 0, 260, 63, 1], (8, 4, 32, 16), 3, "bfloat16"),
    "folded and padded": ([131, 2], (6, 2, 32, 32), 2, "bfloat16"),
}


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted(case):
    kv_lens, (N, K, H, page_size), ctas, dtype = case
    rng = np.random.default_rng(0)
    used = sum(-(-n // page_size) for n in kv_lens)
    width = -(-max(kv_lens) // page_size) + 1
    paged = random_pages(rng, kv_lens, width=width, num_pages=used + 1, K=K, H=H, page_size=page_size, dtype=dtype)
    q = jnp.asarray(rng.normal(size=(len(kv_lens), N, H)), dtype)
    args = (q, paged.k_pages, paged.v_pages, paged.page_table, paged.kv_lens)
    assert mosaic_gpu.supported(*args, scale=0.2, interpret=True) is None
    config = Config(block_keys=64, stages=2, num_ctas=ctas)
    out = mosaic_gpu.paged_decode(*args, scale=0.2, config=config, interpret=True)
    assert out.shape == q.shape and out.dtype == q.dtype
    for row, length in enumerate(kv_lens):
        query = np.asarray(q[row], np.float64)
        expected = attend(query, paged.keys[row], paged.values[row], 0.2) if length else np.zeros((N, H))
        np.testing.assert_allclose(np.asarray(out[row], np.float64), expected, atol=2e-2, rtol=2e-2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=6, max_size=6), st.sampled_from([1, 3]), st.sampled_from([1, 4, 40]))
def test_schedule_takes_every_block_once(lens, K, G):
    block = 64
    schedule = jax.jit(mosaic_gpu._schedule, static_argnums=(1, 2, 3))(jnp.array(lens, jnp.int32), K, block, G)
    starts, next_row, (share, rest) = map(np.asarray, schedule)
    blocks = [-(-n // block) for n in lens]
    wanted = [(row, head, j) for row, n in enumerate(blocks) for head in range(K) for j in range(n)]
    taken = []
    for cta, (row, head, j, length, count) in enumerate(starts.tolist()):
        assert count == share + (cta < rest)
        assert not count or length == lens[row]
        for _ in range(count):
            taken.append((row, head, j))
            j += 1
            if j == blocks[row]:
                row, head, j = (next_row[row], 0, 0) if head == K - 1 else (row, head + 1, 0)
    assert taken == wanted


@pytest.mark.parametrize(("tile", "H"), [(8, 64), (8, 128), (16, 128), (64, 128), (8, 256), (32, 256)])
def test_default_config_fits_in_shared_memory(tile, H):
    config = mosaic_gpu.default_config(tile, H)
    ctas = config.num_ctas // mosaic.num_multiprocessors()
    assert config.stages >= 2
    assert ctas * mosaic_gpu._shared_bytes(tile, H, config.block_keys, config.stages) <= mosaic_gpu.SHARED_MEMORY


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "q float32 with KV float32, one of bfloat16 and float16 for both"),
        ({"kv_dtype": jnp.float8_e4m3fn}, "q bfloat16 with KV float8_e4m3fn"),
        ({"H": 80}, "head dim 80, one of 32, 64, 128, 256"),
        ({"page_size": 24}, "page size 24, one of"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_spec_on_the_gpu(spec):
    rng = np.random.default_rng(0)
    lens = rng.integers(spec.min_len, spec.max_len + 1, spec.num_rows)
    lens[1::3] = 0
    width = -(-spec.max_len // spec.page_size)
    shape = (spec.num_rows * width, spec.num_kv_heads, spec.page_size, spec.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (spec.num_rows, spec.num_heads, spec.head_dim), jnp.bfloat16)
    k_pages, v_pages = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
    table = jnp.asarray(rng.permutation(shape[0]).reshape(spec.num_rows, width), jnp.int32)
    args = (q, k_pages, v_pages, table, jnp.asarray(lens, jnp.int32))
    out = mosaic_gpu.paged_decode(*args, scale=spec.head_dim**-0.5)
    expected = reference.paged_decode(*args, scale=spec.head_dim**-0.5)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=1e-2, rtol=2e-2)
