"""Baichuan 1 and 2: rope and ALiBi, plain and normalized heads, told apart as the published configs differ."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import build, read_config  # noqa: E402
from jaxllm.models.layers.attention import alibi_slopes  # noqa: E402
from tests.models import references as ref  # noqa: E402

# The published configs, without keys of no effect on inference.
BAICHUAN2_13B_CHAT = {
    "architectures": ["BaichuanForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13696,
    "model_max_length": 4096,
    "model_type": "baichuan",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 125696,
}
BAICHUAN2_7B_CHAT = BAICHUAN2_13B_CHAT | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
BAICHUAN_13B_CHAT = BAICHUAN2_13B_CHAT | {"vocab_size": 64000}
BAICHUAN_7B = BAICHUAN2_7B_CHAT | {"architectures": ["BaiChuanForCausalLM"], "vocab_size": 64000}
del BAICHUAN_7B["model_max_length"]

TINY = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "torch_dtype": "float32",
    "vocab_size": 96,
}
VARIANTS = {  # a tiny vocabulary is version 1's: what that decides is overridden
    "2-13b": BAICHUAN2_13B_CHAT | TINY | {"norm_head": True},
    "2-7b": BAICHUAN2_7B_CHAT | TINY | {"norm_head": True},
    "13b": BAICHUAN_13B_CHAT | TINY | {"num_attention_heads": 4},
    "7b": BAICHUAN_7B | TINY,
}


def tensors_of(config):
    width, ffn = config["hidden_size"], config["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (width,),
            "self_attn.W_pack.weight": (3 * width, width),
            "self_attn.o_proj.weight": (width, width),
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (ffn, width),
            "mlp.up_proj.weight": (ffn, width),
            "mlp.down_proj.weight": (width, ffn),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return ref.random_tensors(shapes | {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)})


def slopes_of(num_heads):
    """Press et al.: from 2^(-8/n) on geometrically; else those of the nearest lower power of two, and then every other
    one of the next higher."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 / power * i) for i in range(1, power + 1)]
    return slopes if power == num_heads else slopes + slopes_of(2 * power)[::2][: num_heads - power]


def reference_of(config, weights):
    """Llama with one matrix for q, k and v; positions rotated in, or a linear penalty on the distance; the head's rows
    divided by their norm in version 2."""
    head_dim, eps = config["hidden_size"] // config["num_attention_heads"], config["rms_norm_eps"]
    rotates, norm_head = "max_position_embeddings" in config, config.get("norm_head", False)

    def logits(tokens, answer):
        x = weights["model.embed_tokens.weight"][tokens + answer]
        places = torch.arange(len(x))
        angles = places[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
        distance = places[None, :] - places[:, None]
        bias = torch.tensor(slopes_of(config["num_attention_heads"]))[:, None, None] * distance
        for i in range(config["num_hidden_layers"]):
            w = {name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in weights.items()}
            normed = ref.rms_norm(x, w["input_layernorm.weight"], eps)
            packed = normed @ w["self_attn.W_pack.weight"].T
            q, k, v = (ref.heads(part, head_dim) for part in packed.chunk(3, dim=-1))
            if rotates:
                attended = ref.attend(ref.rotate_halves(q, angles), ref.rotate_halves(k, angles), v)
            else:
                attended = ref.attend(q, k, v, bias=bias)
            x = x + attended @ w["self_attn.o_proj.weight"].T
            normed = ref.rms_norm(x, w["post_attention_layernorm.weight"], eps)
            gate, up = (normed @ w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T
        head = weights["lm_head.weight"]
        head = torch.nn.functional.normalize(head) if norm_head else head
        return (ref.rms_norm(x, weights["model.norm.weight"], eps) @ head.T).numpy()

    return logits


def test_the_reference_of_7b_is_llama_with_a_normalized_head():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = VARIANTS["2-7b"]
    weights = tensors_of(config)
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "vocab_size",
    )
    model = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in keys})).eval()
    renamed = {name: tensor for name, tensor in weights.items() if "W_pack" not in name}
    renamed["lm_head.weight"] = torch.nn.functional.normalize(renamed["lm_head.weight"])
    for i in range(config["num_hidden_layers"]):
        for letter, part in zip("qkv", weights[f"model.layers.{i}.self_attn.W_pack.weight"].chunk(3), strict=True):
            renamed[f"model.layers.{i}.self_attn.{letter}_proj.weight"] = part
    model.load_state_dict(renamed)
    tokens = ref.prompt(40, 96)
    ours, theirs = reference_of(config, weights)(tokens, []), ref.of_transformers(model)(tokens, [])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_alone(variant, tmp_path):
    config = VARIANTS[variant]
    weights = tensors_of(config)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    folder = ref.write_checkpoint(tmp_path, config, weights | (buffers if variant.endswith("7b") else {}))
    network, params = ref.open_checkpoint(folder)
    ref.check_alone(network, params, reference_of(config, weights), ref.prompt(21, 96))


