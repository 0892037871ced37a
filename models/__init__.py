"""Networks as functions of arrays: what a checkpoint computes, and how its weights are read.

Knows nothing of requests, scheduling or text. A model is built by name:

    config = ModelConfig.from_hf(json.load(open(folder / "config.json")))
    network = build(config, "bfloat16")
    params = load_params(network, folder)
    hidden, kv = network.forward(params, kv, batch)
"""

from jaxllm.models.config import ModelConfig, RopeConfig
from jaxllm.models.interface import KVPages, LayerKV, Network, StepBatch
from jaxllm.models.registry import build, register_model, supported_architectures

__all__ = [
    "KVPages",
    "LayerKV",
    "ModelConfig",
    "Network",
    "RopeConfig",
    "StepBatch",
    "build",
    "register_model",
    "supported_architectures",
]
