"""Kernels on the GPU at hand: right first, then how near they come to the hardware.

    python scripts/benchmark_kernels.py [--quick | --configs] [--ops OP ...] [--only TEXT ...] [--output-json FILE]

Each case is compared with the reference, twice; of attention on KV where everything that no row owns is NaN. Then a
chain of calls inside one jit, each on inputs of its own (KV, queries, a weight), is timed twice: by the profiler, what
its kernels take (`microseconds`, of which the fractions are), and by the clock (`chained`), which counts what lies
between kernels too and, where these are short, the host's work of launching them. The ceilings are measured in the same
run: the bandwidth of a maximum over 2 GiB, for kernels that read, and the rate of a large product. A case that fails is
reported and the next one runs. Without --quick, other configurations than the default follow, with --configs many of
them.
"""

import argparse
import dataclasses
import functools
import itertools
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
from benchmark_profile import kernel_durations

from pallas_kernels.paged_decode import mosaic_gpu as decode_kernel
from pallas_kernels.paged_decode import reference as decode_reference
from pallas_kernels.paged_decode.specs import SPECS as DECODE_SPECS
from pallas_kernels.paged_decode.specs import Spec as DecodeSpec
from pallas_kernels.paged_mla import mosaic_gpu as mla_kernel
from pallas_kernels.paged_mla import reference as mla_reference
from pallas_kernels.paged_mla.specs import SPECS as MLA_SPECS
from pallas_kernels.paged_mla.specs import Spec as MlaSpec
from pallas_kernels.quant_matmul import QuantizedWeight, few_rows
from pallas_kernels.quant_matmul import abstract as abstract_weight
from pallas_kernels.quant_matmul import mosaic_gpu as quant_kernel
from pallas_kernels.quant_matmul import reference as quant_reference
from pallas_kernels.quant_matmul.specs import SPECS as QUANT_SPECS
from pallas_kernels.quant_matmul.specs import Spec as QuantSpec
from pallas_kernels.ragged_prefill import mosaic_gpu as prefill_kernel
from pallas_kernels.ragged_prefill import reference as prefill_reference
from pallas_kernels.ragged_prefill.specs import SPECS as PREFILL_SPECS
from pallas_kernels.ragged_prefill.specs import Spec as PrefillSpec

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


def seconds_of_kernels(function: Callable, *args: Any, runs: int = 5) -> float:
    """What the kernels of a run take, the mean of some."""
    kernels = kernel_durations(lambda: jax.block_until_ready([function(*args) for _ in range(runs)]))
    return sum(seconds for _, seconds in kernels) / runs


def read_bandwidth() -> float:
    """Bytes a second of a maximum over 2 GiB."""
    x = jnp.zeros(2**29, jnp.float32)
    return x.nbytes / seconds_per_run(jax.jit(jnp.max), x)


def matrix_rate() -> float:
    """Operations a second of a bfloat16 product of two 8192 x 8192 matrices."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
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
    return difference_of_two_runs(
        lambda: kernel(*args, **batch.options), expected, [batch.q.shape, 2**22, 2**20, 2**12], batch.q.dtype
    )


def difference_of_two_runs(
    run: Callable, expected: np.ndarray, poisoned: list, dtype: jnp.dtype, bound: float = 0.02, axis: int = 0
) -> float:
    """The largest difference from what is expected, each run after arrays of NaN of the shapes `poisoned`.

    Raises: AssertionError that says where along `axis` it is not below `bound`, or that the runs differ.
    """
    outs = []
    for _ in range(2):
        # Freed at once, and likely what the output and the workspace are allocated from.
        jax.block_until_ready([jnp.full(shape, jnp.nan, dtype) for shape in poisoned])
        outs.append(np.asarray(run(), np.float32))
    if not np.array_equal(outs[0], outs[1]):
        raise AssertionError(f"two runs differ, by {np.abs(outs[0] - outs[1]).max()}")
    differences = np.abs(outs[0] - expected)
    if not differences.max() < bound:  # NaN if there is one
        bad = np.unique(np.argwhere(~(differences < bound))[:, axis])
        raise AssertionError(
            f"difference {differences.max()} from the reference; at {bad[:20].tolist()} of {expected.shape[axis]}"
        )
    return float(differences.max())


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


# --- paged_mla


def mla_lens(spec: MlaSpec) -> np.ndarray:
    return np.random.default_rng(0).integers(spec.min_len, spec.max_len + 1, spec.num_rows)


def mla_flops(spec: MlaSpec) -> float:
    """Of the scores and of the weights' products with the values."""
    return 2.0 * spec.num_heads * (2 * spec.value_dim + spec.rotary_dim) * float(mla_lens(spec).sum())


