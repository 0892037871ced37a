"""jaxllm: LLM inference in pure JAX.

    import jaxllm
    for output in jaxllm.generate(["Once upon a time"]):
        print(output.outputs[0].text)

Importing it loads nothing heavy: each name below is imported from its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.async_llm import AsyncLLM, AsyncLLMEngine, EngineDead
    from jaxllm.config import AsyncEngineArgs, EngineArgs, EngineConfig
    from jaxllm.engine import LLMEngine
    from jaxllm.llm import LLM, generate
    from jaxllm.models.registry import ModelRegistry, register_model
    from jaxllm.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        ClassificationOutput,
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingOutput,
        PoolingRequestOutput,
        RequestMetrics,
        RequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from jaxllm.pooling import PoolingParams
    from jaxllm.prompts import PromptType, TextPrompt, TokensPrompt
    from jaxllm.sampling_params import (
        BeamSearchParams,
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )
    from jaxllm.scheduling import Policy

__version__ = "0.1.0"

_MODULE_OF = {
    "AsyncEngineArgs": "jaxllm.config",
    "AsyncLLM": "jaxllm.async_llm",
    "AsyncLLMEngine": "jaxllm.async_llm",
    "ClassificationOutput": "jaxllm.outputs",
    "ClassificationRequestOutput": "jaxllm.outputs",
    "LLM": "jaxllm.llm",
    "BeamSearchOutput": "jaxllm.outputs",
    "BeamSearchParams": "jaxllm.sampling_params",
    "BeamSearchSequence": "jaxllm.outputs",
    "CompletionOutput": "jaxllm.outputs",
    "EmbeddingOutput": "jaxllm.outputs",
    "EmbeddingRequestOutput": "jaxllm.outputs",
    "EngineArgs": "jaxllm.config",
    "EngineConfig": "jaxllm.config",
    "EngineDead": "jaxllm.async_llm",
    "LLMEngine": "jaxllm.engine",
    "Logprob": "jaxllm.outputs",
    "ModelRegistry": "jaxllm.models.registry",
    "Policy": "jaxllm.scheduling",
    "PoolingOutput": "jaxllm.outputs",
    "PoolingParams": "jaxllm.pooling",
    "PoolingRequestOutput": "jaxllm.outputs",
    "PromptType": "jaxllm.prompts",
    "RepetitionDetectionParams": "jaxllm.sampling_params",
    "RequestMetrics": "jaxllm.outputs",
    "RequestOutput": "jaxllm.outputs",
    "RequestOutputKind": "jaxllm.sampling_params",
    "SamplingParams": "jaxllm.sampling_params",
    "ScoringOutput": "jaxllm.outputs",
    "ScoringRequestOutput": "jaxllm.outputs",
    "StructuredOutputsParams": "jaxllm.sampling_params",
    "TextPrompt": "jaxllm.prompts",
    "TokensPrompt": "jaxllm.prompts",
    "generate": "jaxllm.llm",
    "register_model": "jaxllm.models.registry",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineConfig",
    "EngineDead",
    "LLMEngine",
    "Logprob",
    "ModelRegistry",
    "Policy",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptType",
    "RepetitionDetectionParams",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
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
