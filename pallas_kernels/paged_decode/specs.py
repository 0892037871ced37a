"""Named real shapes of paged_decode, for tests, benchmarks and tuning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """Rows of `min_len` to `max_len` tokens of KV, drawn uniformly. The rest is paged_decode's."""

    name: str
    num_rows: int
    min_len: int
    max_len: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_dtype: str = "bfloat16"
    queries: int | None = None
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False


SPECS = (
    Spec("default-model decode b8 ctx64", 8, 64, 64, 8, 4, 32),
    Spec("default-model decode ragged", 16, 1, 200, 8, 4, 32),
    Spec("llama3-8b decode b1 ctx1k", 1, 1024, 1024),
    Spec("llama3-8b decode b1 ctx8k", 1, 8192, 8192),
    Spec("llama3-8b decode b16 ctx2k", 16, 2048, 2048),
    Spec("llama3-8b decode b64 ctx2k", 64, 2048, 2048),
    Spec("llama3-8b decode b256 ctx512", 256, 512, 512),
    Spec("llama3-8b decode ragged 64", 64, 128, 8192),
    Spec("llama2-7b decode b64 ctx2k", 64, 2048, 2048, 32, 32),
    Spec("glm4-9b decode b64 ctx2k", 64, 2048, 2048, 32, 2),
    Spec("llama3-8b decode b64 ctx2k int8", 64, 2048, 2048, page_size=32, kv_dtype="int8"),
    Spec("llama3-8b decode b64 ctx2k fp8", 64, 2048, 2048, page_size=32, kv_dtype="float8_e4m3fn"),
    Spec("llama3-8b decode b64 4 queries", 64, 2048, 2048, queries=4),
    Spec("gemma2-9b decode b64 ctx8k window", 64, 8192, 8192, 16, 8, 256, window=4096, soft_cap=50.0),
    Spec("mpt-7b decode b64 ctx2k alibi", 64, 2048, 2048, 32, 32, alibi=True),
    Spec("phi3-mini decode b64 ctx2k", 64, 2048, 2048, 32, 32, 96),
    Spec("phi2 decode b64 ctx2k", 64, 2048, 2048, 32, 32, 80),
)
