"""Attention kernels on the GPU at hand: right first, then how near they come to the hardware.

    python scripts/benchmark_kernels.py [--quick | --configs] [--only TEXT] [--seconds 140] [--output-json FILE]

Each case is compared with the reference, twice, on KV where everything that no row owns is NaN. Then a chain of calls,
each on KV of its own and on the output of the call before, is timed inside one jit. The ceiling is measured in the same
run: the bandwidth of a maximum over 2 GiB, for kernels that read. A case that fails is reported and the next one runs.
"""

import argparse
import functools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import benchmark_report
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_decode import mosaic_gpu as decode_kernel
from pallas_kernels.paged_decode import reference as decode_reference
from pallas_kernels.paged_decode.specs import SPECS as DECODE_SPECS
from pallas_kernels.paged_decode.specs import Spec as DecodeSpec

CHAIN = 32
BEYOND_CACHE = 2**30  # bytes of KV that a chain goes through before it meets the same again


@dataclass
class Case:
    """One kernel, shape and configuration.

    Attributes:
      check: runs kernel and reference, returns the largest difference; raises if the two runs differ from each other.
      chain: returns a function and its arguments; the function makes CHAIN calls.
      work: what one call moves or computes, in `unit`: "bytes" or "flops".
    """

    op: str
    spec: str
    config: str
    check: Callable[[], float]
    chain: Callable[[], tuple[Callable, tuple]]
    work: float
    unit: str = "bytes"
    figures: dict[str, Any] = field(default_factory=dict)


def seconds_per_run(function: Callable, *args: Any, runs: int = 8, repeats: int = 5) -> float:
    """Median over `repeats`; the runs of one repeat are dispatched together, so that the host is not measured."""
    for _ in range(3):  # compiles, runs, and captures a command buffer
        jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([function(*args) for _ in range(runs)])
        times.append((time.perf_counter() - start) / runs)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second of a maximum over 2 GiB."""
    x = jnp.zeros(2**29, jnp.float32)
    return x.nbytes / seconds_per_run(jax.jit(jnp.max), x)


def matrix_rate() -> float:
    """Operations a second of a bfloat16 product of two 8192 x 8192 matrices."""
    a = jnp.ones((8192, 8192), jnp.bfloat16)
    return 2 * 8192**3 / seconds_per_run(jax.jit(jnp.matmul), a, a)


# --- paged_decode


@dataclass
class Batch:
    """Inputs of `copies` calls over one pool, each call with pages of its own. `options`: the kernel's arrays."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    tables: list[jax.Array]
    kv_lens: jax.Array
    options: dict[str, jax.Array]


def decode_bytes(spec: DecodeSpec, lens: np.ndarray) -> int:
    """Bytes of the keys and values that some query sees, with their scales."""
    if spec.window is not None:
        lens = np.minimum(lens, spec.window + (spec.queries or 1) - 1)
    itemsize = jnp.dtype(spec.kv_dtype).itemsize
    return int(lens.sum()) * spec.num_kv_heads * 2 * (spec.head_dim * itemsize + (4 if itemsize == 1 else 0))


