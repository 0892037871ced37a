"""Sizes of ragged_prefill's Hopper kernel: what can be tuned, and what fits into shared memory."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import mosaic

ROWS = 64  # of a warpgroup, in each a token of a query head: what wgmma takes
TILE = 2 * ROWS
# Finite: a row that sees no key of a step must not become NaN. A power of two: exact when scaled, fused or not.
MASKED = -(2.0**100)
ALIGN = 8  # rows of a swizzled tile of shared memory


@dataclass(frozen=True)
class Config:
    """What can be tuned.

    Attributes:
      block_kv: keys of a step.
      stages: steps whose keys and values are in shared memory at once.
      take_turns: whether the warpgroups that compute hand the tensor cores to each other.
      heavy_first: whether rows run in the order of their numbers of keys, most first, and so do the tiles of a row.
      blocks: among how many the jobs are divided; None for as many as multiprocessors.
      pack: at most so many query heads of a KV head are in a tile, 1, 2, 4 or 8; the more, the fewer its tokens.
    """

    block_kv: int = 128
    stages: int = 2
    take_turns: bool = True
    heavy_first: bool = True
    blocks: int | None = None
    pack: int = 4


class Sizes(NamedTuple):
    """Static sizes of a call; `interpret`: for a CPU."""

    T: int
    N: int
    K: int
    H: int
    P: int
    W: int
    page_size: int
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    scale: float
    window: int | None
    soft_cap: float | None
    config: Config
    pack: int
    blocks: int
    interpret: bool

    @property
    def q_slots(self):
        """For how many jobs' queries there is room."""
        return room(self.H, self.kv_dtype, self.config)[0]

    @property
    def raw_slots(self):
        """For how many steps' 8-bit keys or values there is room; 0 for others, which need none."""
        return room(self.H, self.kv_dtype, self.config)[2]


def choose_config(H: int, kv_dtype: jnp.dtype, alibi: bool = False) -> Config:
    """The configuration for heads of size H and pages of kv_dtype."""
    # Narrow steps leave registers to slopes, and to the warpgroup that converts 8-bit pages.
    narrow = H > 128 or alibi or jnp.dtype(kv_dtype).itemsize == 1
    return Config(block_kv=64 if narrow else 128)


def heads_in_tile(group, config):
    """Query heads in a tile, of `group` that share a KV head."""
    return math.gcd(group, config.pack)


def line_bytes(H):
    """Bytes of a line of the queries, keys and values in shared memory: the widest that divides a row of H."""
    return math.gcd(2 * H, 128)


def out_columns(H):
    """Columns of the output array, and of a piece of it in shared memory.

    TMA stores a single row only from a multiple of 128 bytes: a piece has lines that long, or is made of whole rows
    that are padded to it.
    """
    padded = H + -H % 64
    return padded, 64 if padded == H else padded


def room(H, kv_dtype, config):
    """Slots of queries, of output and of 8-bit pages in shared memory; None if there is not enough of it."""
    queries = 2 * TILE * H
    columns, piece = out_columns(H)
    pieces = columns // piece
    raw = config.block_kv * (H + 4) if jnp.dtype(kv_dtype).itemsize == 1 else 0
    # Without barriers and the like, keys and values.
    left = mosaic.SHARED_MEMORY - 3 * 1024 - 4 * config.stages * config.block_kv * H
    raw_wanted = 2 if raw else 0
    for slots in ((2, pieces, raw_wanted), (1, pieces, raw_wanted), (1, 1, raw_wanted)):
        q_slots, out_slots, raw_slots = slots
        if q_slots * queries + out_slots * TILE * piece * 2 + raw_slots * raw <= left:
            return slots
    return None
