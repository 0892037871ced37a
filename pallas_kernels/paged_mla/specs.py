"""Named real shapes of mla_decode, for tests, benchmarks and tuning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """Rows of `min_len` to `max_len` tokens of KV, drawn uniformly."""

    name: str
    num_rows: int
    min_len: int
    max_len: int
    num_heads: int = 128
    value_dim: int = 512
    rotary_dim: int = 64
    page_size: int = 16


SPECS = (
    Spec("deepseek-v2-lite decode b1 ctx8k", 1, 8192, 8192, num_heads=16),
    Spec("deepseek-v2-lite decode b64 ctx2k", 64, 2048, 2048, num_heads=16),
    Spec("deepseek-v3 decode b1 ctx8k", 1, 8192, 8192),
    Spec("deepseek-v3 decode b64 ctx2k", 64, 2048, 2048),
    Spec("deepseek-v3 decode ragged 64", 64, 128, 8192),
)
