"""EngineConfig: every setting of the engine, once. LLM(**kwargs) and the command line's flags are generated from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from jaxllm.validation import check_known

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "int8")
LOAD_FORMATS = ("auto", "dummy")
GENERATION_CONFIGS = ("auto", "vllm")
QUANTIZATIONS = ("int8", "fp8", "int4", "gptq", "awq", "compressed-tensors")
REASONING_MARKERS = {"reasoning_start_str", "reasoning_end_str"}


_ALWAYS = None  # whatever the value, nothing is different
# vLLM's arguments that are no fields here: the values that ask for nothing, and why others are refused.
NOT_HONOURED: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "allowed_local_media_path": ((None, ""), "models take text alone"),
    "allowed_media_domains": ((None,), "models take text alone"),
    "attention_config": ((None,), "the attention kernel is picked by device and shape"),
    "code_revision": ((None,), "no code of a checkpoint's model is run"),
    "compilation_config": ((None,), "shapes are compiled from max_num_seqs and max_num_batched_tokens"),
    "convert": (("auto", "none"), "an architecture is used as what it is"),
    "cpu_offload_gb": ((0,), "weights stay on the device"),
    "data_parallel_size": ((None, 1), "one device is used"),
    "device": ((None, "auto", "cuda"), "JAX_PLATFORMS chooses it"),
    "disable_async_output_proc": (_ALWAYS, "async_scheduling says whether steps overlap"),
    "disable_custom_all_reduce": (_ALWAYS, "there is none"),
    "disable_log_requests": (_ALWAYS, "requests are not logged"),
    "disable_log_stats": (_ALWAYS, "statistics are not logged: LLM.get_metrics has them"),
    "disable_sliding_window": ((False,), "windows are the model's"),
    "distributed_executor_backend": ((None,), "one device is used"),
    "enable_log_requests": ((None, False), "requests are not logged"),
    "enable_lora": ((None, False), "adapters are merged while loading: lora=folder"),
    "enable_return_routed_experts": ((False,), "the experts that tokens were routed to are not returned"),
    "engine_use_ray": ((False,), "one process is used"),
    "guided_decoding_backend": ((None, "auto"), "there is one"),
    "hf_token": ((None,), "the environment's HF_TOKEN is used"),
    "limit_mm_per_prompt": ((None, {}), "models take text alone"),
    "logits_processors": ((None,), "they are a request's: SamplingParams(logits_processors=...)"),
    "logprobs_mode": (("raw_logprobs",), "log probabilities are the model's own; a beam search's are processed"),
    "max_context_len_to_capture": (_ALWAYS, "no graphs are captured"),
    "max_log_len": (_ALWAYS, "requests are not logged"),
    "max_seq_len_to_capture": (_ALWAYS, "no graphs are captured"),
    "mm_processor_kwargs": ((None, {}), "models take text alone"),
    "offload_group_size": ((0,), "weights stay on the device"),
    "offload_num_in_group": ((1,), "weights stay on the device"),
    "offload_params": ((None,), "weights stay on the device"),
    "offload_prefetch_step": ((1,), "weights stay on the device"),
    "pipeline_parallel_size": ((1,), "one device is used"),
    "profiler_config": ((None,), "profiler_dir says where profiles go"),
    "quantization_config": ((None,), "quantization names a method, or the checkpoint says it"),
    "return_sampling_mask": ((False,), "which tokens could have been sampled is not returned"),
    "rope_scaling": ((None,), 'hf_overrides={"rope_scaling": ...} replaces it'),
    "runner": (("auto", "generate", "pooling"), "an architecture is used as what it is"),
    "served_model_name": ((None,), "there is no server"),
    "spec_method": ((None,), "there is no speculative decoding"),
    "spec_model": ((None,), "there is no speculative decoding"),
    "spec_tokens": ((None,), "there is no speculative decoding"),
    "speculative_config": ((None,), "there is no speculative decoding"),
    "speculative_model": ((None,), "there is no speculative decoding"),
    "structured_outputs_config": ((None,), "there is one backend"),
    "swap_space": ((0, 4), "a preempted request is computed again, not swapped out"),
    "task": ((None, "auto", "generate", "embed", "classify", "score"), "an architecture is used as what it is"),
    "tokenizer_mode": (("auto",), "a tokenizer is loaded as its files say"),
    "use_v2_block_manager": (_ALWAYS, "there is one"),
    "worker_use_ray": ((False,), "one process is used"),
}


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings, under vLLM's names. What is None is decided once the model and the device are known.

    Raises ValueError, naming the field, the value and what is allowed.
    """

    model: Any = option(None, "folder or hub id of a Hugging Face checkpoint; none: the embedded default model")
    tokenizer: Any = option(None, "folder or hub id of the tokenizer, or a tokenizer object; none: the model's")
    skip_tokenizer_init: bool = option(False, "load no tokenizer: token ids in, token ids out")
    trust_remote_code: bool = option(False, "allow a checkpoint's own tokenizer code to run")
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    tokenizer_revision: str | None = option(None, "the same for the tokenizer")
    chat_template: str | None = option(
        None, "of LLM.chat: Jinja text, a file or the name of a format; none: the tokenizer's"
    )
    download_dir: str | None = option(None, "where hub downloads are kept; none: the hub's own cache")
    load_format: str = option("auto", "auto: the checkpoint's weights; dummy: random ones", LOAD_FORMATS)
    hf_overrides: dict[str, Any] | None = option(None, "values that replace those of the checkpoint's config.json")
    generation_config: str = option(
        "auto", "auto: sampling defaults from generation_config.json; vllm: none from there", GENERATION_CONFIGS
    )
    override_generation_config: dict[str, Any] | None = option(
        None, "values that replace those of the checkpoint's generation_config.json"
    )
    dtype: str = option("auto", "of weights and activations; auto: the checkpoint's on a GPU, float32 on a CPU", DTYPES)
    kv_cache_dtype: str = option(
        "auto", "of KV pages; auto: dtype; fp8 (fp8_e4m3) and int8: with a scale a token and head", KV_CACHE_DTYPES
    )
    quantization: str | None = option(
        None,
        "int8, fp8, int4: round the weights to it while loading; gptq, awq, fp8, compressed-tensors: require a "
        "checkpoint of that kind, which is recognized without",
        QUANTIZATIONS,
    )
    lora: str | None = option(None, "folder of a PEFT LoRA adapter to merge into the weights while loading")
    seed: int = option(0, "of the requests that bring no seed of their own, and of random weights")
    max_model_len: int | None = option(None, "longest sequence, prompt and answer; none: the model's")
    tensor_parallel_size: int = option(1, "GPUs to spread one model over; only 1 so far")
    gpu_memory_utilization: float = option(0.92, "fraction of the GPU's memory that the engine takes")
    kv_cache_memory_bytes: int | None = option(None, "bytes for KV pages, instead of measuring what is free")
    num_gpu_blocks_override: int | None = option(None, "number of KV pages, instead of measuring")
    block_size: int | None = option(None, "tokens a KV page; none: 16, or 32 where KV is of 8 bits")
    enable_prefix_caching: bool = option(True, "reuse the KV of prompt beginnings seen before")
    max_num_seqs: int | None = option(None, "most sequences in one step")
    max_num_batched_tokens: int | None = option(None, "most tokens in one step")
    enable_chunked_prefill: bool = option(True, "let a long prompt be computed over several steps")
    long_prefill_token_threshold: int = option(0, "most tokens of one prompt in one step; 0: no limit of its own")
    scheduling_policy: Any = option("fcfs", "fcfs, priority, or a Policy object")
    num_scheduler_steps: int = option(
        16, "most decode steps per scheduling step; fewer while they are long or some wait"
    )
    async_scheduling: bool = option(True, "schedule a step while the one before it runs")
    enforce_eager: bool = option(False, "compile each shape when it is first met, not all at start-up")
    max_logprobs: int = option(
        20, "most log probabilities that a request may ask for per token; -1: the whole vocabulary"
    )
    reasoning_config: dict[str, Any] | None = option(
        None, 'texts around a model\'s reasoning, for thinking_token_budget: {"reasoning_start_str": ..., '
        '"reasoning_end_str": ...}'
    )  # fmt: skip
    pooler_config: dict[str, Any] | None = option(
        None, 'how embeddings are made: {"pooling_type": "MEAN", "LAST" or "CLS", "use_activation": normalize or not}; '
        "none: as the checkpoint says, else the last token's, normalized"
    )  # fmt: skip
    profiler_dir: str | None = option(
        None, "where LLM.start_profile has the JAX profiler write; none: the environment's JAXLLM_PROFILER_DIR"
    )
    use_tqdm_on_load: bool = option(True, "progress bars while loading and compiling")

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            choices = one.metadata["choices"]
            if choices and getattr(self, one.name) not in (*choices, one.default):
                raise ValueError(f"{one.name} must be one of {', '.join(choices)}, got {getattr(self, one.name)!r}")
        for name in _POSITIVE:
            self._check_integer(name, 1)
        for name in ("long_prefill_token_threshold", "seed"):
            self._check_integer(name, 0)
        if self.max_logprobs != -1:
            self._check_integer("max_logprobs", 0)
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ValueError(
                f"long_prefill_token_threshold must be 0 with enable_chunked_prefill=False, got "
                f"{self.long_prefill_token_threshold}: it cuts prompts into chunks"
            )
        utilization = self.gpu_memory_utilization
        if not (isinstance(utilization, int | float) and math.isfinite(utilization) and 0 < utilization <= 1):
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {utilization!r}")
        for name, file in (("hf_overrides", "config"), ("override_generation_config", "generation_config")):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name} must be a dict of {file}.json's keys, got {getattr(self, name)!r}")
        markers = self.reasoning_config
        if markers is not None and not (isinstance(markers, dict) and set(markers) == REASONING_MARKERS):
            raise ValueError(
                f"reasoning_config must be a dict with the keys {sorted(REASONING_MARKERS)}, got {markers!r}"
            )
        if self.tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size must be 1 in this version, got {self.tensor_parallel_size!r}")

    @classmethod
    def create(cls, **fields: Any) -> EngineConfig:
        """As the constructor, for all of vLLM's arguments: those that are not honoured are refused by name.

        Raises: besides the constructor's errors ValueError for an argument with a value that is not honoured; TypeError
          for an unknown one, with the nearest known one.
        """
        known = [one.name for one in dataclasses.fields(cls)]
        check_known(fields, [*known, *NOT_HONOURED], "EngineConfig")
        for name in fields.keys() & NOT_HONOURED.keys():
            allowed, reason = NOT_HONOURED[name]
            if allowed is not _ALWAYS and fields[name] not in allowed:
                some = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} must be {some}, got {fields[name]!r}: {reason}")
        return cls(**{name: value for name, value in fields.items() if name in known})

    @property
    def page_size(self) -> int:
        """block_size, or what it is by default: the fewest tokens that the Hopper kernels take of such KV."""
        return self.block_size or (32 if self.kv_cache_dtype in ("fp8", "fp8_e4m3", "int8") else 16)

    def _check_integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        optional = type(self).__dataclass_fields__[name].default is None
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def EngineArgs(**fields: Any) -> EngineConfig:
    """vLLM's name for an engine's settings: EngineConfig.create."""
    return EngineConfig.create(**fields)


AsyncEngineArgs = EngineArgs

_POSITIVE = (
    "max_model_len",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_scheduler_steps",
)


def resolve(config: EngineConfig, *, max_positions: int, device_bytes: int | None) -> EngineConfig:
    """Fills in what depends on the model and the device.

    Args:
      max_positions: the longest sequence that the model's config allows (ModelConfig.max_model_len).
      device_bytes: memory of the GPU; None on a CPU.
    """
    if config.max_model_len is not None and config.max_model_len > max_positions:
        raise ValueError(
            f"max_model_len={config.max_model_len} exceeds the model's {max_positions} positions "
            f"(max_position_embeddings in its config, times the factor of its rope type)"
        )
    if device_bytes is None:
        seqs, tokens = 64, 1024
    elif device_bytes >= 60 * 2**30:
        seqs, tokens = 1024, 16384
    else:
        seqs, tokens = 256, 8192
    max_model_len = config.max_model_len or max_positions
    tokens = config.max_num_batched_tokens or tokens
    if not config.enable_chunked_prefill and config.max_num_batched_tokens is None:
        tokens = max(tokens, max_model_len)
    return dataclasses.replace(
        config,
        block_size=config.page_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs or min(seqs, tokens),
        max_num_batched_tokens=tokens,
    )
