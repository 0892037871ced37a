"""The Hopper kernel of mla_decode, interpreted against dense NumPy attention; on a GPU against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.paged_mla import merge, mosaic_gpu, reference
from pallas_kernels.paged_mla.mosaic_gpu import Config
from pallas_kernels.paged_mla.specs import SPECS, Spec
from tests.pallas_kernels.dense import attend, random_pages

interpreted = pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="interpret mode needs jax 0.11")

# Row lengths; N, value dim, page size; stages, CTAs; dtype.
CASES = {
    "page boundaries": ([1, 0, 15, 16, 17, 0, 63, 64, 65], (8, 128, 16), (2, 3), "bfloat16"),
    "two head blocks": ([130], (128, 128, 32), (2, 4), "bfloat16"),
    "one row in many parts": ([700], (16, 128, 64), (2, 11), "bfloat16"),
    "more CTAs than blocks": ([70, 3], (40, 128, 32), (3, 9), "float16"),
    "parts of several rows": ([300, 300, 2], (16, 128, 16), (2, 7), "bfloat16"),
    "one CTA": ([0, 100, 200, 0], (24, 256, 16), (2, 1), "bfloat16"),
    "DeepSeek's own sizes": ([140, 1, 64], (16, 512, 16), (2, 2), "bfloat16"),
}


def inputs_of(case):
    kv_lens, (N, value_dim, page_size), _, dtype = case
    rng = np.random.default_rng(0)
    H = value_dim + 64
    used = sum(-(-n // page_size) for n in kv_lens)
    width = -(-max(kv_lens) // page_size) + 1
    paged = random_pages(rng, kv_lens, width=width, num_pages=used + 1, K=1, H=H, page_size=page_size, dtype=dtype)
    q = jnp.asarray(rng.normal(size=(len(kv_lens), N, H)), dtype)
    return q, paged


@interpreted
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted(case):
    q, paged = inputs_of(case)
    _, (N, value_dim, _), (stages, num_ctas), dtype = case
    args = (q, paged.k_pages[:, 0], paged.page_table, paged.kv_lens)
    static = dict(value_dim=value_dim, scale=0.1, interpret=True)
    assert mosaic_gpu.supported(*args, **static) is None
    out = mosaic_gpu.mla_decode(*args, **static, config=Config(stages, num_ctas))
    assert out.shape == (len(q), N, value_dim) and out.dtype == dtype
    for row, keys in enumerate(paged.keys):
        wanted = np.zeros((N, value_dim))
        if len(keys):
            wanted = attend(np.asarray(q[row], np.float64), keys, keys[..., :value_dim], 0.1)
        np.testing.assert_allclose(np.asarray(out[row], np.float64), wanted, atol=2e-2, rtol=2e-2)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_interpreted_at_random(seed):
    rng = np.random.default_rng(seed)
    page_size = int(rng.choice([16, 32, 64]))
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, *rng.integers(0, 400, 3).tolist()]
    kv_lens = rng.choice(lengths, rng.integers(1, 7)).tolist()
    heads = int(rng.choice([8, 16, 128]))
    test_interpreted((kv_lens, (heads, 128, page_size), (int(rng.integers(2, 5)), int(rng.integers(1, 12))), "float16"))


@interpreted
def test_merging_several_heads_at_once(monkeypatch):
    """As for large batches, which are too slow to interpret."""
    monkeypatch.setattr(merge, "heads_at_once", lambda sizes: 8)
    jax.clear_caches()
    test_interpreted(CASES["two head blocks"])


@interpreted
@pytest.mark.parametrize("case", ["one CTA", "parts of several rows"])
def test_no_races(case, detecting_races, capfd):
    test_interpreted(CASES[case])
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("value_dim", [128, 256, 384, 512])
def test_default_config_fits_in_shared_memory(value_dim):
    config = mosaic_gpu.default_config(value_dim)
    rows = mosaic_gpu.HEADS + config.stages * mosaic_gpu.BLOCK
    assert config.stages >= 2 and rows * 2 * (value_dim + 64) + 4 * 1024 <= mosaic.SHARED_MEMORY


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "q float32 with pages float32, bfloat16 or float16 for both"),
        ({"kv_dtype": jnp.float16}, "q bfloat16 with pages float16"),
        ({"N": 12}, "12 query heads, a multiple of 8 below 64 or a multiple of 64"),
        ({"N": 96}, "96 query heads"),
        ({"value_dim": 512, "H": 544}, "value_dim 512 of 544, 128, 256, 384 or 512 of 64 more"),
        ({"value_dim": 64, "H": 128}, "value_dim 64 of 128"),
        ({"page_size": 8}, "page size 8, one of 16, 32, 64"),
    ],
)
@interpreted
def test_the_reason_why_not(change, reason):
    with_ = {"N": 16, "H": 576, "value_dim": 512, "page_size": 16, "dtype": jnp.bfloat16} | change
    q = jax.ShapeDtypeStruct((2, with_["N"], with_["H"]), with_["dtype"])
    pages = jax.ShapeDtypeStruct((3, with_["page_size"], with_["H"]), with_.get("kv_dtype", with_["dtype"]))
    static = dict(value_dim=with_["value_dim"], scale=1.0, interpret=True)
    assert reason in mosaic_gpu.supported(q, pages, None, None, **static)


def on_the_gpu(spec):
    """Arguments of a spec's call, every third row unused; what no row owns is NaN."""
    rng = np.random.default_rng(0)
    lens = rng.integers(spec.min_len, spec.max_len + 1, spec.num_rows)
    lens[1::3] = 0
    width, H = -(-spec.max_len // spec.page_size), spec.value_dim + spec.rotary_dim
    shape = (spec.num_rows * width, spec.page_size, H)
    table = rng.permutation(shape[0]).reshape(spec.num_rows, width)
    valid = np.zeros(shape[:2], bool)
    valid[table] = np.arange(width * spec.page_size).reshape(width, -1) < lens[:, None, None]
    keys = jax.random.split(jax.random.key(0))
    q = jax.random.normal(keys[0], (spec.num_rows, spec.num_heads, H), jnp.bfloat16)
    pages = jnp.where(valid[:, :, None], jax.random.normal(keys[1], shape, jnp.bfloat16), jnp.nan)
    return q, pages, jnp.asarray(table, jnp.int32), jnp.asarray(lens, jnp.int32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [
        *SPECS,
        Spec("8 heads, page 64", 20, 1, 300, num_heads=8, page_size=64),
        Spec("64 heads, page 32", 200, 1, 700, num_heads=64, page_size=32),
        Spec("value dim 128", 10, 1, 200, value_dim=128),
    ],
    ids=lambda spec: spec.name,
)
def test_spec_on_the_gpu(spec):
    args = on_the_gpu(spec)
    static = dict(value_dim=spec.value_dim, scale=(spec.value_dim + spec.rotary_dim) ** -0.5)
    expected = np.asarray(reference.mla_decode(*args, **static), np.float32)
    outs = []
    for _ in range(3):
        poison = [jnp.full(size, jnp.nan, jnp.float32) for size in (args[0].size // 2, 2**23, 2**20, 2**15)]
        jax.block_until_ready(poison)
        del poison  # likely what the output and the workspace are allocated from
        outs.append(np.asarray(mosaic_gpu.mla_decode(*args, **static), np.float32))
    np.testing.assert_allclose(outs[0], expected, atol=1e-2, rtol=2e-2)
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])
