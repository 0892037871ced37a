"""jaxllm inspect: what a checkpoint is and what fits on this machine's device. Reads headers, and no weights."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.loading import claim_device_memory, network_dtype, open_checkpoint


@dataclass(frozen=True)
class Inspection:
    """What there is to know of a checkpoint on a device; bytes are those on the device.

    Attributes:
      quantization: "none", or the method and how its weights are packed.
      kv_bytes_per_token: over all layers.
      kv_tokens: that fit beside the weights, before the working memory of a step.
    """

    architecture: str
    parameters: int
    dtype: str
    quantization: str
    weight_bytes: int
    kv_bytes_per_token: int
    max_model_len: int
    device: str
    device_bytes: int | None  # None: not accounted for, as on a CPU
    kv_tokens: int

    @property
    def lines(self) -> list[str]:
        """For people."""
        memory = "" if self.device_bytes is None else f", {_size(self.device_bytes)} for the engine"
        longest = min(self.kv_tokens, self.max_model_len)
        fits = f"{self.kv_tokens:,} tokens of KV: "
        if self.kv_tokens >= self.max_model_len:
            fits += f"{self.kv_tokens // self.max_model_len} sequences of {self.max_model_len:,} tokens"
        else:
            fits += f"one sequence of {longest:,} tokens" if longest else "the weights do not fit"
        return [
            f"architecture    {self.architecture}",
            f"parameters      {self.parameters:,}",
            f"dtype           {self.dtype}",
            f"quantization    {self.quantization}",
            f"weights         {_size(self.weight_bytes)}",
            f"KV              {self.kv_bytes_per_token:,} bytes a token",
            f"longest         {self.max_model_len:,} tokens",
            f"device          {self.device}{memory}",
            f"fits            {fits}",
        ]


def inspect(config: EngineConfig) -> Inspection:
    """Of the checkpoint that `config.model` names, loaded as the rest of `config` says.

    Raises: ValueError for a config that is not supported; CheckpointError for tensors that do not fit it.
    """
    claim_device_memory(config.gpu_memory_utilization)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it is only asked how much there is
    import jax

    from jaxllm.models.lora import Adapter
    from jaxllm.models.registry import build, quantized, read_config
    from jaxllm.models.weights import check_checkpoint
    from jaxllm.runner import kv_pool

    checkpoint = open_checkpoint(config)
    model_config = quantized(read_config(checkpoint.config), config.quantization)
    device = jax.devices()[0]
    network = build(model_config, network_dtype(config.dtype, model_config.dtype, device.platform))
    if checkpoint.folder is not None:
        check_checkpoint(network, checkpoint.folder, None if config.lora is None else Adapter(config.lora))
    weight_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in network.specs.values())
    page_bytes = kv_pool.page_bytes(network, config.page_size, kv_pool.kv_dtype(network, config.kv_cache_dtype))
    memory = kv_pool.device_memory(device)
    budget = kv_pool.CPU_KV_BYTES if memory is None else memory[0] - memory[0] // 64 - weight_bytes
    return Inspection(
        architecture=model_config.architecture,
        parameters=count_parameters(network),
        dtype=network.dtype.name,
        quantization=_describe(network),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=page_bytes // config.page_size,
        max_model_len=config.max_model_len or model_config.max_model_len,
        device=device.device_kind,
        device_bytes=None if memory is None else memory[0],
        kv_tokens=kv_pool.pages_in(budget, page_bytes) * config.page_size,
    )


def count_parameters(network: Any) -> int:
    """The model's weights, each quantized one counted once, without its scales."""
    plain = sum(math.prod(spec.shape) for path, spec in network.specs.items() if path[:-1] not in network.packed)
    return plain + sum(one.out_features * one.in_features for parts in network.packed.values() for one in parts)


def _describe(network: Any) -> str:
    layouts = {parts[0].scheme.layout for parts in network.packed.values()}
    if not layouts:
        return "none"
    packed = "; ".join(sorted(_described(layout) for layout in layouts))
    return f"{network.config.quantization.method} ({packed}; {len(network.packed)} weights)"


def _described(layout: Any) -> str:
    scales = "a scale a row" if layout.group_size == -1 else f"groups of {layout.group_size}"
    extras = [name for name in ("zeros", "permutation") if getattr(layout, name)]
    return ", ".join([layout.format, scales, *extras])


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
