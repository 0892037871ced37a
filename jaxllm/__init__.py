"""jaxllm: LLM inference in pure JAX.

    import jaxllm
    for output in jaxllm.generate(["Once upon a time"]):
        print(output.outputs[0].text)

Importing it loads nothing heavy: each name below is imported from its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.config import EngineConfig
    from jaxllm.engine import LLMEngine
    from jaxllm.llm import LLM, generate
    from jaxllm.models.registry import register_model
    from jaxllm.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
    )
    from jaxllm.sampling_params import BeamSearchParams, SamplingParams
    from jaxllm.scheduling import Policy

__version__ = "0.1.0"

_MODULE_OF = {
    "LLM": "jaxllm.llm",
    "BeamSearchOutput": "jaxllm.outputs",
    "BeamSearchParams": "jaxllm.sampling_params",
    "BeamSearchSequence": "jaxllm.outputs",
    "CompletionOutput": "jaxllm.outputs",
    "EngineConfig": "jaxllm.config",
    "LLMEngine": "jaxllm.engine",
    "Logprob": "jaxllm.outputs",
    "Policy": "jaxllm.scheduling",
    "RequestMetrics": "jaxllm.outputs",
    "RequestOutput": "jaxllm.outputs",
    "SamplingParams": "jaxllm.sampling_params",
    "generate": "jaxllm.llm",
    "register_model": "jaxllm.models.registry",
}

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EngineConfig",
    "LLMEngine",
    "Logprob",
    "Policy",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "generate",
    "register_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
