"""Engines that the tests share. `sum_llm` answers with jaxllm.models.testing's running sums, known to plain Python."""

import pytest

import jaxllm
from jaxllm.models import testing


def make_sum_llm(**overrides) -> jaxllm.LLM:
    fields = dict(
        load_format="dummy",
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=64,
        use_tqdm_on_load=False,
    )
    return jaxllm.LLM(testing.config_dict(), **(fields | overrides))


@pytest.fixture(scope="session")
def sum_llm() -> jaxllm.LLM:
    return make_sum_llm()


@pytest.fixture(scope="session")
def default_llm() -> jaxllm.LLM:
    """The embedded model, with few shapes."""
    return jaxllm.LLM(max_model_len=512, max_num_seqs=16, max_num_batched_tokens=128, use_tqdm_on_load=False)
