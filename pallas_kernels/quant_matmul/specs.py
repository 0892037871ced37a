"""Named real shapes of quant_matmul, for tests, benchmarks and tuning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """`batch` rows times a weight [out_features, in_features].

    `zeros`: whether the weight has some (AWQ, GPTQ); `activation`: as in quant_matmul.
    """

    name: str
    format: str
    group_size: int
    batch: int
    out_features: int = 14336
    in_features: int = 4096
    zeros: bool = False
    activation: str | None = None


_KINDS = {
    "int4 g128": ("int4", 128),
    "int8": ("int8", -1),
    "fp8": ("fp8", -1),
    "fp8 blocks": ("fp8", 128),
}

SPECS = (
    *(
        Spec(f"llama3-8b up {name} b{batch}", *kind, batch)
        for batch in (1, 16, 64, 8, 2, 4, 32, 128, 256, 2048)
        for name, kind in _KINDS.items()
    ),
    *(
        Spec(f"llama3-8b o {name} b{batch}", *kind, batch, 4096, 4096)
        for batch in (1, 16, 64, 256)
        for name, kind in _KINDS.items()
    ),
    *(
        Spec(f"llama3-8b up {name} x {kind[0]} b{batch}", *kind, batch, activation=kind[0])
        for batch in (1, 64, 256, 2048)
        for name, kind in _KINDS.items()
        if kind[0] != "int4"
    ),
    *(Spec(f"llama3-8b up int4 g128 zeros b{batch}", "int4", 128, batch, zeros=True) for batch in (1, 16)),
    Spec("llama3-8b up int4 g32 b1", "int4", 32, 1),
    Spec("qwen2-7b down int4 g128 b1", "int4", 128, 1, 3584, 18944),
    *(
        Spec(f"qwen1.5-7b {name} int4 g128 b1", "int4", 128, 1, *shape)
        for name, shape in {"qkv": (12288, 4096), "up": (22016, 4096), "down": (4096, 11008)}.items()
    ),
    Spec("qwen2-0.5b qkv int4 g128 b1", "int4", 128, 1, 1152, 896),
)
