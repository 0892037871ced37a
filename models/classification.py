"""Sequence classifiers: a family's decoder with a linear head on the hidden state of a sequence's last token.

Rerankers are such models with a single label.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxllm.models.chatglm import GlmForCausalLM
from jaxllm.models.config import ModelConfig
from jaxllm.models.deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from jaxllm.models.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from jaxllm.models.gpt2 import GPT2LMHeadModel
from jaxllm.models.layers.linear import Linear
from jaxllm.models.layers.param import normal
from jaxllm.models.llama import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from jaxllm.models.mixtral import MixtralForCausalLM, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM
from jaxllm.models.opt import OPTForCausalLM


def num_labels(config: Mapping[str, Any]) -> int:
    """How many labels a config.json names; 2 where it names none, as in transformers. Raises ValueError for none."""
    labels = config.get("id2label")
    count = config.get("num_labels") or (2 if labels is None else len(labels))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_labels={count!r} must be an integer >= 1")
    return count


def classifier(decoder: type) -> type:
    """The `Model` of a causal family's sequence classifier: no token head, but one of scores without a bias."""
    decoder_config = getattr(decoder, "config_class", ModelConfig)

    class ClassifierConfig(decoder_config):
        @classmethod
        def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
            # With tied embeddings a family makes no head of its own.
            return replace(super().from_hf(config), tie_word_embeddings=True, num_labels=num_labels(config))

    class Classifier(decoder):
        known_as: ClassVar = "sequence classifiers and rerankers on these"
        config_class: ClassVar = ClassifierConfig
        weight_names: ClassVar = (*(row for row in decoder.weight_names if row[1] != "lm_head"), ("score", "score"))
        ignored_weights: tuple[str, ...] = (
            *decoder.ignored_weights,
            *(f"{theirs}.weight" for theirs, ours, *_ in decoder.weight_names if ours == "lm_head"),
        )

        def __init__(self, config: ModelConfig, dtype):
            super().__init__(config, dtype)
            initializer = normal(config.initializer_range)
            # "vocab": like a token head it stays in floats when the other layers are quantized.
            width = getattr(config, "embedding_size", 0) or config.hidden_size
            self.score = Linear(width, config.num_labels, axes=("vocab", "embed"), dtype=dtype, initializer=initializer)

        def logits(self, hidden: jax.Array) -> jax.Array:
            """float32 [S, V]: zeros, for a step computes some, and a classifier has no use for them."""
            return jnp.zeros((*hidden.shape[:-1], self.config.vocab_size), jnp.float32)

        def classify(self, hidden: jax.Array) -> jax.Array:
            """hidden [S, D] of each sequence's last token -> float32 [S, num_labels], before softmax or sigmoid."""
            project = getattr(self, "project_out", None)  # of OPT's narrow embeddings
            return self.score(hidden if project is None else project(hidden), out_dtype=jnp.float32)

    return Classifier


DeepseekV2ForSequenceClassification = classifier(DeepseekV2ForCausalLM)
DeepseekV3ForSequenceClassification = classifier(DeepseekV3ForCausalLM)
GlmForSequenceClassification = classifier(GlmForCausalLM)
LlamaForSequenceClassification = classifier(LlamaForCausalLM)
MistralForSequenceClassification = classifier(MistralForCausalLM)
MixtralForSequenceClassification = classifier(MixtralForCausalLM)
OPTForSequenceClassification = classifier(OPTForCausalLM)
Phi3ForSequenceClassification = classifier(Phi3ForCausalLM)
Qwen2ForSequenceClassification = classifier(Qwen2ForCausalLM)
Qwen2MoeForSequenceClassification = classifier(Qwen2MoeForCausalLM)
Qwen3ForSequenceClassification = classifier(Qwen3ForCausalLM)
Qwen3MoeForSequenceClassification = classifier(Qwen3MoeForCausalLM)
Gemma2ForSequenceClassification = classifier(Gemma2ForCausalLM)
Gemma3TextForSequenceClassification = classifier(Gemma3ForCausalLM)
GPT2ForSequenceClassification = classifier(GPT2LMHeadModel)
