"""The Hopper kernel of mla_decode, interpreted against dense NumPy attention; on a GPU against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.paged_mla import mosaic_gpu, reference
from pallas_kernels.paged_mla.mosaic_gpu import Config
from pallas_kernels.paged_mla.specs import SPECS
from tests.pallas_kernels.dense import attend, random_pages

interpreted = pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="interpret mode needs jax 0.11")

# Row lengths; N, value dim, page size; stages, CTAs; dtype.
CASES = {
    "page boundaries": ([1, 0, 15, 16, 17, 0, 63, 64, 65], (8, 128, 16), (2, 3), "bfloat16"),
    "two head blocks": ([130, 0, 5], (128, 128, 32), (2, 3), "bfloat16"),
    "one row in many parts": ([700], (16, 128, 64), (2, 11), "bfloat16"),
    "more CTAs than blocks": ([70, 3], (64, 128, 32), (3, 9), "float16"),
    "a part of a part": ([300, 300, 2], (128, 128, 16), (2, 7), "bfloat16"),
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
