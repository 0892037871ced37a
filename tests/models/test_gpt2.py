"""GPT-2: matrices stored the other way round, old names with and without their prefix, causal masks in the file."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import build, read_config  # noqa: E402
from jaxllm.models.checkpoint_files import CheckpointError  # noqa: E402
from jaxllm.models.weights import load_params, save_checkpoint  # noqa: E402
from tests.models import references as ref  # noqa: E402

# The published config, without keys of no effect on inference.
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
TINY = GPT2 | {"n_ctx": 96, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 96, "vocab_size": 97}
VARIANTS = {
    "published": TINY,
    "narrow, own head": TINY | {"n_inner": 40, "tie_word_embeddings": False, "activation_function": "relu"},
}


def model_of(config):
    from transformers import GPT2Config, GPT2LMHeadModel

    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "n_ctx")}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return ref.randomize(GPT2LMHeadModel(GPT2Config(**keys, **dropouts)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_alone(variant, tmp_path):
    model = model_of(VARIANTS[variant])
    network, params = ref.open_checkpoint(ref.write_checkpoint(tmp_path, VARIANTS[variant], model.state_dict()))
    ref.check_alone(network, params, ref.of_transformers(model), ref.prompt(21, 97))


@pytest.fixture
def as_published(tmp_path):
    """(model, folder): no prefix, no head, and the causal mask in each layer."""
    model = model_of(TINY)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 96, 96).tril() for i in range(2)}
    return model, ref.write_checkpoint(tmp_path / "gpt2", TINY, tensors)


def test_engine(as_published):
    model, folder = as_published
    ref.check_engine(folder, ref.of_transformers(model), [ref.prompt(length, 97) for length in (20, 5, 33)])


def test_saved_as_it_was_read(as_published, tmp_path):
    model, folder = as_published
    network, params = ref.open_checkpoint(folder)
    save_checkpoint(network, params, tmp_path / "saved")
    from safetensors.numpy import load_file

    saved = load_file(tmp_path / "saved" / "model.safetensors")
    expected = model.transformer.h[0].attn.c_attn.weight.detach().numpy()
    assert expected.shape == (32, 96)
    np.testing.assert_array_equal(saved["transformer.h.0.attn.c_attn.weight"], expected)


def test_a_matrix_the_usual_way_round_is_refused(tmp_path):
    tensors = model_of(TINY).state_dict()
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].T
    folder = ref.write_checkpoint(tmp_path, TINY, tensors)
    with pytest.raises(
        CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight .*expected shape \[32, 128\], found \[128, 32\]"
    ):
        load_params(build(read_config(TINY)), folder, progress=False)


def test_published_config():
    config = read_config(GPT2)
    assert (config.intermediate_size, config.head_dim, config.max_model_len, config.rope) == (3072, 64, 1024, None)
    assert (config.hidden_act, config.tie_word_embeddings, config.rms_norm_eps) == ("gelu_new", True, 1e-5)


BAD = {
    "missing": ({"n_embd": None}, "n_embd is missing"),
    "zero": ({"n_layer": 0}, "n_layer=0 must be an integer >= 1"),
    "heads": ({"n_head": 5}, "n_embd=768 must be a multiple of n_head=5"),
    "layer scale": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention=True is not supported; allowed: False"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(GPT2 | changes)