def test_engine_with_the_head_named_in_overrides(tmp_path):
    config = VARIANTS["2-13b"]
    weights = tensors_of(config)
    written = {key: value for key, value in config.items() if key != "norm_head"}
    folder = ref.write_checkpoint(tmp_path, written, weights, shards=2)
    prompts = [ref.prompt(length, 96) for length in (20, 5, 33)]
    ref.check_engine(folder, reference_of(config, weights), prompts, hf_overrides={"norm_head": True})


def test_the_head_is_normalized_once_and_then_saved_so(tmp_path):
    from jaxllm.models.weights import save_checkpoint

    config = VARIANTS["2-7b"]
    folder = ref.write_checkpoint(tmp_path / "read", config, tensors_of(config))
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 4e-3)):
        network, params = ref.open_checkpoint(folder, dtype)
        norms = np.linalg.norm(np.asarray(params["lm_head"]["weight"], np.float32), axis=1)
        np.testing.assert_allclose(norms, 1, atol=tolerance)
        ref.write_checkpoint(tmp_path / dtype, config, {})
        save_checkpoint(network, params, tmp_path / dtype)
        again = ref.open_checkpoint(tmp_path / dtype, dtype)[1]["lm_head"]["weight"]
        np.testing.assert_allclose(
            np.asarray(again, np.float32), np.asarray(params["lm_head"]["weight"], np.float32), atol=tolerance
        )


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 32, 40, 56, 64])
def test_alibi_slopes(num_heads):
    np.testing.assert_allclose(alibi_slopes(num_heads), slopes_of(num_heads), rtol=1e-12)


def test_published_configs():
    configs = [BAICHUAN2_13B_CHAT, BAICHUAN2_7B_CHAT, BAICHUAN_13B_CHAT, BAICHUAN_7B]
    read = [read_config(config) for config in configs]
    assert [config.alibi for config in read] == [True, False, True, False]
    assert [config.rope is None for config in read] == [True, False, True, False]
    assert [config.norm_head for config in read] == [True, True, False, False]
    assert [config.max_model_len for config in read] == [4096] * 4
    assert build(read[0]).abstract_params["layers"]["39"]["attention"]["qkv"]["weight"].shape == (3 * 5120, 5120)


def test_overrides_win():
    config = read_config(BAICHUAN2_13B_CHAT | {"position_embedding": "rope", "norm_head": False})
    assert (config.alibi, config.rope.rotary_dim, config.norm_head) == (False, 128, False)
    assert read_config(BAICHUAN_7B | {"position_embedding": "alibi"}).rope is None


BAD = {
    "position": (
        {"position_embedding": "learned"},
        "position_embedding='learned' is not supported; allowed: rope, alibi",
    ),
    "head": ({"norm_head": 1}, "norm_head=1 must be true or false"),
    "length": ({"model_max_length": "4096"}, "model_max_length='4096' must be an integer"),
    "missing": ({"intermediate_size": None}, "intermediate_size is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(BAICHUAN2_13B_CHAT | changes)
