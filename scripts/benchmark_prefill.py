"""Checks the Hopper kernel of ragged_prefill against the reference on a GPU, then measures it. JSON goes to --out.

TFLOP/s count the causal scores and their products with the values, 4 N H per query and key, and stand beside the rate
of a bfloat16 8192^3 matmul of the same run. One program makes CALLS calls that differ in the queries alone, like the
layers of a model: cutting rows into tiles is then done once.

On an idle GPU: python scripts/benchmark_prefill.py --out prefill.json
"""

import argparse
import functools
import time
import traceback

import benchmark_report
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_prefill import mosaic_gpu, reference
from pallas_kernels.ragged_prefill.mosaic_gpu import Config
from pallas_kernels.ragged_prefill.specs import SPECS, Spec

CALLS = 4
CONFIGS = [
    Config(),
    Config(stages=3),
    Config(take_turns=False),
    Config(heavy_first=False),
    Config(blocks=1 << 20),
    Config(blocks=1 << 20, stages=3),
    Config(block_kv=64, stages=4),
    Config(block_kv=64, stages=6),
]
CHECKS = [
    Spec("group 4, head dim 128", 6, 1, 300, 0),
    Spec("group 4, head dim 128, cached", 6, 1, 300, 500, page_size=32),
    Spec("group 32, head dim 64", 5, 1, 200, 77, 32, 1, 64, 64),
    Spec("group 1, head dim 256", 4, 1, 200, 77, 4, 4, 256, 16),
    Spec("group 2, head dim 96", 4, 1, 200, 77, 8, 4, 96, 16),
    Spec("single tokens", 40, 1, 3, 20),
    *SPECS[:2],
]


def inputs(spec, dtype, poison=False, seed=0):
    """The op's arguments. With poison: NaN in everything that no row owns, also the table, and rows without tokens."""
    rng = np.random.default_rng(seed)
    new = rng.integers(spec.min_new, spec.max_new + 1, spec.num_rows)
    if poison and spec.num_rows > 2:
        new[1] = 0
    kv_lens = new + spec.cached
    lengths = -(-kv_lens // spec.page_size)
    width, num_pages = int(lengths.max()), int(lengths.sum()) + 1
    table = np.full((spec.num_rows, width), 2**30 if poison else 0, np.int32)
    pages = iter(rng.permutation(num_pages - 1) + 1)
    used = np.zeros((num_pages, 1, spec.page_size, 1), bool)
    for row, length in enumerate(kv_lens):
        for i in range(lengths[row]):
            table[row, i] = page = next(pages)
            used[page, :, : length - i * spec.page_size] = True
    before, after = (5, 70) if poison else (0, 0)
    starts = before + np.concatenate([[0], np.cumsum(new)])
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim)
    k, v = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    if poison:
        k, v = (jnp.where(used, x, jnp.nan) for x in (k, v))
    q = jax.random.normal(keys[2], (int(starts[-1]) + after, spec.num_heads, spec.head_dim), dtype)
    flops = 4 * spec.num_heads * spec.head_dim * float(np.sum(new * (kv_lens - (new - 1) / 2)))
    return (q, k, v, *(jnp.asarray(x, jnp.int32) for x in (table, kv_lens, starts))), flops


def check(spec, dtype, config):
    """The largest difference from the reference, of two runs after memory was filled with NaN."""
    args, _ = inputs(spec, dtype, poison=True)
    scale = spec.head_dim**-0.5
    expected = np.asarray(reference.ragged_prefill(*args, scale=scale), np.float64)
    worst = 0.0
    for _ in range(2):
        # Freed at once: the output will most likely lie in it.
        jax.block_until_ready([jnp.full(args[0].shape, jnp.nan, dtype) for _ in range(4)])
        out = np.asarray(mosaic_gpu.ragged_prefill(*args, scale=scale, config=config), np.float64)
        worst = max(worst, float(np.abs(out - expected).max()))  # NaN if any is
        if np.isnan(out).any():
            return float("nan")
    return worst


def seconds(function, *args, repeat=20):
    """Of one call, in the best of three runs of several calls one after the other."""
    jax.block_until_ready(function(*args))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeat):
            out = function(*args)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / repeat)
    return best


def guarded(results, name, function):
    try:
        results[name] = function()
    except Exception as error:
        traceback.print_exc()
        results[name] = f"{type(error).__name__}: {str(error)[:500]}"
    print(f"{name}: {results[name]}", flush=True)


def measure(spec, config):
    args, flops = inputs(spec, jnp.bfloat16)
    reason = mosaic_gpu.supported(*args, scale=0.1, config=config)
    if reason is not None:
        return reason
    q, *others = args
    queries = [jax.random.normal(jax.random.key(i), q.shape, q.dtype) for i in range(CALLS)]
    call = functools.partial(mosaic_gpu.ragged_prefill, scale=spec.head_dim**-0.5, config=config)
    function = jax.jit(lambda queries, *others: [call(q, *others) for q in queries])
    time_of_one = seconds(function, queries, *others, repeat=5) / CALLS
    return {"ms": round(time_of_one * 1e3, 4), "tflops": round(flops / time_of_one / 1e12, 1)}


def matmul_tflops():
    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    return round(2 * 8192**3 / seconds(jax.jit(jnp.matmul), x, x) / 1e12, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="where the JSON goes")
    parser.add_argument("--only-check", action="store_true", help="do not measure")
    parser.add_argument("--default-only", action="store_true", help="the default Config alone")
    options = parser.parse_args()
    configs = CONFIGS[:1] if options.default_only else CONFIGS
    device = jax.devices()[0]
    results: dict[str, dict] = {"device": device.device_kind, "jax": jax.__version__, "checks": {}, "specs": {}}
    for spec in CHECKS:
        for dtype in (jnp.bfloat16, jnp.float16) if spec is CHECKS[0] else (jnp.bfloat16,):
            name = f"{spec.name} {jnp.dtype(dtype).name}"
            guarded(results["checks"], name, lambda spec=spec, dtype=dtype: check(spec, dtype, None))
    for config in configs[1:]:
        guarded(results["checks"], str(config), lambda config=config: check(CHECKS[1], jnp.bfloat16, config))
    if not options.only_check:
        guarded(results, "matmul 8192^3 tflops", matmul_tflops)
        for spec in SPECS:
            of_spec = results["specs"][spec.name] = {}
            for config in configs if spec.head_dim == 128 else [None]:
                guarded(of_spec, str(config), lambda spec=spec, config=config: measure(spec, config))
    if options.out:
        benchmark_report.write(options.out, results)


if __name__ == "__main__":
    main()
