"""Named real shapes of ragged_prefill, for tests, benchmarks and tuning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """Rows of `min_new` to `max_new` new tokens, drawn uniformly, after `cached` cached ones."""

    name: str
    num_rows: int
    min_new: int
    max_new: int
    cached: int = 0
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16


SPECS = (
    Spec("default-model prefill 64", 1, 64, 64, 0, 8, 4, 32),
    Spec("default-model prefill ragged", 5, 1, 60, 24, 8, 4, 32),
    Spec("llama3-8b prefill 4k", 1, 4096, 4096),
    Spec("llama3-8b prefill 8k", 1, 8192, 8192),
    Spec("llama3-8b prefill 2k after 6k", 1, 2048, 2048, 6144),
    Spec("llama3-8b prefill ragged 32", 32, 64, 2048),
)
