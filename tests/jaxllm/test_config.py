"""EngineConfig: checks, unknown names, what is decided when the device is known."""

import dataclasses

import pytest

from jaxllm.config import EngineArgs, EngineConfig, resolve


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("dtype", "int8"),
        ("load_format", "gguf"),
        ("generation_config", "mine"),
        ("block_size", 0),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("kv_cache_dtype", None),
        ("max_num_seqs", -1),
        ("max_model_len", 1.5),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.1),
        ("gpu_memory_utilization", float("nan")),
        ("tensor_parallel_size", 2),
        ("seed", -1),
    ],
)
def test_bad_values(field, bad):
    with pytest.raises(ValueError, match=rf"^{field} must be .*{bad!r}"):
        EngineConfig(**{field: bad})


def test_a_limit_of_chunks_without_chunks():
    with pytest.raises(
        ValueError, match="long_prefill_token_threshold must be 0 with enable_chunked_prefill=False, got 9"
    ):
        EngineConfig(enable_chunked_prefill=False, long_prefill_token_threshold=9)


def test_unknown_field():
    with pytest.raises(TypeError, match="no field 'max_seqs': did you mean 'max_num_seqs'"):
        EngineConfig.create(max_seqs=3)


def test_every_field_explains_itself():
    assert all(one.metadata["help"] for one in dataclasses.fields(EngineConfig))


def test_resolve():
    cpu = resolve(EngineConfig(), max_positions=2048, device_bytes=None)
    assert (cpu.max_model_len, cpu.max_num_seqs, cpu.max_num_batched_tokens) == (2048, 64, 1024)
    assert cpu.block_size == 16
    of_8_bits = resolve(EngineConfig(kv_cache_dtype="fp8"), max_positions=2048, device_bytes=None)
    assert of_8_bits.block_size == 32
    big = resolve(EngineConfig(max_model_len=4096), max_positions=8192, device_bytes=141 * 10**9)
    assert (big.max_model_len, big.max_num_seqs, big.max_num_batched_tokens) == (4096, 1024, 16384)
    small = resolve(EngineConfig(), max_positions=8192, device_bytes=24 * 10**9)
    assert (small.max_num_seqs, small.max_num_batched_tokens) == (256, 8192)
    whole = resolve(EngineConfig(enable_chunked_prefill=False), max_positions=32768, device_bytes=24 * 10**9)
    assert whole.max_num_batched_tokens == 32768
    with pytest.raises(ValueError, match="max_model_len=9000 exceeds the model's 8192 positions"):
        resolve(EngineConfig(max_model_len=9000), max_positions=8192, device_bytes=None)


def test_vllm_s_other_arguments():
    from jaxllm.config import NOT_HONOURED

    asked_for_nothing = {name: allowed[0] if allowed else "x" for name, (allowed, _) in NOT_HONOURED.items()}
    assert EngineArgs(**asked_for_nothing, seed=3) == EngineConfig(seed=3)
    for name, (allowed, reason) in NOT_HONOURED.items():
        if allowed is not None:
            with pytest.raises(ValueError, match=f"{name} must be .*, got 'something else'"):
                EngineArgs(**{name: "something else"})
        assert reason
    with pytest.raises(TypeError, match="did you mean 'swap_space'"):
        EngineArgs(swap_spac=4)