def mla_bytes(spec: MlaSpec) -> float:
    return 2.0 * (spec.value_dim + spec.rotary_dim) * float(mla_lens(spec).sum())


def mla_inputs(spec: MlaSpec, page_size: int, copies: int, poison: bool) -> tuple:
    """Queries, pages, a table for each of `copies` calls, and KV lengths. With poison: NaN in everything that no row
    owns, pages that do not exist in the tables, and every third row unused."""
    rng = np.random.default_rng(0)
    lens, H = mla_lens(spec), spec.value_dim + spec.rotary_dim
    pages = -(-lens // page_size)
    total = int(pages.sum())
    free = rng.permutation(copies * total)
    valid = np.zeros((copies * total + 1, page_size), bool)
    tables = np.full((copies, spec.num_rows, int(pages.max()) + 3), 2**30 if poison else 0, np.int32)
    ends = np.cumsum(pages)
    for copy, row in itertools.product(range(copies), range(spec.num_rows)):
        taken = free[copy * total + ends[row] - pages[row] : copy * total + ends[row]]
        tables[copy, row, : len(taken)] = taken
        valid[taken] = np.arange(len(taken) * page_size).reshape(-1, page_size) < lens[row]
    keys = jax.random.split(jax.random.key(0))
    pool = jax.random.normal(keys[0], (*valid.shape, H), jnp.bfloat16)
    if poison:
        pool = jnp.where(valid[:, :, None], pool, jnp.nan)
        lens[1::3] = 0
    q = jax.random.normal(keys[1], (spec.num_rows, spec.num_heads, H), jnp.bfloat16)
    return q, pool, [jnp.asarray(table) for table in tables], jnp.asarray(lens, jnp.int32)


def check_mla(spec: MlaSpec, page_size: int, kernel: Callable) -> float:
    q, pool, (table,), lens = mla_inputs(spec, page_size, 1, poison=True)
    options = dict(value_dim=spec.value_dim, scale=(spec.value_dim + spec.rotary_dim) ** -0.5)
    expected = np.asarray(mla_reference.mla_decode(q, pool, table, lens, **options), np.float32)
    poisoned = [q.size // 2, 2**23, 2**15]
    return difference_of_two_runs(lambda: kernel(q, pool, table, lens), expected, poisoned, jnp.float32)


def mla_chain(spec: MlaSpec, page_size: int, kernel: Callable) -> tuple[Callable, tuple]:
    copies = int(np.clip(-(-BEYOND_CACHE // mla_bytes(spec)), 2, CHAIN))
    q, pool, tables, lens = mla_inputs(spec, page_size, copies, poison=False)
    queries = [jax.random.normal(key, q.shape, q.dtype) for key in jax.random.split(jax.random.key(1), CHAIN)]

    @jax.jit
    def chain(queries, pool, tables, lens):
        return [kernel(q, pool, tables[i % len(tables)], lens) for i, q in enumerate(queries)]

    return chain, (queries, pool, tables, lens)


def mla_cases(effort: str) -> Iterator[Case]:
    """The default configuration; then larger pages; then, if asked for, other configurations.

    Many heads have as much to do for the tensor cores as for the memory: the ceiling is what takes longer.
    """
    sms = mla_kernel.mosaic.num_multiprocessors()
    variants: list[tuple[int, Any]] = [(16, None)]
    if effort != "quick":
        variants += [(64, None)]
    if effort == "configs":
        variants += [(16, mla_kernel.Config(2, ctas)) for ctas in (sms // 2, 2 * sms)]
    for page_size, config in variants:
        for spec in MLA_SPECS:
            kernel = functools.partial(
                mla_kernel.mla_decode, value_dim=spec.value_dim, scale=(spec.value_dim + spec.rotary_dim) ** -0.5,
                config=config,
            )  # fmt: skip
            compute_bound = spec.num_heads > 64
            yield Case(
                "paged_mla",
                spec.name,
                f"page {page_size}, {config or 'default'}",
                functools.partial(check_mla, spec, page_size, kernel),
                functools.partial(mla_chain, spec, page_size, kernel),
                mla_flops(spec) if compute_bound else mla_bytes(spec),
                "flops" if compute_bound else "bytes",
            )


# --- ragged_prefill

ODD_SHAPES = [
    PrefillSpec("group 4, head dim 128", 6, 1, 300),
    PrefillSpec("the same, cached, page 32", 6, 1, 300, 500, page_size=32),
    PrefillSpec("group 32, head dim 64", 5, 1, 200, 77, 32, 1, 64, 64),
    PrefillSpec("group 1, head dim 256", 4, 1, 200, 77, 4, 4, 256),
    PrefillSpec("group 2, head dim 96", 4, 1, 200, 77, 8, 4, 96),
    PrefillSpec("group 1, head dim 80", 4, 1, 200, 77, 4, 4, 80),
    PrefillSpec("single tokens", 40, 1, 3, 20),
]


def prefill_rows(spec: PrefillSpec) -> tuple[np.ndarray, np.ndarray]:
    """New tokens and KV lengths of each row."""
    new = np.random.default_rng(0).integers(spec.min_new, spec.max_new + 1, spec.num_rows)
    return new, new + spec.cached


def prefill_flops(spec: PrefillSpec) -> float:
    """Of the causal scores and of their products with the values: 4 N H for each query and key it sees."""
    new, kv_lens = prefill_rows(spec)
    return 4 * spec.num_heads * spec.head_dim * float(np.sum(new * (kv_lens - (new - 1) / 2)))


def prefill_inputs(spec: PrefillSpec, poison: bool) -> tuple:
    """The op's arrays. With poison: NaN in everything that no row owns, also the table, and tokens that no row owns."""
    new, kv_lens = prefill_rows(spec)
    if poison and spec.num_rows > 2:
        kv_lens[1], new[1] = spec.cached, 0
    pages = -(-kv_lens // spec.page_size)
    P = int(pages.sum()) + 1  # the last one belongs to nobody
    table = np.full((spec.num_rows, pages.max()), 2**30 if poison else 0, np.int32)
    valid = np.zeros((P, 1, spec.page_size, 1), bool)
    free = iter(np.random.default_rng(1).permutation(P - 1))
    for row, length in enumerate(kv_lens):
        for i in range(pages[row]):
            table[row, i] = page = next(free)
            valid[page, :, : length - i * spec.page_size] = True
    # A step has a multiple of 128 tokens.
    before, after = (5, 70) if poison else (0, -int(new.sum()) % 128)
    starts = before + np.concatenate([[0], np.cumsum(new)])
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (P, spec.num_kv_heads, spec.page_size, spec.head_dim)
    k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
    if poison:
        k, v = (jnp.where(valid, x, jnp.nan) for x in (k, v))
    q = jax.random.normal(keys[2], (int(starts[-1]) + after, spec.num_heads, spec.head_dim), jnp.bfloat16)
    return q, k, v, *(jnp.asarray(x, jnp.int32) for x in (table, kv_lens, starts))


def check_prefill(spec: PrefillSpec, kernel: Callable) -> float:
    args = prefill_inputs(spec, poison=True)
    expected = np.asarray(prefill_reference.ragged_prefill(*args, scale=spec.head_dim**-0.5), np.float32)
    poisoned = [args[0].shape] * 4
    return difference_of_two_runs(lambda: kernel(*args), expected, poisoned, args[0].dtype, bound=0.03)


def prefill_chain(spec: PrefillSpec, kernel: Callable) -> tuple[Callable, tuple]:
    """The queries alone differ from call to call, like those of a model's layers: tiles are cut once.

    They are random in every call: outputs fed back would soon be all alike, and the GPU clocks higher on such.
    """
    q, *others = prefill_inputs(spec, poison=False)
    queries = [jax.random.normal(key, q.shape, q.dtype) for key in jax.random.split(jax.random.key(1), CHAIN)]

    @jax.jit
    def chain(queries, *others):
        return [kernel(q, *others)[0] for q in queries]

    return chain, (queries, *others)


def prefill_cases(effort: str) -> Iterator[Case]:
    """The default configuration on every shape first, then others on the large ones."""
    C = prefill_kernel.Config
    variants: list[C | None] = [None]
    if effort != "quick":
        variants += [C(pack=1), C(pack=8), C(take_turns=False), C(block_kv=64, stages=4), C(heavy_first=False)]
    for config in variants:
        for spec in (*ODD_SHAPES, *PREFILL_SPECS) if config is None else PREFILL_SPECS[2:]:
            kernel = functools.partial(prefill_kernel.ragged_prefill, scale=spec.head_dim**-0.5, config=config)
            yield Case(
                "ragged_prefill",
                spec.name,
                str(config or "default"),
                functools.partial(check_prefill, spec, kernel),
                functools.partial(prefill_chain, spec, kernel),
                prefill_flops(spec),
                "flops",
            )


# --- quant_matmul


def quant_weights(key: jax.Array, spec: QuantSpec, count: int) -> list[QuantizedWeight]:
    return [quant_weight(key, spec) for key in jax.random.split(key, count)]


@functools.partial(jax.jit, static_argnames="spec")
def quant_weight(key: jax.Array, spec: QuantSpec) -> QuantizedWeight:
    """A weight of random codes, scales around 1, and zeros 0 to 15."""
    shapes = abstract_weight(
        spec.out_features, spec.in_features, format=spec.format, group_size=spec.group_size, zeros=spec.zeros,
        scale_dtype=jnp.float16 if spec.format == "int4" else jnp.float32,
    )  # fmt: skip

    keys = jax.random.split(key, 3)
    codes = jax.lax.bitcast_convert_type(jax.random.bits(keys[0], shapes.codes.shape, jnp.uint32), jnp.int32)
    if spec.format == "fp8":  # without NaN
        codes &= jnp.int32(-0x40404041)
    scales = jax.random.uniform(keys[1], shapes.scales.shape, jnp.float32, 0.5, 1.5).astype(shapes.scales.dtype)
    zeros = None
    if shapes.zeros is not None:
        zeros = jax.random.randint(keys[2], shapes.zeros.shape, 0, 16).astype(shapes.zeros.dtype)
    return dataclasses.replace(shapes, codes=codes, scales=scales, zeros=zeros)


def quant_activations(spec: QuantSpec) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (spec.batch, spec.in_features), jnp.bfloat16)


def check_quant(spec: QuantSpec, kernel: Callable) -> float:
    """Largest difference, where the products' standard deviation is 1."""
    x, (weight,) = quant_activations(spec), quant_weights(jax.random.key(0), spec, 1)
    expected = quant_reference.quant_matmul(
        x.astype(jnp.float32), weight, activation=spec.activation, out_dtype=jnp.dtype(jnp.float32)
    )
    expected = np.asarray(expected)
    poisoned = [2**24, 2**22, expected.size // 2]
    deviation = expected.std()
    return difference_of_two_runs(
        lambda: np.asarray(kernel(x, weight), np.float32) / deviation, expected / deviation, poisoned, jnp.float32,
        bound=0.05, axis=1,
    )  # fmt: skip


def quant_chain(spec: QuantSpec, kernel: Callable) -> tuple[Callable, tuple]:
    weights = quant_weights(jax.random.key(0), spec, CHAIN)
    return jax.jit(lambda x, weights: [kernel(x, weight) for weight in weights]), (quant_activations(spec), weights)


def dense_chain(spec: QuantSpec) -> tuple[Callable, tuple]:
    """The same with bfloat16 weights, by XLA."""
    make = jax.jit(lambda key: jax.random.normal(key, (spec.out_features, spec.in_features), jnp.bfloat16))
    weights = [make(key) for key in jax.random.split(jax.random.key(0), CHAIN)]
    return jax.jit(lambda x, weights: [x @ weight.T for weight in weights]), (quant_activations(spec), weights)


def other_quant_configs(spec: QuantSpec, weight: QuantizedWeight) -> list[Any]:
    """All that fit but the default."""
    default = quant_kernel.default_config(weight, spec.batch)
    configs = []
    for warpgroups in (2, 3, 4):
        config = quant_kernel.with_stages(weight, dataclasses.replace(default, warpgroups=warpgroups))
        if config != default and quant_kernel.fits(weight, config):
            configs.append(config)
    few = few_rows.default_config(weight, spec.batch)
    if few is None or spec.activation is not None:
        return configs
    R, sms = weight.codes.shape[0], quant_kernel.mosaic.num_multiprocessors()
    half, most = -(-few.stages // 2), few.stages
    cuts = ((4, 1, most), (4, 1, half), (4, 1, most + half), (6, 1, half), (8, 1, half), (2, 2, most), (4, 2, half))
    others = [
        few_rows.Config(rows, warpgroups, 1, min(R * 64 // rows, ctas * sms), stages)
        for rows in (64, 32, 16)
        for warpgroups, ctas, stages in cuts
    ]
    return [one for one in dict.fromkeys(others) if one != few and few_rows.fits(weight, spec.batch, one)] + [default]


def quant_cases(effort: str) -> Iterator[Case]:
    """The default configuration on every shape first, beside XLA's bfloat16 product, then others."""

    def case(spec, config):
        (weight,) = jax.eval_shape(lambda: quant_weights(jax.random.key(0), spec, 1))
        flops = 2 * spec.batch * spec.out_features * spec.in_features
        prefill = spec.batch > 256
        if config == "XLA":
            name, nbytes = spec.name.replace(spec.format, "bfloat16"), 2 * spec.out_features * spec.in_features
            check, chain = (lambda: 0.0), functools.partial(dense_chain, spec)
        else:
            dtype = jnp.dtype(jnp.bfloat16)
            kernel = functools.partial(
                quant_kernel.quant_matmul, activation=spec.activation, out_dtype=dtype, config=config
            )
            name, nbytes = spec.name, weight.nbytes
            check, chain = functools.partial(check_quant, spec, kernel), functools.partial(quant_chain, spec, kernel)
        work, unit = (flops, "flops") if prefill else (nbytes, "bytes")
        return Case("quant_matmul", name, str(config or "default"), check, chain, work, unit)

    for spec in QUANT_SPECS:
        if spec.format == "int8" and not spec.activation:
            yield case(spec, "XLA")
        yield case(spec, None)
    for spec in QUANT_SPECS if effort == "configs" else []:
        (weight,) = jax.eval_shape(lambda spec=spec: quant_weights(jax.random.key(0), spec, 1))
        for config in other_quant_configs(spec, weight) if spec.batch <= 256 else []:
            yield case(spec, config)


OPS: dict[str, Callable[[str], Iterator[Case]]] = {
    "paged_decode": decode_cases,
    "paged_mla": mla_cases,
    "ragged_prefill": prefill_cases,
    "quant_matmul": quant_cases,
}

# ---


def measure(case: Case, ceilings: dict[str, float]) -> None:
    """Fills in the figures, or the error."""
    try:
        case.figures["difference"] = case.check()
        function, args = case.chain()
        chained = seconds_per_run(function, *args) / CHAIN
        seconds = seconds_of_kernels(function, *args) / CHAIN
        rate = case.work / seconds
        case.figures |= {
            "microseconds": seconds * 1e6,
            "chained": chained * 1e6,
            "rate": rate,
            "fraction": rate / ceilings[case.unit],
        }
    except Exception as error:
        case.figures["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        traceback.print_exc(limit=-2)


def result(case: Case) -> dict[str, Any]:
    return {"op": case.op, "spec": case.spec, "config": case.config, "unit": case.unit, **case.figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="the default configurations alone")
    effort.add_argument("--configs", action="store_true", help="many configurations of each shape, to choose from")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose op, shape or configuration has one of these"
    )
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
    print(f"{'op':14s} {'shape':28s} {'configuration':58s} {'us':>8s} {'chained':>8s} {'of ceiling':>10s} {'off':>9s}")
    done = []
    for case in (case for op in args.ops for case in OPS[op](effort)):
        if not any(text in f"{case.op} {case.spec} {case.config}" for text in args.only):
            continue
        if time.perf_counter() - start > args.seconds:
            print(f"stopped after {args.seconds:.0f} s")
            break
        measure(case, ceilings)
        done.append(case)
        figures = case.figures
        end = figures.get("error") or (
            f"{figures['microseconds']:8.1f} {figures['chained']:8.1f} {figures['fraction']:10.1%}"
            f" {figures['difference']:9.1e}"
        )
        print(f"{case.op:14s} {case.spec:28s} {case.config:58s} {end}", flush=True)
        if args.output_json:
            benchmark_report.write(args.output_json, {"ceilings": ceilings, "cases": [result(one) for one in done]})
    best: dict[str, float] = {}
    for case in done:
        best[case.spec] = max(best.get(case.spec, 0.0), round(case.figures.get("fraction", 0.0), 4))
    print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "best_fraction": best}))


if __name__ == "__main__":
    main()
