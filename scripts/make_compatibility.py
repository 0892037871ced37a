"""Writes docs/compatibility.md: vLLM's fields, arguments and methods, and what becomes of each here, read off the code.

python scripts/make_compatibility.py
"""

import dataclasses
import pathlib

from jaxllm import LLM, AsyncLLM, EngineConfig
from jaxllm.config import NOT_HONOURED
from jaxllm.sampling_params import _GUIDED, _REFUSED, known_fields
from jaxllm.validation import REFUSED_METHODS

FILE = pathlib.Path(__file__).parent.parent / "docs" / "compatibility.md"


def words(text: str) -> list[str]:
    return text.split()


# The names of vLLM 0.33 and of 0.4.3 (and 0.6.1) together.
SAMPLING_FIELDS = words("""
    n best_of presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p top_k min_p seed stop
    stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs prompt_logprob_token_ids
    prompt_logprob_start logprob_token_ids flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens
    include_stop_str_in_output output_kind stream_interval structured_outputs logit_bias allowed_token_ids extra_args
    bad_words skip_reading_prefix_cache thinking_token_budget repetition_detection routed_experts_prompt_start
    trace_decode_token_ids use_beam_search length_penalty early_stopping logits_processors truncate_prompt_tokens
    guided_json guided_regex guided_choice guided_grammar guided_json_object guided_decoding_backend
    guided_whitespace_pattern guided_decoding
""")
ENGINE_ARGUMENTS = words("""
    model tokenizer skip_tokenizer_init revision code_revision tokenizer_revision tokenizer_mode trust_remote_code
    chat_template download_dir load_format dtype kv_cache_dtype max_model_len hf_overrides hf_token generation_config
    override_generation_config distributed_executor_backend worker_use_ray pipeline_parallel_size tensor_parallel_size
    data_parallel_size block_size enable_prefix_caching disable_sliding_window use_v2_block_manager seed swap_space
    cpu_offload_gb gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override max_num_batched_tokens
    max_num_seqs max_logprobs logprobs_mode disable_log_stats disable_log_requests enable_log_requests max_log_len
    quantization quantization_config rope_scaling enforce_eager max_context_len_to_capture max_seq_len_to_capture
    disable_custom_all_reduce enable_lora max_loras max_lora_rank device enable_chunked_prefill
    long_prefill_token_threshold scheduling_policy async_scheduling num_scheduler_steps compilation_config
    served_model_name speculative_config speculative_model structured_outputs_config guided_decoding_backend
    reasoning_config runner convert task pooler_config profiler_config logits_processors limit_mm_per_prompt
    mm_processor_kwargs allowed_local_media_path allowed_media_domains use_tqdm_on_load engine_use_ray attention_config
    disable_async_output_proc enable_return_routed_experts return_sampling_mask spec_method spec_model spec_tokens
    offload_group_size offload_num_in_group offload_params offload_prefetch_step
""")
LLM_METHODS = words("""
    from_engine_args get_tokenizer set_tokenizer get_world_size get_default_sampling_params generate enqueue
    wait_for_completion chat enqueue_chat beam_search encode embed classify score collective_rpc apply_model
    start_profile stop_profile reset_prefix_cache reset_mm_cache sleep wake_up release_kv_cache_memory get_metrics
    init_weight_transfer_engine shutdown_weight_transfer_engine start_weight_update start_draft_weight_update
    update_weights finish_weight_update update_weight_version get_weight_version
""")


def sampling_state(name: str) -> str:
    if name in _REFUSED:
        default, reason = _REFUSED[name]
        return f"refused unless `{default!r}`: {reason}"
    if name in _GUIDED:
        return f"the older name of `structured_outputs`' `{_GUIDED[name]}`"
    if name not in set(known_fields()):
        return "refused"
    return "honoured"


def engine_state(name: str) -> str:
    fields = {one.name: one for one in dataclasses.fields(EngineConfig)}
    if name in fields:
        return f"honoured: {fields[name].metadata['help']}"
    if name not in NOT_HONOURED:
        return "refused"
    allowed, reason = NOT_HONOURED[name]
    if allowed is None:
        return f"accepted without effect: {reason}"
    return f"refused unless {' or '.join(f'`{value!r}`' for value in allowed)}: {reason}"


def method_state(name: str) -> str:
    method = getattr(LLM, name, None)
    return f"refused: {REFUSED_METHODS[name]}" if method is None else method.__doc__.splitlines()[0]


def methods(owner: type) -> list[str]:
    """Names of a class's public methods and properties, in the order of the code."""
    return [name for name in vars(owner) if not name.startswith("_")]


def table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    escaped = [(name, text.replace("|", "\\|")) for name, text in rows]
    return ["", f"## {title}", "", "| name | state |", "| --- | --- |", *(f"| `{a}` | {b} |" for a, b in escaped)]


def document() -> str:
    """The whole file."""
    own = [one.name for one in dataclasses.fields(EngineConfig) if one.name not in ENGINE_ARGUMENTS]
    lines = [
        "# Compatibility with vLLM",
        "",
        "What becomes of vLLM's names, those of today (0.33) and of 0.4. What is not honoured is refused by name,",
        "but for what is marked as accepted without effect, which has nothing to act on here; and so is every name",
        "that is not in these tables.",
        "This file is made by `scripts/make_compatibility.py` from the code.",
        *table("SamplingParams", [(name, sampling_state(name)) for name in SAMPLING_FIELDS]),
        *table("LLM(...), EngineArgs, EngineConfig", [(name, engine_state(name)) for name in ENGINE_ARGUMENTS]),
        *table("Arguments of our own", [(name, engine_state(name)) for name in own]),
        *table("Methods of LLM", [(name, method_state(name)) for name in LLM_METHODS]),
        "",
        "Of our own: " + ", ".join(f"`{name}`" for name in methods(LLM) if name not in LLM_METHODS) + ".",
        "`AsyncLLM` has " + ", ".join(f"`{name}`" for name in methods(AsyncLLM)) + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(document())
