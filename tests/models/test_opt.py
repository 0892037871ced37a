"""OPT: the 125m layout (norms first) and that of 350m (norms after, projections), under every prefix of names."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import build, read_config  # noqa: E402
from tests.models import references as ref  # noqa: E402

# The published configs, without keys of no effect on inference.
OPT_125M = {
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "do_layer_norm_before": True,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "torch_dtype": "float16",
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
OPT_350M = OPT_125M | {
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "word_embed_proj_dim": 512,
}
TINY = {
    "ffn_dim": 48,
    "hidden_size": 32,
    "max_position_embeddings": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "word_embed_proj_dim": 32,
    "torch_dtype": "float32",
}
VARIANTS = {
    "125m": OPT_125M | TINY,
    "350m": OPT_350M | TINY | {"word_embed_proj_dim": 24},
    "no final norm": OPT_125M | TINY | {"_remove_final_layer_norm": True},
    "no biases, own head": OPT_125M | TINY | {"enable_bias": False, "tie_word_embeddings": False},
}


def model_of(config):
    from transformers import OPTConfig, OPTForCausalLM

    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    return ref.randomize(OPTForCausalLM(OPTConfig(**keys, dropout=0.0, pad_token_id=None)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_alone(variant, tmp_path):
    model = model_of(VARIANTS[variant])
    network, params = ref.open_checkpoint(ref.write_checkpoint(tmp_path, VARIANTS[variant], model.state_dict()))
    ref.check_alone(network, params, ref.of_transformers(model), ref.prompt(21, 96))


def test_engine_from_names_without_a_prefix(tmp_path):
    model = model_of(VARIANTS["350m"])
    tensors = {name.removeprefix("model."): tensor for name, tensor in model.model.state_dict().items()}
    del tensors["decoder.layers.0.fc1.bias"]  # this one alone has its full name
    tensors["model.decoder.layers.0.fc1.bias"] = model.model.decoder.layers[0].fc1.bias.detach()
    folder = ref.write_checkpoint(tmp_path, VARIANTS["350m"], tensors, file_format="bin")
    ref.check_engine(folder, ref.of_transformers(model), [ref.prompt(length, 96) for length in (20, 5, 33)])


def test_the_decoders_own_names(tmp_path):
    tensors = model_of(VARIANTS["125m"]).model.decoder.state_dict()
    _, params = ref.open_checkpoint(ref.write_checkpoint(tmp_path, VARIANTS["125m"], tensors))
    np.testing.assert_array_equal(params["layers"]["1"]["mlp"]["up"]["weight"], tensors["layers.1.fc1.weight"].numpy())


def test_published_configs():
    small, medium = read_config(OPT_125M), read_config(OPT_350M)
    assert (small.norm_first, small.final_norm, small.embedding_size, small.tie_word_embeddings) == (
        True,
        True,
        768,
        True,
    )
    assert (medium.norm_first, medium.final_norm, medium.embedding_size) == (False, False, 512)
    assert small.max_model_len == 2048 and small.rope is None and not small.kv_depends_on_prompt_len(2000)
    params = build(medium).abstract_params
    assert params["positions"]["weight"].shape == (2050, 1024) and params["embed"]["weight"].shape == (50272, 512)
    assert params["project_in"]["weight"].shape == (1024, 512) and "norm" not in params


BAD = {
    "missing": ({"ffn_dim": None}, "ffn_dim is missing"),
    "activation": ({"activation_function": "mish"}, "activation_function='mish' is not supported; allowed: silu"),
    "no affine norms": ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    "text": ({"do_layer_norm_before": "yes"}, "do_layer_norm_before='yes' must be true or false"),
    "projection": ({"word_embed_proj_dim": -1}, "word_embed_proj_dim=-1 must be an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(OPT_125M | changes)
