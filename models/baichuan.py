"""Baichuan 1 and 2 (Yang et al. 2023, "Baichuan 2: Open Large-scale Language Models"): Llama with q, k and v merged.

The 7B models rotate, the 13B ones have ALiBi. Version 2 normalizes the rows of its output head, once, when the weights
are loaded; weights in memory are expected so. All of them name one class (the first 7B's differs by a capital), so what
a checkpoint is follows from what the published configs differ in, and `position_embedding` and `norm_head` override it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from jaxllm.models.config import ModelConfig
from jaxllm.models.llama import LlamaForCausalLM

VERSION_2_VOCAB_SIZE = 125696  # version 1 has 64000


@dataclass(frozen=True)
class BaichuanConfig(ModelConfig):
    names = MappingProxyType({"max_position_embeddings": "model_max_length"})

    norm_head: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BaichuanConfig":
        """Besides the published keys: `position_embedding` ("rope" or "alibi") and `norm_head` (true or false)."""
        get = cls.reader(config)
        rotates = config.get("max_position_embeddings") is not None  # the 13B models have model_max_length alone
        position = get.choice("position_embedding", ("rope", "alibi"), default="rope" if rotates else "alibi")
        read = super().from_hf(config)
        return replace(
            read,
            rope=read.rope if position == "rope" else None,
            alibi=position == "alibi",
            norm_head=get.boolean("norm_head", default=read.vocab_size >= VERSION_2_VOCAB_SIZE),
        )


class BaichuanForCausalLM(LlamaForCausalLM):
    """A `Model` (see interface.py)."""

    known_as: ClassVar = "Baichuan; Baichuan2"
    config_class: ClassVar = BaichuanConfig

    def __init__(self, config: BaichuanConfig, dtype):
        super().__init__(config, dtype)
        self.weight_names = (
            *(row for row in LlamaForCausalLM.weight_names if not row[1].endswith(("qkv", "lm_head"))),
            ("model.layers.{}.self_attn.W_pack", "layers.{}.attention.qkv"),
            ("lm_head", "lm_head", None, "unit_rows" if config.norm_head else None),
        )
