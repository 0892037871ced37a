"""Dynamic rope in the engine: longer than trained, and no cached page for a prompt of another length."""

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.models import ModelConfig
from tests.checkpoints import TINY_LLAMA

CONFIG = TINY_LLAMA | {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "initializer_range": 0.3}


def with_rope(rope_type, max_positions=16, **settings):
    return CONFIG | {"max_position_embeddings": max_positions, "rope_scaling": {"rope_type": rope_type, **settings}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (with_rope("default"), 16),
        (with_rope("linear", factor=4.0), 64),
        (with_rope("dynamic", factor=2.5), 40),
        (with_rope("yarn", factor=4.0), 64),
        (with_rope("yarn", 64, factor=4.0, original_max_position_embeddings=16), 64),
        (with_rope("llama3", 64, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16), 64),
    ],
)  # fmt: skip
def test_the_longest_sequence(config, expected):
    assert ModelConfig.from_hf(config).max_model_len == expected


def test_lengths_on_which_keys_depend():
    dynamic = ModelConfig.from_hf(with_rope("dynamic", factor=4.0)).rope
    assert [dynamic.kv_depends_on_prompt_len(length) for length in (1, 16, 17, 60)] == [False, False, True, True]
    assert not ModelConfig.from_hf(with_rope("linear", factor=4.0)).rope.kv_depends_on_prompt_len(60)


def test_prompts_that_begin_alike_answer_as_without_a_cache():
    def answers(caching):
        llm = LLM(
            with_rope("dynamic", factor=4.0),
            load_format="dummy",
            enable_prefix_caching=caching,
            block_size=4,
            max_num_seqs=1,
            max_num_batched_tokens=64,
            num_gpu_blocks_override=40,
            use_tqdm_on_load=False,
        )
        prompt = [(7 * i * i + i) % 96 for i in range(50)]
        prompts = [prompt[:length] for length in (8, 14, 16, 20, 30, 50, 50)]
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
        outputs = [llm.generate([one], params, use_tqdm=False)[0] for one in prompts]
        logprobs = [output.outputs[0].cumulative_logprob for output in outputs]
        return [output.outputs[0].token_ids for output in outputs], logprobs, [one.num_cached_tokens for one in outputs]

    (tokens, logprobs, cached), (expected, expected_logprobs, _) = answers(True), answers(False)
    assert tokens == expected and logprobs == pytest.approx(expected_logprobs, abs=1e-3)
    # Up to the trained length prompts share pages; beyond it only those of equal length do.
    assert cached == [0, 8, 12, 0, 0, 0, 48]
