"""The GLM family (GLM team 2024, "ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4").

ChatGLM3-6B, GLM-4-9B-chat and its -1m variant as published (`ChatGLMModel`), and GLM-4 in transformers' layout
(`GlmForCausalLM`). Both are Llama with neighbouring pairs rotated, in one half of each head, and biases on q, k and v.

`rope_ratio` multiplies the base here. In the code that ChatGLM2-6B-32K ships it divides the positions, which no key of
its config tells; the README has the overrides that do.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

from jaxllm.models.config import ModelConfig
from jaxllm.models.llama import LlamaForCausalLM

# Keys of ChatGLM's config whose other values mean another network, of which no checkpoint is known.
_FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,  # a norm after the last layer
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,  # without it, q, k and v are merged head by head
    "quantization_bit": 0,
}


class ChatGLMConfig(ModelConfig):
    names = MappingProxyType(
        {
            "vocab_size": "padded_vocab_size",
            "intermediate_size": "ffn_hidden_size",
            "num_hidden_layers": "num_layers",
            "num_key_value_heads": "multi_query_group_num",
            "head_dim": "kv_channels",
            "rms_norm_eps": "layernorm_epsilon",
            "max_position_embeddings": "seq_length",
        }
    )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ChatGLMConfig":
        get = cls.reader(config)
        for key, value in _FIXED.items():
            get.choice(key, (value,), default=value)
        if config.get("pre_seq_len") is not None:
            raise ValueError(f"pre_seq_len={config['pre_seq_len']!r} is not supported: prefix tuning; allowed: null")
        every_bias = get.boolean("add_bias_linear", default=False)
        rope_ratio = get.number("rope_ratio", default=1.0, minimum=1.0)
        read = super().from_hf(
            {
                **config,
                "attention_bias": get.boolean("add_qkv_bias", default=False) or every_bias,
                "attention_out_bias": every_bias,
                "mlp_bias": every_bias,
                "rope_theta": 10000.0 * rope_ratio,
                "partial_rotary_factor": 0.5,
            }
        )
        return replace(read, rope=replace(read.rope, interleaved=True))


class ChatGLMModel(LlamaForCausalLM):
    """A `Model` (see interface.py). config.json of a chat model names this class or ChatGLMForConditionalGeneration."""

    known_as: ClassVar = "ChatGLM3; GLM-4-9B-chat and its 1M variant"
    config_class: ClassVar = ChatGLMConfig
    weight_names: ClassVar = (
        ("transformer.embedding.word_embeddings", "embed"),
        ("transformer.encoder.layers.{}.input_layernorm", "layers.{}.attention_norm"),
        ("transformer.encoder.layers.{}.self_attention.query_key_value", "layers.{}.attention.qkv"),
        ("transformer.encoder.layers.{}.self_attention.dense", "layers.{}.attention.out"),
        ("transformer.encoder.layers.{}.post_attention_layernorm", "layers.{}.mlp_norm"),
        ("transformer.encoder.layers.{}.mlp.dense_h_to_4h", "layers.{}.mlp.gate_up"),
        ("transformer.encoder.layers.{}.mlp.dense_4h_to_h", "layers.{}.mlp.down"),
        ("transformer.encoder.final_layernorm", "norm"),
        ("transformer.output_layer", "lm_head"),
    )
    ignored_weights: ClassVar = ("transformer.rotary_pos_emb.inv_freq",)
    optional_prefixes: ClassVar = ()


class GlmConfig(ModelConfig):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GlmConfig":
        defaults = {"attention_bias": True, "attention_out_bias": False, "partial_rotary_factor": 0.5}
        read = super().from_hf(defaults | {key: value for key, value in config.items() if value is not None})
        return replace(read, rope=replace(read.rope, interleaved=True))


class GlmForCausalLM(LlamaForCausalLM):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "GLM-4-9B in the layout of transformers"
    config_class: ClassVar = GlmConfig
    weight_names: ClassVar = (
        *(row for row in LlamaForCausalLM.weight_names if "gate_up" not in row[1]),
        ("model.layers.{}.mlp.gate_up_proj", "layers.{}.mlp.gate_up"),
    )
