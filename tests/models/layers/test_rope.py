import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import RopeConfig
from jaxllm.models.layers.rope import Rope, inverse_frequencies, rotate, sequence_lengths

SETTINGS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn_factor_from_lengths": {"original_max_position_embeddings": 512, "factor": None},
    "yarn_attention_factor": {"factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.5},
    "yarn_mscales": {
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_those_of_transformers(name, partial, theta):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from jaxllm.models import ModelConfig

    rope_type = name.split("_")[0]
    rope = {"rope_type": rope_type, "rope_theta": theta, "partial_rotary_factor": partial, **SETTINGS[name]}
    reference = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=dict(rope)
    )
    ours = ModelConfig.from_hf(reference.to_dict() | {"architectures": ["LlamaForCausalLM"]}).rope
    if rope_type == "default":
        dim = int(128 * partial)
        expected, factor = 1 / theta ** (torch.arange(0, dim, 2) / dim), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope_type](reference)
    np.testing.assert_allclose(inverse_frequencies(ours), expected.numpy(), rtol=5e-7)
    assert inverse_frequencies(ours).dtype == np.float32
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("seq_len", [10, 32, 33, 100])
def test_dynamic_frequencies_follow_each_tokens_sequence(seq_len):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    reference = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=32,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        )
    )
    positions = np.arange(seq_len)
    cos, sin = reference(torch.zeros(1), torch.tensor(positions)[None])
    rope = Rope(RopeConfig("dynamic", 10000.0, rotary_dim=16, max_positions=32, factor=2.0))
    # Beside tokens of other sequences, which have other frequencies.
    ours = rope(jnp.tile(jnp.asarray(positions), 2), jnp.repeat(jnp.asarray([seq_len, 500]), seq_len))
    np.testing.assert_allclose(ours[0][:seq_len], cos[0, :, :8].numpy(), atol=2e-5)
    np.testing.assert_allclose(ours[1][:seq_len], sin[0, :, :8].numpy(), atol=2e-5)
    assert seq_len == 10 or np.abs(ours[0][:seq_len] - ours[0][seq_len:]).max() > 0.1


def test_sequence_length_is_the_prompts_until_decoding_passes_it():
    lengths = sequence_lengths(jnp.array([0, 4, 5, 9]), jnp.array([5, 6]), jnp.array([0, 0, 0, 1]))
    np.testing.assert_array_equal(lengths, [5, 5, 6, 10])


def test_rotation_by_hand():
    x = jnp.arange(6, dtype=jnp.float32).reshape(1, 1, 6)  # pairs (0, 2) and (1, 3); 4 and 5 are beyond rotary_dim
    cos, sin = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])  # a quarter turn, none
    np.testing.assert_array_equal(rotate(x, cos, sin)[0, 0], [-2, 1, 0, 3, 4, 5])
    np.testing.assert_array_equal(rotate(x, cos, sin, interleaved=True)[0, 0], [-1, 0, 2, 3, 4, 5])  # (0, 1), (2, 3)
    assert rotate(x.astype(jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
