"""From an EngineConfig to a working engine: checkpoint, weights, tokenizer, generation defaults, device."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import EngineConfig, resolve
from jaxllm.engine import LLMEngine
from jaxllm.pooling import PoolerConfig, problem_type_of
from jaxllm.scheduling import make_policy
from jaxllm.tokenizer import Tokenizer

DEFAULT_MODEL = Path(__file__).parent / "default_model"
DEFAULT_MODEL_NOTICE = "no model was named: using the embedded default, a tiny model that knows a few old books"

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """What a model folder says, before any weight is read.

    Attributes:
      folder: None for a model given in memory.
      config: the dict of config.json, overrides applied.
      generation: the dict of generation_config.json; empty if there is none.
    """

    folder: Path | None
    config: dict[str, Any]
    generation: dict[str, Any]

    @property
    def eos_token_ids(self) -> list[int]:
        """All end-of-sequence tokens that the two files name, in order."""
        found: list[int] = []
        for value in (self.generation.get("eos_token_id"), self.config.get("eos_token_id")):
            for token in value if isinstance(value, list) else [value]:
                if isinstance(token, int) and token not in found:
                    found.append(token)
        return found


def open_checkpoint(config: EngineConfig) -> Checkpoint:
    """Finds the model's folder (downloading it if need be) and reads its JSON files."""
    from jaxllm.models.hub import resolve as find_folder

    overrides = config.hf_overrides or {}
    if isinstance(config.model, Mapping):
        return Checkpoint(None, {**config.model, **overrides}, {})
    if config.model is None:
        logger.warning(DEFAULT_MODEL_NOTICE)
        folder = DEFAULT_MODEL
    else:
        folder = find_folder(config.model, config.revision, config.download_dir)
    generation = _read_generation_config(folder) | (config.override_generation_config or {})
    return Checkpoint(folder, _read_json(folder / "config.json") | overrides, generation)


def build_engine(config: EngineConfig, params: Any = None) -> LLMEngine:
    """A ready engine. `params`: weights in memory, a nested dict of arrays as models.Network describes it."""
    start = time.perf_counter()
    make_policy(config.scheduling_policy)  # an unknown one is refused before anything is loaded
    claim_device_memory(config.gpu_memory_utilization)
    import jax

    from jaxllm.models.registry import build, quantized, read_config
    from jaxllm.runner.kv_pool import device_memory, kv_dtype
    from jaxllm.runner.model_runner import ModelRunner

    checkpoint = open_checkpoint(config)
    if checkpoint.folder is None and params is None and config.load_format != "dummy":
        raise ValueError('model is a config without weights: pass params=, or load_format="dummy" for random weights')
    model_config = quantized(read_config(checkpoint.config), config.quantization)
    adapter = _read_adapter(config, checkpoint, params)
    device = jax.devices()[0]
    network = build(model_config, network_dtype(config.dtype, model_config.dtype, device.platform))
    kv_dtype(network, config.kv_cache_dtype)  # one that the network cannot have is refused before weights are read
    memory = device_memory(device)
    resolved = resolve(
        config,
        max_positions=model_config.max_model_len,
        device_bytes=None if memory is None else memory[0],
    )
    tokenizer = _load_tokenizer(config, checkpoint)
    if tokenizer is not None:
        tokenizer.fit_vocabulary(model_config.vocab_size)

    pooler = PoolerConfig.of_checkpoint(checkpoint.folder)
    if config.pooler_config is not None:
        pooler = PoolerConfig.of(config.pooler_config)
    problem_type = problem_type_of(checkpoint.config) if model_config.num_labels else None

    def load() -> Any:
        return _load_params(config, network, checkpoint, params, adapter)

    weights = load()
    loaded = time.perf_counter()
    runner = ModelRunner(network, weights, resolved, shrink_model_len=config.max_model_len is None)
    overrides = config.override_generation_config or {}
    defaults = sampling_defaults(checkpoint.generation if config.generation_config == "auto" else overrides)
    reload = load if params is None else None
    del weights  # or sleep mode could not free them
    eos_token_ids = _eos_token_ids(checkpoint, tokenizer)
    engine = LLMEngine(runner, tokenizer, eos_token_ids, defaults, reload, pooler, problem_type)
    logger.info(
        "%s on %s, %s: %d KV pages of %d tokens (%.2f GiB); start-up %.1f s, of which loading %.1f",
        model_config.architecture, device.device_kind, network.dtype.name, runner.num_pages, resolved.block_size,
        runner.kv_bytes / 2**30, time.perf_counter() - start, loaded - start,
    )  # fmt: skip
    return engine


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The SamplingParams fields that the dict of a generation_config.json sets."""
    names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    names["repetition_penalty"] = "repetition_penalty"
    names["max_new_tokens"] = "max_tokens"
    found = {ours: generation[theirs] for theirs, ours in names.items() if generation.get(theirs) is not None}
    return found | {"temperature": 0.0} if generation.get("do_sample") is False else found


def claim_device_memory(fraction: float) -> None:
    """Tells XLA to take `fraction` of the GPU's memory; without it, JAX takes three quarters.

    It must come before JAX first touches the device; a fraction that the user has set in the environment stays.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction:.4f}")


