"""What KV pages are made of; and how many there are, by the device's memory on a GPU, by a plain budget on a CPU."""

import logging

import jax
import jax.numpy as jnp

from jaxllm.models.interface import KVPages, LayerKV, Network

# EngineConfig.kv_cache_dtype, where its name is not the dtype's
_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
CPU_KV_BYTES = 512 * 2**20  # the default budget where memory is not the scarce thing

logger = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """The KV cache that the configuration asks for does not fit; says by how much."""


def kv_dtype(network: Network, name: str) -> jnp.dtype:
    """The dtype of KV pages that `name`, EngineConfig.kv_cache_dtype, stands for; "auto" is the network's own.

    Raises ValueError where the network cannot have it.
    """
    dtype = network.dtype if name == "auto" else jnp.dtype(_DTYPES.get(name, name))
    if dtype.itemsize == 1 and any(v is None for _, v in network.kv_shapes(1, 1)):
        raise ValueError(
            f"kv_cache_dtype must be auto, float32, bfloat16 or float16 for {network.config.architecture}, whose pages "
            f"hold the latents of its attention, got {name!r}"
        )
    return dtype


def abstract_pages(network: Network, num_pages: int, page_size: int, dtype: jnp.dtype) -> KVPages:
    """All layers' pages as `jax.ShapeDtypeStruct`s; those of 8 bits with their scales."""

    def layer(*shapes: tuple[int, ...] | None) -> LayerKV:
        pages = [shape and jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        if jnp.dtype(dtype).itemsize > 1:
            return LayerKV(*pages)
        return LayerKV(*pages, *(jax.ShapeDtypeStruct(shape[:-1], jnp.float32) for shape in shapes))

    return tuple(layer(*shapes) for shapes in network.kv_shapes(num_pages, page_size))


def page_bytes(network: Network, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page, over all layers, K and V, scales included."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_pages(network, 1, page_size, dtype)))


def pages_in(budget: int, bytes_a_page: int) -> int:
    """Pages that fit into `budget` bytes, rounded down to seven significant bits.

    Free memory differs by a few megabytes from start to start. The pool's size is part of every compiled program's
    shape; rounded, it is the same each time, and the programs are found in the cache.
    """
    pages = max(budget // bytes_a_page, 0)
    step = 1 << max(pages.bit_length() - 7, 0)
    return pages // step * step


def device_memory(device: jax.Device) -> tuple[int, int, int] | None:
    """(limit, bytes in use, peak bytes in use) of the device's allocator; None where it keeps no account (CPU)."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"], stats["bytes_in_use"], stats["peak_bytes_in_use"]


def check_holds_one_sequence(num_pages: int, page_size: int, max_model_len: int, bytes_a_page: int) -> None:
    """Raises OutOfMemory, with the numbers and the remedies, if one sequence of max_model_len does not fit."""
    needed = -(-max_model_len // page_size)
    if num_pages < needed:
        raise OutOfMemory(
            f"one sequence of max_model_len={max_model_len} tokens needs {needed} KV pages of {bytes_a_page:,} bytes, "
            f"and there is memory for {num_pages}: lower max_model_len to at most {num_pages * page_size}, or raise "
            f"gpu_memory_utilization or kv_cache_memory_bytes"
        )
