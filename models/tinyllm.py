"""TinyLLM-92M (`TinyllmForCausalLM`): Llama with biases on q, k and v, which its config.json does not mention.

docs/add_a_model.md adds the same model from outside.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxllm.models.config import ModelConfig
from jaxllm.models.llama import LlamaForCausalLM


class TinyllmConfig(ModelConfig):
    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "TinyllmConfig":
        return super().from_hf({**config, "attention_bias": True, "attention_out_bias": False})


class TinyllmForCausalLM(LlamaForCausalLM):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "TinyLLM"
    config_class: ClassVar = TinyllmConfig
