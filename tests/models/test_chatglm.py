"""ChatGLM3 and GLM-4, as published and in transformers' layout."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import build, read_config  # noqa: E402
from tests.models import references as ref  # noqa: E402

# The published config of glm-4-9b-chat, without keys of no effect on inference.
GLM4_9B_CHAT = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1.5625e-07,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_layers": 40,
    "original_rope": True,
    "padded_vocab_size": 151552,
    "post_layer_norm": True,
    "rmsnorm": True,
    "rope_ratio": 500,
    "seq_length": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151552,
}
GLM4_9B_CHAT_1M = GLM4_9B_CHAT | {"multi_query_group_num": 4, "rope_ratio": 10000, "seq_length": 1048576}
CHATGLM3_6B = GLM4_9B_CHAT | {
    "layernorm_epsilon": 1e-05,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "seq_length": 8192,
    "torch_dtype": "float16",
}
for _key in ("num_hidden_layers", "rope_ratio", "vocab_size"):
    del CHATGLM3_6B[_key]
TINY = {
    "ffn_hidden_size": 40,
    "hidden_size": 32,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "padded_vocab_size": 96,
    "seq_length": 128,
    "torch_dtype": "float32",
    "vocab_size": 96,
}
TINY_GLM4 = GLM4_9B_CHAT | TINY
LAYER = "transformer.encoder.layers.{}."


def tensors_of(config):
    width, head_dim, ffn = config["hidden_size"], config["kv_channels"], config["ffn_hidden_size"]
    q = config["num_attention_heads"] * head_dim
    qkv = q + 2 * config["multi_query_group_num"] * head_dim
    shapes = {"transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], width)}
    for i in range(config["num_layers"]):
        layer = {
            "input_layernorm.weight": (width,),
            "self_attention.query_key_value.weight": (qkv, width),
            "self_attention.query_key_value.bias": (qkv,),
            "self_attention.dense.weight": (width, q),
            "post_attention_layernorm.weight": (width,),
            "mlp.dense_h_to_4h.weight": (2 * ffn, width),
            "mlp.dense_4h_to_h.weight": (width, ffn),
        }
        if config["add_bias_linear"]:
            layer |= {"self_attention.dense.bias": (width,), "mlp.dense_h_to_4h.bias": (2 * ffn,)}
            layer |= {"mlp.dense_4h_to_h.bias": (width,)}
        shapes |= {LAYER.format(i) + name: shape for name, shape in layer.items()}
    shapes["transformer.encoder.final_layernorm.weight"] = (width,)
    shapes["transformer.output_layer.weight"] = (config["padded_vocab_size"], width)
    return ref.random_tensors(shapes) | {"transformer.rotary_pos_emb.inv_freq": torch.ones(head_dim // 4)}


def reference_of(config, weights):
    """From the description of the family: pre-norm layers, RMSNorm, q, k and v in one biased matrix (k and v of a few
    groups), rotary positions on the first half of each head with neighbouring dimensions paired, SwiGLU."""
    head_dim, groups, eps = config["kv_channels"], config["multi_query_group_num"], config["layernorm_epsilon"]
    num_heads = config["num_attention_heads"]

    def linear(x, name):
        y = x @ weights[name + ".weight"].T
        return y + weights[name + ".bias"] if name + ".bias" in weights else y

    def rotate(x):
        half = head_dim // 2
        base = 10000 * config.get("rope_ratio", 1)
        angles = torch.arange(len(x))[:, None] / base ** (torch.arange(0, half, 2) / half)
        as_complex = torch.view_as_complex(x[..., :half].reshape(len(x), x.shape[1], half // 2, 2))
        turned = torch.view_as_real(as_complex * torch.polar(torch.ones_like(angles), angles)[:, None])
        return torch.cat((turned.flatten(-2), x[..., half:]), dim=-1)

    def logits(tokens, answer):
        x = weights["transformer.embedding.word_embeddings.weight"][tokens + answer]
        for i in range(config["num_layers"]):
            layer = LAYER.format(i)
            normed = ref.rms_norm(x, weights[layer + "input_layernorm.weight"], eps)
            merged = ref.heads(linear(normed, layer + "self_attention.query_key_value"), head_dim)
            q, k, v = merged.split((num_heads, groups, groups), dim=1)
            x = x + linear(ref.attend(rotate(q), rotate(k), v), layer + "self_attention.dense")
            normed = ref.rms_norm(x, weights[layer + "post_attention_layernorm.weight"], eps)
            gate, up = linear(normed, layer + "mlp.dense_h_to_4h").chunk(2, dim=-1)
            x = x + linear(torch.nn.functional.silu(gate) * up, layer + "mlp.dense_4h_to_h")
        x = ref.rms_norm(x, weights["transformer.encoder.final_layernorm.weight"], eps)
        return (x @ weights["transformer.output_layer.weight"].T).numpy()

    return logits


def in_transformers_layout(weights, config):
    """GlmForCausalLM's names for the same weights."""
    sizes = [config["num_attention_heads"], config["multi_query_group_num"], config["multi_query_group_num"]]
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("transformer.encoder.", "model.").replace("final_layernorm", "norm")
        name = name.replace("transformer.embedding.word_embeddings", "model.embed_tokens")
        name = name.replace("transformer.output_layer", "lm_head").replace("self_attention.dense", "self_attn.o_proj")
        name = name.replace("dense_h_to_4h", "gate_up_proj").replace("dense_4h_to_h", "down_proj")
        if "query_key_value" in name:
            parts = tensor.split([size * config["kv_channels"] for size in sizes])
            for letter, part in zip("qkv", parts, strict=True):
                renamed[name.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")] = part
        elif "rotary" not in name:
            renamed[name] = tensor
    return renamed


def glm_model(config):
    from transformers import GlmConfig, GlmForCausalLM

    return GlmForCausalLM(
        GlmConfig(
            vocab_size=config["padded_vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["multi_query_group_num"],
            head_dim=config["kv_channels"],
            max_position_embeddings=config["seq_length"],
            rms_norm_eps=config["layernorm_epsilon"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0 * config.get("rope_ratio", 1),
                "partial_rotary_factor": 0.5,
            },
            pad_token_id=None,
        )
    ).eval()


def test_the_reference_is_transformers_glm():
    weights = tensors_of(TINY_GLM4)
    model = glm_model(TINY_GLM4)
    model.load_state_dict(in_transformers_layout(weights, TINY_GLM4))
    tokens = ref.prompt(40, 96)
    ours, theirs = reference_of(TINY_GLM4, weights)(tokens, []), ref.of_transformers(model)(tokens, [])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


VARIANTS = {
    "glm4": TINY_GLM4,
    "glm4-1m, all biases": GLM4_9B_CHAT_1M
    | TINY
    | {"architectures": ["ChatGLMForConditionalGeneration"], "add_bias_linear": True},
    "chatglm3": CHATGLM3_6B | TINY,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_published(variant, tmp_path):
    config = VARIANTS[variant]
    weights = tensors_of(config)
    files = {"file_format": "bin", "shards": 3} if variant == "chatglm3" else {}
    network, params = ref.open_checkpoint(ref.write_checkpoint(tmp_path, config, weights, **files))
    reference = reference_of(config, weights)
    ref.check_alone(network, params, reference, ref.prompt(21, 96))
    if variant == "glm4":
        ref.check_batched(network, params, reference, [ref.prompt(length, 96) for length in (7, 18, 11)])


def test_engine(tmp_path):
    weights = tensors_of(TINY_GLM4)
    folder = ref.write_checkpoint(tmp_path, TINY_GLM4, weights)
    ref.check_engine(folder, reference_of(TINY_GLM4, weights), [ref.prompt(length, 96) for length in (20, 5, 33)])


def test_transformers_layout(tmp_path):
    model = ref.randomize(glm_model(TINY_GLM4))
    config = model.config.to_dict() | {"architectures": ["GlmForCausalLM"], "dtype": "float32"}
    network, params = ref.open_checkpoint(ref.write_checkpoint(tmp_path, config, model.state_dict()))
    reference = ref.of_transformers(model)
    ref.check_alone(network, params, reference, ref.prompt(21, 96))


def test_published_configs():
    glm4, million, chatglm3 = (read_config(config) for config in (GLM4_9B_CHAT, GLM4_9B_CHAT_1M, CHATGLM3_6B))
    assert (glm4.num_key_value_heads, glm4.head_dim, glm4.vocab_size, glm4.max_model_len) == (2, 128, 151552, 131072)
    assert (glm4.attention_bias, glm4.attention_out_bias, glm4.mlp_bias, glm4.dtype) == (True, False, False, "bfloat16")
    assert (glm4.rope.theta, glm4.rope.rotary_dim, glm4.rope.interleaved) == (5e6, 64, True)
    assert (million.num_key_value_heads, million.rope.theta, million.max_model_len) == (4, 1e8, 2**20)
    assert (chatglm3.num_hidden_layers, chatglm3.rope.theta, chatglm3.rms_norm_eps) == (28, 1e4, 1e-5)
    weights = build(glm4).abstract_params["layers"]["39"]
    assert weights["attention"]["qkv"]["weight"].shape == (4096 + 2 * 2 * 128, 4096)


def test_positions_divided_as_chatglm2_32k_does_by_an_override():
    scaling = {"type": "linear", "factor": 16}
    rope = read_config(CHATGLM3_6B | {"rope_ratio": 1, "rope_scaling": scaling}).rope
    assert (rope.rope_type, rope.factor, rope.theta, rope.rotary_dim) == ("linear", 16.0, 1e4, 64)


BAD = {
    "missing": ({"num_layers": None, "num_hidden_layers": None}, "num_layers is missing"),
    "family's name": ({"kv_channels": 0}, "kv_channels=0 must be an integer >= 1"),
    "rmsnorm": ({"rmsnorm": False}, "rmsnorm=False is not supported; allowed: True"),
    "no final norm": ({"post_layer_norm": False}, "post_layer_norm=False"),
    "residual": ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
    "quantized": ({"quantization_bit": 4}, "quantization_bit=4 is not supported; allowed: 0"),
    "prefix tuning": ({"pre_seq_len": 128}, "pre_seq_len=128"),
    "groups": ({"multi_query_group_num": 3}, "multi_query_group_num=3 must divide num_attention_heads=32"),
    "rope_ratio": ({"rope_ratio": "500"}, "rope_ratio='500' must be a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(GLM4_9B_CHAT | changes)
