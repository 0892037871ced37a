"""Named real shapes of grouped_matmul, for tests, benchmarks and tuning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """`num_rows` rows, spread over `num_experts` weights [out_features, in_features].

    `format`: of packed weights, as in quant_matmul; None: they are floats.
    """

    name: str
    num_rows: int
    num_experts: int
    out_features: int
    in_features: int
    format: str | None = None
    group_size: int = -1
    zeros: bool = False


_MIXTRAL = (8, 28672, 4096)
_QWEN3_30B = (128, 1536, 2048)
_DEEPSEEK_V3 = (256, 4096, 7168)
_FP8_BLOCKS = ("fp8", 128)

SPECS = (
    Spec("mixtral-8x7b gate_up b64", 64 * 2, *_MIXTRAL),
    Spec("mixtral-8x7b gate_up int4 g128 zeros b64", 64 * 2, *_MIXTRAL, "int4", 128, zeros=True),
    Spec("mixtral-8x7b gate_up int8 b64", 64 * 2, *_MIXTRAL, "int8"),
    Spec("qwen3-30b-a3b gate_up b64", 64 * 8, *_QWEN3_30B),
    Spec("qwen3-30b-a3b gate_up int4 g128 b1", 8, *_QWEN3_30B, "int4", 128),
    Spec("qwen3-30b-a3b gate_up int4 g128 b64", 64 * 8, *_QWEN3_30B, "int4", 128),
    Spec("qwen3-30b-a3b gate_up fp8 blocks b2048", 2048 * 8, *_QWEN3_30B, *_FP8_BLOCKS),
    Spec("deepseek-v3 gate_up fp8 blocks b64", 64 * 8, *_DEEPSEEK_V3, *_FP8_BLOCKS),
)