def decode_batch(spec: DecodeSpec, page_size: int, copies: int | None, poison: bool) -> Batch:
    rng = np.random.default_rng(0)
    lens = rng.integers(spec.min_len, spec.max_len + 1, spec.num_rows)
    K, H, S = spec.num_kv_heads, spec.head_dim, spec.num_rows
    pool_bytes = int(lens.sum()) * K * H * 2 * 2
    copies = copies or int(
        np.clip(-(-BEYOND_CACHE // decode_bytes(spec, lens)), 2, max(2, min(CHAIN, 2**34 // pool_bytes)))
    )
    pages = -(-lens // page_size)
    width, total = int(pages.max()) + 3, int(pages.sum())
    P = copies * total + 1  # the last one belongs to nobody
    free = rng.permutation(P - 1)
    valid = np.zeros((P, page_size), bool)
    tables = []
    for copy in range(copies):
        table = rng.choice([-1, P, 2**30, P - 1], size=(S, width)) if poison else np.zeros((S, width))
        taken = copy * total
        for row, count in enumerate(pages):
            table[row, :count] = free[taken : taken + count]
            valid[free[taken : taken + count]] = True
            valid[free[taken + count - 1], lens[row] - (count - 1) * page_size :] = False
            taken += count
        tables.append(jnp.asarray(table, jnp.int32))

    keys = jax.random.split(jax.random.key(0), 3)
    queries = () if spec.queries is None else (spec.queries,)
    q = jax.random.normal(keys[2], (S, *queries, spec.num_heads, H), jnp.bfloat16)
    shape = (P, K, page_size, H)
    (k_pages, k_scales), (v_pages, v_scales) = (random_pool(key, shape, spec, valid, poison) for key in keys[:2])
    options = dict(k_scales=k_scales, v_scales=v_scales)
    if spec.alibi:
        options["alibi_slopes"] = 2.0 ** -jnp.linspace(0.25, 8, spec.num_heads)
    options = {name: x for name, x in options.items() if x is not None}
    return Batch(q, k_pages, v_pages, tables, jnp.asarray(lens, jnp.int32), options)


@functools.partial(jax.jit, static_argnames=("shape", "spec", "poison"))
def random_pool(key, shape, spec, valid, poison):
    """Pages and, if they are of 8 bits, scales; NaN where `poison` asks for it and no token is `valid`."""
    values = jax.random.normal(key, shape, jnp.bfloat16)
    if poison:
        values = jnp.where(valid[:, None, :, None], values, jnp.nan)
    if jnp.dtype(spec.kv_dtype).itemsize == 2:
        return values, None
    largest = 127 if spec.kv_dtype == "int8" else 448
    scales = jnp.max(jnp.abs(values), axis=-1).astype(jnp.float32) / largest
    scaled = values.astype(jnp.float32) / scales[..., None]
    return (jnp.round(scaled) if spec.kv_dtype == "int8" else scaled).astype(spec.kv_dtype), scales


def check_decode(spec: DecodeSpec, page_size: int, kernel: Callable) -> float:
    batch = decode_batch(spec, page_size, 1, poison=True)
    # Every third row unused as well; a batch of one row stays as it is.
    kv_lens = jnp.where((jnp.arange(spec.num_rows) % 3 == 1), 0, batch.kv_lens)
    args = (batch.q, batch.k_pages, batch.v_pages, batch.tables[0], kv_lens)
    static = dict(scale=spec.head_dim**-0.5, window=spec.window, soft_cap=spec.soft_cap)
    expected = np.asarray(decode_reference.paged_decode(*args, **static, **batch.options), np.float32)
    outs = []
    for _ in range(2):
        # Freed at once, and likely what the output and the workspace are allocated from.
        poison = [jnp.full(shape, jnp.nan, batch.q.dtype) for shape in [batch.q.shape, (2**22,), (2**20,), (2**12,)]]
        jax.block_until_ready(poison)
        del poison
        outs.append(np.asarray(kernel(*args, **batch.options), np.float32))
    difference = float(np.abs(outs[0] - expected).max())  # NaN if there is one
    if not np.array_equal(outs[0], outs[1]):
        raise AssertionError(f"two runs differ, by {np.abs(outs[0] - outs[1]).max()}")
    if not difference < 0.02:
        bad = np.unique(np.argwhere(~(np.abs(outs[0] - expected) < 0.02))[:, 0])
        raise AssertionError(f"difference {difference} from the reference; rows {bad[:20].tolist()} of {len(expected)}")
    return difference


def decode_chain(spec: DecodeSpec, page_size: int, kernel: Callable) -> tuple[Callable, tuple]:
    batch = decode_batch(spec, page_size, None, poison=False)

    @jax.jit
    def chain(q, k_pages, v_pages, tables, kv_lens, options):
        for i in range(CHAIN):
            q = kernel(q, k_pages, v_pages, tables[i % len(tables)], kv_lens, **options)
        return q

    return chain, (batch.q, batch.k_pages, batch.v_pages, batch.tables, batch.kv_lens, batch.options)


def decode_cases(effort: str) -> Iterator[Case]:
    """The default configuration on every shape first; then larger pages; then, if asked for, other configurations."""
    C = decode_kernel.Config
    sms = decode_kernel.mosaic.num_multiprocessors()
    variants: list[tuple[int, C | None]] = [(16, None)]
    if effort != "quick":
        variants += [(64, None)]
    if effort == "configs":
        variants += [(16, C(64, stages, sms)) for stages in (3, 4, 6, 8, 12)]
        variants += [(16, C(64, stages, 2 * sms)) for stages in (2, 3, 4, 6)]
        variants += [(16, C(128, stages, sms)) for stages in (2, 3, 6)]
        variants += [(16, C(64, stages, 3 * sms)) for stages in (2, 3)]
    for at_least, config in variants:
        for spec in DECODE_SPECS:
            page_size = max(at_least, spec.page_size)
            kernel = functools.partial(
                decode_kernel.paged_decode, scale=spec.head_dim**-0.5, window=spec.window, soft_cap=spec.soft_cap,
                config=config,
            )  # fmt: skip
            lens = np.random.default_rng(0).integers(spec.min_len, spec.max_len + 1, spec.num_rows)
            yield Case(
                "paged_decode",
                spec.name,
                f"page {page_size}, {config or 'default'}",
                functools.partial(check_decode, spec, page_size, kernel),
                functools.partial(decode_chain, spec, page_size, kernel),
                decode_bytes(spec, lens),
            )


OPS: dict[str, Callable[[str], Iterator[Case]]] = {"paged_decode": decode_cases}

# ---


def measure(case: Case, ceilings: dict[str, float]) -> None:
    """Fills in the figures, or the error."""
    try:
        case.figures["difference"] = case.check()
        function, args = case.chain()
        seconds = seconds_per_run(function, *args) / CHAIN
        rate = case.work / seconds
        case.figures |= {"microseconds": seconds * 1e6, "rate": rate, "fraction": rate / ceilings[case.unit]}
    except Exception as error:
        case.figures["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        traceback.print_exc(limit=-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="the default configurations alone")
    effort.add_argument("--configs", action="store_true", help="many configurations of each shape, to choose from")
    parser.add_argument("--only", default="", help="cases whose op, shape or configuration contains this")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--seconds", type=float, default=140, help="no new case starts after this")
    parser.add_argument("--output-json")
    args = parser.parse_args()
    effort = "quick" if args.quick else "configs" if args.configs else "normal"
    start = time.perf_counter()
    ceilings = {"bytes": read_bandwidth(), "flops": matrix_rate()}
    print(
        f"{benchmark_report.hardware()}: read {ceilings['bytes'] / 1e12:.2f} TB/s,"
        f" {ceilings['flops'] / 1e12:.0f} TFLOP/s"
    )
    print(f"{'op':14s} {'shape':28s} {'configuration':58s} {'us':>8s} {'of ceiling':>10s} {'max diff':>9s}")
    done = []
    for case in (case for op in args.ops for case in OPS[op](effort)):
        if args.only not in f"{case.op} {case.spec} {case.config}":
            continue
        if time.perf_counter() - start > args.seconds:
            print(f"stopped after {args.seconds:.0f} s")
            break
        measure(case, ceilings)
        done.append(case)
        figures = case.figures
        end = figures.get("error") or (
            f"{figures['microseconds']:8.1f} {figures['fraction']:10.1%} {figures['difference']:9.1e}"
        )
        print(f"{case.op:14s} {case.spec:28s} {case.config:58s} {end}", flush=True)
    results = [
        {"op": case.op, "spec": case.spec, "config": case.config, "unit": case.unit, **case.figures} for case in done
    ]
    if args.output_json:
        benchmark_report.write(args.output_json, {"ceilings": ceilings, "cases": results})
    best: dict[str, float] = {}
    for case in done:
        best[case.spec] = max(best.get(case.spec, 0.0), round(case.figures.get("fraction", 0.0), 4))
    print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "best_fraction": best}))


if __name__ == "__main__":
    main()
