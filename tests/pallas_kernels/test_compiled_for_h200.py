"""The Hopper kernels compiled to machine code, without a GPU: nothing spills, no array is copied on the way."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_decode import mosaic_gpu
from pallas_kernels.paged_decode import reference as decode_reference
from pallas_kernels.paged_mla import mosaic_gpu as mla
from pallas_kernels.quant_matmul import abstract
from pallas_kernels.quant_matmul import mosaic_gpu as quant_kernel
from pallas_kernels.quant_matmul import reference as quant_reference
from tests.pallas_kernels.aot import compile_for_h200, needs_cuda_plugin, registers_and_spills

ROWS, HEADS, PAGES = 8, 8, 4096

# Query heads, head dim, page size, dtype of KV, options. How many registers: 128 let two CTAs share a multiprocessor.
KERNELS = {
    "plain": (128, (32, 128, 16, jnp.bfloat16), {}),
    "window, soft cap and slopes": (128, (32, 128, 16, jnp.bfloat16), dict(window=1000, soft_cap=30.0, slopes=True)),
    "head dim 96": (128, (8, 96, 16, jnp.bfloat16), {}),
    "head dim 80": (128, (8, 80, 16, jnp.bfloat16), {}),
    "head dim 256": (255, (16, 256, 16, jnp.bfloat16), {}),
    "folded": (255, (16, 32, 16, jnp.bfloat16), {}),
    "four queries": (255, (32, 128, 16, jnp.bfloat16), dict(queries=4)),
    "int8": (255, (32, 128, 32, jnp.int8), {}),
    "float8": (128, (32, 128, 32, jnp.float8_e4m3fn), {}),
}


@needs_cuda_plugin
@pytest.mark.parametrize("case", KERNELS.values(), ids=KERNELS)
def test_paged_decode(case, monkeypatch, capfd):
    most_registers, (N, H, page_size, kv_dtype), options = case
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    queries = () if "queries" not in options else (options["queries"],)
    arrays = {"alibi_slopes": jax.ShapeDtypeStruct((N,), jnp.float32)} if options.get("slopes") else {}
    if jnp.dtype(kv_dtype).itemsize == 1:
        arrays |= {
            name: jax.ShapeDtypeStruct((PAGES, HEADS, page_size), jnp.float32) for name in ("k_scales", "v_scales")
        }
    static = {name: options.get(name) for name in ("window", "soft_cap")}

    def call(q, k_pages, v_pages, table, lens, arrays):
        return mosaic_gpu.paged_decode(q, k_pages, v_pages, table, lens, scale=0.1, **static, **arrays)

    pages = jax.ShapeDtypeStruct((PAGES, HEADS, page_size, H), kv_dtype)
    table, lens = jax.ShapeDtypeStruct((ROWS, 64), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    compiled = compile_for_h200(
        call, jax.ShapeDtypeStruct((ROWS, *queries, N, H), jnp.bfloat16), pages, pages, table, lens, arrays
    )
    [(registers, spilled)] = registers_and_spills("".join(capfd.readouterr()))
    assert spilled == 0 and registers <= most_registers
    pool = PAGES * HEADS * page_size * H * jnp.dtype(kv_dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < pool / 8


@needs_cuda_plugin
@pytest.mark.parametrize(("N", "page_size"), [(16, 16), (128, 64)], ids=["v2-lite", "v3, page 64"])
def test_mla_decode(N, page_size, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    num_pages = 2**20 // page_size
    pages = jax.ShapeDtypeStruct((num_pages, page_size, 576), jnp.bfloat16)
    table, lens = jax.ShapeDtypeStruct((ROWS, 64), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def call(*args):
        return mla.mla_decode(*args, value_dim=512, scale=0.1)

    compiled = compile_for_h200(call, jax.ShapeDtypeStruct((ROWS, N, 576), jnp.bfloat16), pages, table, lens)
    attend, merge = registers_and_spills("".join(capfd.readouterr()))
    # 128 for each of 512 threads are all that there are: the warpgroups divide them anew.
    assert attend == (128, 0) and merge[1] == 0
    assert compiled.memory_analysis().temp_size_in_bytes < num_pages * page_size * 576 * 2 / 8


# Rows, out, in; format, group size, zeros.
QUANTIZED = {
    "int4": ((1, 14336, 4096), ("int4", 128, False)),
    "int4, parts of two tiles": ((1, 4096, 11008), ("int4", 128, False)),
    "int4, 8 rows, zeros": ((8, 6144, 4096), ("int4", 128, True)),
    "int8": ((2, 14336, 4096), ("int8", -1, False)),
    "fp8 in blocks": ((8, 14336, 4096), ("fp8", 128, False)),
}


@needs_cuda_plugin
@pytest.mark.parametrize("case", QUANTIZED.values(), ids=QUANTIZED)
def test_quant_matmul_of_few_rows_is_one_kernel(case, monkeypatch, capfd):
    (batch, out, in_), (format, group_size, zeros) = case
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    weight = abstract(out, in_, format=format, group_size=group_size, zeros=zeros, scale_dtype=jnp.float16)
    compiled = compile_for_h200(
        lambda x, weight: quant_kernel.quant_matmul(x, weight, activation=None, out_dtype=jnp.dtype(jnp.bfloat16)),
        jax.ShapeDtypeStruct((batch, in_), jnp.bfloat16),
        weight,
    )
    [(registers, spilled)] = registers_and_spills("".join(capfd.readouterr()))
    assert spilled == 0 and registers <= 128
    text = compiled.as_text()
    assert text.count("custom-call(") == 1 and "fusion(" not in text and "copy(" not in text


@needs_cuda_plugin
def test_parts_of_a_product_are_added_as_they_lie():
    """No kernel comes between quant_matmul's and the addition, which is in what uses the product."""
    weight = abstract(4096, 4096, format="int4", group_size=128, scale_dtype=jnp.float16)

    def call(x, weight, y):
        return y + quant_kernel.quant_matmul(x, weight, activation=None, out_dtype=jnp.dtype(jnp.bfloat16))

    x, y = (jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16) for _ in range(2))
    text = compile_for_h200(call, x, weight, y).as_text()
    assert " transpose(" not in text and len(re.findall(r"= bf16\[64,4096\]\S* fusion\(", text)) == 1
    assert re.search(r"f32\[\d+,64,4096\]\S* custom-call\(", text)


@needs_cuda_plugin
def test_the_reference_rounds_activations_to_fp8():
    """XLA drops a conversion to fewer bits and back unless it is kept from it."""
    weight = abstract(256, 512, format="fp8", group_size=-1)
    compiled = compile_for_h200(
        lambda x, weight: quant_reference.quant_matmul(x, weight, activation="fp8", out_dtype=jnp.dtype(jnp.float32)),
        jax.ShapeDtypeStruct((3, 512), jnp.float32),
        weight,
    )
    assert "f8e4m3fn[3,512]" in compiled.as_text()


@needs_cuda_plugin
def test_decode_without_our_kernels_does_not_ask_the_host(monkeypatch):
    """A loop whose end the device alone knows would wait for the host in each round, in every layer of a step."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    pages = jax.ShapeDtypeStruct((PAGES, HEADS, 16, 128), jnp.bfloat16)
    table, lens = jax.ShapeDtypeStruct((ROWS, 256), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    q = jax.ShapeDtypeStruct((ROWS, 32, 128), jnp.bfloat16)
    compiled = compile_for_h200(
        functools.partial(decode_reference.paged_decode, scale=0.1), q, pages, pages, table, lens
    )
    assert " while(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < PAGES * HEADS * 16 * 128 * 2 * 3
