"""Networks as functions of arrays: what a checkpoint computes, and how its weights are read.

Knows nothing of requests, scheduling or text. A model is built by name:

    config = read_config(json.load(open(folder / "config.json")))
    network = build(config, "bfloat16")
    params = load_params(network, folder)
    hidden, kv = network.forward(params, kv, batch)
"""

from jaxllm.models.config import ModelConfig, RopeConfig
from jaxllm.models.hub import resolve
from jaxllm.models.interface import KVPages, LayerKV, Network, StepBatch
from jaxllm.models.registry import build, model_names, read_config, register_model, supported_architectures
from jaxllm.models.weights import CheckpointError, check_params, load_params, save_checkpoint

__all__ = [
    "CheckpointError",
    "KVPages",
    "LayerKV",
    "ModelConfig",
    "Network",
    "RopeConfig",
    "StepBatch",
    "build",
    "check_params",
    "load_params",
    "model_names",
    "read_config",
    "register_model",
    "resolve",
    "save_checkpoint",
    "supported_architectures",
]
