"""kv_cache_dtype: KV of 8 bits and of other floats than the model's, through the whole engine."""

import numpy as np
import pytest

import jaxllm
from jaxllm.config import EngineConfig
from jaxllm.inspection import inspect
from jaxllm.models import build, read_config
from jaxllm.runner import kv_pool, model_runner
from tests.checkpoints import TINY_LLAMA

LLAMA = {**TINY_LLAMA, "architectures": ["LlamaForCausalLM"], "dtype": "float32", "initializer_range": 0.3}
GEMMA2 = {
    **LLAMA,
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 16,
    "query_pre_attn_scalar": 11,
    "sliding_window": 7,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
}
DEEPSEEK = {
    **LLAMA,
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_theta": 10000.0,
    "first_k_dense_replace": 2,  # no layer has experts
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
}
CONFIGS = {"llama": LLAMA, "gemma2": GEMMA2}
NUM_TOKENS = 24


def make_llm(config=LLAMA, **fields):
    defaults = dict(
        load_format="dummy", dtype="float32", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64,
        num_gpu_blocks_override=64, block_size=4, max_logprobs=96, use_tqdm_on_load=False, enforce_eager=True,
    )  # fmt: skip
    return jaxllm.LLM(config, **(defaults | fields))


def prompt(length, seed=0):
    return np.random.default_rng((length, seed)).integers(0, LLAMA["vocab_size"], length).tolist()


PROMPTS = [prompt(length) for length in (1, 3, 4, 5, 13, 16, 30, 37)]


def generate(llm, prompts, max_tokens=NUM_TOKENS, **fields):
    params = jaxllm.SamplingParams(temperature=0, max_tokens=max_tokens, **fields)
    return llm.generate(prompts, params, use_tqdm=False)


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def logprobs_of(llm):
    """[sum of the prompts' lengths, V]: of every position's next token."""
    outputs = generate(llm, PROMPTS[4:], max_tokens=1, prompt_logprobs=96)
    rows = [entry for output in outputs for entry in output.prompt_logprobs[1:]]
    return np.array([[row[token].logprob for token in range(96)] for row in rows])


@pytest.fixture(scope="module", params=list(CONFIGS))
def exact(request):
    """(config, log probabilities with KV of float32)."""
    return CONFIGS[request.param], logprobs_of(make_llm(CONFIGS[request.param]))


# What the formats leave of a value: int8 1/254 of a head's largest, e4m3 a sixteenth, 16-bit floats 2^-9 and 2^-12.
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("int8", 1e-4, 0.05), ("fp8", 1e-3, 0.3), ("bfloat16", 1e-4, 0.03), ("float16", 1e-6, 0.005)],
)
def test_log_probabilities_are_near_those_of_float32(exact, name, least, most):
    config, expected = exact
    llm = make_llm(config, kv_cache_dtype=name)
    error = np.sqrt(np.mean((logprobs_of(llm) - expected) ** 2))
    assert least < error < most * expected.std()
    kv = llm.llm_engine.runner._kv[0]
    assert kv.k.dtype.name == {"fp8": "float8_e4m3fn"}.get(name, name) and (kv.k_scales is None) == ("float" in name)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        pytest.param(LLAMA, "int8", id="llama-int8"),
        pytest.param(LLAMA, "fp8", id="llama-fp8", marks=pytest.mark.slow),
        pytest.param(GEMMA2, "int8", id="gemma2-int8", marks=pytest.mark.slow),
        pytest.param(GEMMA2, "fp8", id="gemma2-fp8"),
    ],
)
def test_an_answer_depends_on_its_prompt_alone(config, name):
    """Alone, together, in chunks, from cached prefixes, and computed again after preemption."""
    llm = make_llm(config, kv_cache_dtype=name)
    alone = [tokens_of(generate(llm, [one]))[0] for one in PROMPTS]
    assert tokens_of(generate(llm, PROMPTS)) == alone
    again = generate(llm, PROMPTS[-1:])
    assert again[0].num_cached_tokens == 36 and tokens_of(again) == alone[-1:]
    small = make_llm(config, kv_cache_dtype=name, max_num_batched_tokens=8, num_gpu_blocks_override=20)
    assert tokens_of(generate(small, PROMPTS)) == alone
    assert small.llm_engine.scheduler.num_preemptions > 0
    small.llm_engine.scheduler.check()


@pytest.mark.parametrize("name", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_default_model_says_nearly_the_same(default_llm, name):
    texts = ["Once upon a time", "The sea was", "“My dear,” said"]
    fields = dict(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, num_gpu_blocks_override=32)
    rounded = jaxllm.LLM(kv_cache_dtype=name, use_tqdm_on_load=False, enforce_eager=True, **fields)
    answers, expected = (tokens_of(generate(llm, texts)) for llm in (rounded, default_llm))
    alike = [np.cumprod(np.equal(a, b)).sum() for a, b in zip(answers, expected, strict=True)]
    assert np.mean(alike) >= {"int8": 0.9, "fp8": 0.5}[name] * NUM_TOKENS


def test_running_out_of_pages_comes_later():
    """As many bytes hold more pages of 8 bits, scales included."""
    network = build(read_config(LLAMA), "bfloat16")
    of_bytes = {name: kv_pool.page_bytes(network, 32, kv_pool.kv_dtype(network, name)) for name in ("auto", "fp8")}
    assert of_bytes == {"auto": 2 * 2 * 2 * 32 * 8 * 2, "fp8": 2 * 2 * 2 * 32 * (8 + 4)}
    found = inspect(EngineConfig(model=LLAMA, dtype="bfloat16", kv_cache_dtype="fp8"))
    assert found.kv_bytes_per_token == of_bytes["fp8"] // 32


def test_default_page_size():
    """The one that the Hopper kernels take of 8 bits."""
    sizes = [make_llm(block_size=None, kv_cache_dtype=name).llm_engine.config.block_size for name in ("auto", "fp8")]
    assert sizes == [16, 32]


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_latent_pages_hold_floats(name):
    with pytest.raises(ValueError, match=rf"kv_cache_dtype must be auto.* for DeepseekV2ForCausalLM.*got '{name}'"):
        make_llm(DEEPSEEK, kv_cache_dtype=name)


def test_latent_pages_of_other_floats():
    exact, rounded = (
        tokens_of(generate(make_llm(DEEPSEEK, kv_cache_dtype=name), PROMPTS[-1:]))[0] for name in ("auto", "float16")
    )
    assert np.cumprod(np.equal(exact, rounded)).sum() > NUM_TOKENS / 2


def test_each_dtype_has_programs_of_its_own(monkeypatch):
    """No compiled program is found on disk for another dtype of KV."""
    seen = []
    monkeypatch.setattr(model_runner, "ProgramCache", lambda folder, ingredients, classes: seen.append(ingredients))
    for name in ("auto", "float16", "fp8", "int8"):
        runner = make_llm(kv_cache_dtype=name).llm_engine.runner
        runner._cache_folder = model_runner.use_persistent_cache()
        with monkeypatch.context() as patch:
            patch.setattr(model_runner, "_device_of", lambda params: type("Gpu", (), {"platform": "gpu"}))
            runner._programs()
    assert len({repr(ingredients) for ingredients in seen}) == 4
