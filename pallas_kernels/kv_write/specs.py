"""Named real shapes of kv_write, for tests, benchmarks and tuning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    name: str
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    num_pages: int = 4096


SPECS = (
    Spec("default-model decode b8", 8, 4, 32, num_pages=64),
    Spec("llama3-8b decode b64", 64, 8, 128),
    Spec("llama3-8b decode b256", 256, 8, 128),
    Spec("llama3-8b prefill 8k", 8192, 8, 128),
)
