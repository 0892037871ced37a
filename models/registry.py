"""Architecture name -> model class, imported only when it is asked for.

Our models and other people's are in one table. Another package adds its own with `register_model`, or without any call
through the entry-point group "jaxllm.models", whose names are architectures and whose values are "module:Class".
"""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import jax.numpy as jnp

from jaxllm.models.config import DTYPES, ModelConfig, architecture_of
from jaxllm.models.interface import Network
from jaxllm.models.quantization import choose, read_quantization
from jaxllm.models.quantization.apply import quantize_linears

ENTRY_POINT_GROUP = "jaxllm.models"

_MODELS: dict[str, str | type] = {
    "BaiChuanForCausalLM": "jaxllm.models.baichuan:BaichuanForCausalLM",  # the first 7B alone has the second capital
    "BaichuanForCausalLM": "jaxllm.models.baichuan:BaichuanForCausalLM",
    "ChatGLMForConditionalGeneration": "jaxllm.models.chatglm:ChatGLMModel",
    "ChatGLMModel": "jaxllm.models.chatglm:ChatGLMModel",
    "DeepseekV2ForCausalLM": "jaxllm.models.deepseek:DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification": "jaxllm.models.classification:DeepseekV2ForSequenceClassification",
    "DeepseekV3ForCausalLM": "jaxllm.models.deepseek:DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification": "jaxllm.models.classification:DeepseekV3ForSequenceClassification",
    "GPT2ForSequenceClassification": "jaxllm.models.classification:GPT2ForSequenceClassification",
    "GPT2LMHeadModel": "jaxllm.models.gpt2:GPT2LMHeadModel",
    "Gemma2ForCausalLM": "jaxllm.models.gemma:Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification": "jaxllm.models.classification:Gemma2ForSequenceClassification",
    "Gemma3ForCausalLM": "jaxllm.models.gemma:Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration": "jaxllm.models.gemma:Gemma3ForConditionalGeneration",
    "Gemma3TextForSequenceClassification": "jaxllm.models.classification:Gemma3TextForSequenceClassification",
    "GlmForCausalLM": "jaxllm.models.chatglm:GlmForCausalLM",
    "GlmForSequenceClassification": "jaxllm.models.classification:GlmForSequenceClassification",
    "LlamaForCausalLM": "jaxllm.models.llama:LlamaForCausalLM",
    "LlamaForSequenceClassification": "jaxllm.models.classification:LlamaForSequenceClassification",
    "MistralForCausalLM": "jaxllm.models.llama:MistralForCausalLM",
    "MistralForSequenceClassification": "jaxllm.models.classification:MistralForSequenceClassification",
    "MixtralForCausalLM": "jaxllm.models.mixtral:MixtralForCausalLM",
    "MixtralForSequenceClassification": "jaxllm.models.classification:MixtralForSequenceClassification",
    "OPTForCausalLM": "jaxllm.models.opt:OPTForCausalLM",
    "OPTForSequenceClassification": "jaxllm.models.classification:OPTForSequenceClassification",
    "Phi3ForCausalLM": "jaxllm.models.llama:Phi3ForCausalLM",
    "Phi3ForSequenceClassification": "jaxllm.models.classification:Phi3ForSequenceClassification",
    "QWenLMHeadModel": "jaxllm.models.qwen:QWenLMHeadModel",
    "Qwen2ForCausalLM": "jaxllm.models.llama:Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification": "jaxllm.models.classification:Qwen2ForSequenceClassification",
    "Qwen2MoeForCausalLM": "jaxllm.models.mixtral:Qwen2MoeForCausalLM",
    "Qwen2MoeForSequenceClassification": "jaxllm.models.classification:Qwen2MoeForSequenceClassification",
    "Qwen3ForCausalLM": "jaxllm.models.llama:Qwen3ForCausalLM",
    "Qwen3ForSequenceClassification": "jaxllm.models.classification:Qwen3ForSequenceClassification",
    "Qwen3MoeForCausalLM": "jaxllm.models.mixtral:Qwen3MoeForCausalLM",
    "Qwen3MoeForSequenceClassification": "jaxllm.models.classification:Qwen3MoeForSequenceClassification",
    "RunningSumForTesting": "jaxllm.models.testing:RunningSumForTesting",
    "TinyllmForCausalLM": "jaxllm.models.tinyllm:TinyllmForCausalLM",
}


def register_model(architecture: str, target: str | type, *, replace: bool = False) -> None:
    """Make an architecture known: `target` is a class or "module:Class", which is imported when it is first built.

    Raises: ValueError if `target` is neither, or if the name is taken by another target and `replace` is false.
    """
    if isinstance(target, str) and (target.count(":") != 1 or not all(target.split(":"))):
        raise ValueError(f"target={target!r} of architecture {architecture!r} must be a class or 'module:Class'")
    known = _targets().get(architecture)
    if known is not None and known != target and not replace:
        raise ValueError(
            f"architecture={architecture!r} is registered already, as {known!r}; replace=True would replace it"
        )
    _MODELS[architecture] = target


def supported_architectures() -> list[str]:
    """The names that `build` accepts, sorted."""
    return sorted(_targets())


def model_names() -> dict[str, str]:
    """Each architecture -> the models that people know by it, as its class says in `known_as`; "" where it doesn't."""
    return {name: getattr(model_class(name), "known_as", "") for name in supported_architectures()}


def model_class(architecture: str) -> type:
    """The class behind a name.

    Raises: ValueError for an unknown name, listing the supported ones and the nearest; ImportError, naming the
    registered target, if it cannot be imported.
    """
    targets = _targets()
    if architecture not in targets:
        nearest = difflib.get_close_matches(architecture, targets, n=1, cutoff=0.0)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        raise ValueError(
            f"architecture={architecture!r} is not supported{hint}. Supported: {', '.join(sorted(targets))}. "
            f"Others can be added with jaxllm.models.register_model"
        )
    target = targets[architecture]
    if isinstance(target, type):
        return target
    module_name, class_name = target.split(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"architecture {architecture!r} is registered as {target!r}: {error}") from error


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The dict of a config.json, checked by the class that its architecture names for it (`Model.config_class`), with
    what it says of quantization.

    Raises: ValueError naming the key, its value and what is allowed.
    """
    quantization = read_quantization(config)
    config_class = getattr(model_class(architecture_of(config)), "config_class", ModelConfig)
    return dataclasses.replace(config_class.from_hf(config), quantization=quantization)


def quantized(config: ModelConfig, method: str | None) -> ModelConfig:
    """The config of the network that a user wants: one of quantization.METHODS, or None for the checkpoint's own.

    Raises: ValueError if the checkpoint is quantized in another way, or not at all where it has to be.
    """
    return dataclasses.replace(config, quantization=choose(config.quantization, method))


def build(config: ModelConfig, dtype=None) -> Network:
    """The network of a config, its weights in `dtype` (float32, bfloat16 or float16; None: the checkpoint's own).

    No array is made: see `Network.init` and `weights.load_params`.
    Raises: ValueError for an unsupported architecture or dtype, or a layer whose shape cannot be quantized.
    """
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype={dtype.name!r} is not supported; allowed: {', '.join(DTYPES)}")
    module = model_class(config.architecture)(config, dtype)
    packed = None if config.quantization is None else quantize_linears(module, config.quantization)
    return Network(module, config, dtype, packed)


class ModelRegistry:
    """vLLM's names for `register_model` and `supported_architectures`."""

    register_model = staticmethod(register_model)
    get_supported_archs = staticmethod(supported_architectures)


def _targets() -> dict[str, str | type]:
    others = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return others | _MODELS