def _load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    name = "" if checkpoint.folder is None else Path(config.model or checkpoint.folder).resolve().name
    options = {"trust_remote_code": config.trust_remote_code, "config": checkpoint.config, "name": name}
    if config.tokenizer is None:
        if checkpoint.folder is None:
            return None
        return Tokenizer.load(checkpoint.folder, **options)
    if isinstance(config.tokenizer, str | os.PathLike):
        from jaxllm.models.hub import resolve as find_folder

        folder = find_folder(config.tokenizer, config.tokenizer_revision, config.download_dir, tokenizer_only=True)
        return Tokenizer.load(folder, **options)
    return Tokenizer(config.tokenizer, checkpoint.config, name)


def _read_adapter(config: EngineConfig, checkpoint: Checkpoint, params: Any) -> Any:
    """The LoRA adapter that the configuration names; its config is checked here."""
    if config.lora is None:
        return None
    if checkpoint.folder is None or params is not None or config.load_format == "dummy":
        raise ValueError(f"lora={config.lora!r} needs a checkpoint's weights: not params=, nor load_format='dummy'")
    from jaxllm.models.lora import Adapter

    return Adapter(config.lora)


def _load_params(config: EngineConfig, network: Any, checkpoint: Checkpoint, params: Any, adapter: Any) -> Any:
    import jax

    from jaxllm.models.weights import check_params, load_params

    if params is not None:
        check_params(network, params)
        return jax.device_put(params)
    if config.load_format == "dummy" or checkpoint.folder is None:
        return network.init(jax.random.key(config.seed))  # jitted as a whole it would compile for a minute
    return load_params(network, checkpoint.folder, adapter=adapter, progress=config.use_tqdm_on_load)


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> list[int]:
    """The tokenizer's end of sequence first: it is the one that is not reported as a stop_reason."""
    if tokenizer is None:
        return checkpoint.eos_token_ids
    first = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys(first + checkpoint.eos_token_ids + tokenizer.end_of_turn_ids))


def network_dtype(wanted: str, checkpoint: str, platform: str) -> str:
    """The dtype of weights and activations: the one that is `wanted`; for "auto" the one that fits best."""
    if wanted != "auto":
        return wanted
    # XLA computes 16-bit floats on a CPU by way of float32, and slowly.
    if platform == "cpu":
        return "float32"
    return "bfloat16" if checkpoint == "float32" else checkpoint


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model: {path.parent} has no {path.name}: it is no Hugging Face checkpoint folder") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"model: {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"model: {path} must hold a JSON object")
    return value


def _read_generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return _read_json(path) if path.exists() else {}
