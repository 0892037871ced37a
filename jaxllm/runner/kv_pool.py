"""How many KV pages there are: from the device's memory on a GPU, from a plain budget on a CPU."""

import logging
import math

import jax
import jax.numpy as jnp

from jaxllm.models.interface import Network

CPU_KV_BYTES = 512 * 2**20  # the default budget where memory is not the scarce thing

logger = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """The KV cache that the configuration asks for does not fit; says by how much."""


def page_bytes(network: Network, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page, over all layers, K and V."""
    shapes = network.kv_shapes(1, page_size)
    return sum(math.prod(shape) for pair in shapes for shape in pair if shape is not None) * jnp.dtype(dtype).itemsize


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
