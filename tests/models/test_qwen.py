"""Qwen v1: as Qwen2 up to the length trained with, dynamic NTK and logn attention beyond it."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxllm.models import read_config  # noqa: E402
from tests.models import references as ref  # noqa: E402
from tests.models.stepping import Stepper  # noqa: E402

# The published config of Qwen-7B-Chat, without keys of no effect on inference.
QWEN_7B_CHAT = {
    "architectures": ["QWenLMHeadModel"],
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
}
FIRST_RELEASE = {  # other names for the same, and a shorter length
    "architectures": ["QWenLMHeadModel"],
    "ffn_hidden_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 32,
    "n_positions": 8192,
    "no_bias": True,
    "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16",
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
}
TINY = QWEN_7B_CHAT | {
    "fp32": True,
    "hidden_size": 32,
    "intermediate_size": 80,
    "kv_channels": 8,
    "max_position_embeddings": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "seq_length": 16,
    "vocab_size": 96,
}
VARIANTS = {
    "both": TINY,
    "ntk": TINY | {"use_logn_attn": False},
    "logn": TINY | {"use_dynamic_ntk": False},
    "biases, part of the head": TINY | {"no_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 500},
}


def tensors_of(config):
    width, ffn = config["hidden_size"], config["intermediate_size"] // 2
    shapes = {"transformer.wte.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "ln_1.weight": (width,),
            "attn.c_attn.weight": (3 * width, width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "ln_2.weight": (width,),
            "mlp.w1.weight": (ffn, width),
            "mlp.w2.weight": (ffn, width),
            "mlp.c_proj.weight": (width, ffn),
        }
        if not config["no_bias"]:
            layer |= {"attn.c_proj.bias": (width,), "mlp.w1.bias": (ffn,), "mlp.w2.bias": (ffn,)}
            layer |= {"mlp.c_proj.bias": (width,)}
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    head = {"transformer.ln_f.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}
    return ref.random_tensors(shapes | head)


def reference_of(config, weights):
    """From the technical report and the model card: the prompt's length chooses the rotation's base, for the answer
    too; a query at the n-th place is multiplied by log n to the base of the trained length, where that is above 1."""
    head_dim, trained, eps = config["kv_channels"], config["seq_length"], config["layer_norm_epsilon"]
    rotated = int(head_dim * config["rotary_pct"])

    def base_for(prompt_len):
        if not config["use_dynamic_ntk"]:
            return config["rotary_emb_base"]
        alpha = max(2 ** math.ceil(math.log(prompt_len / trained, 2) + 1) - 1, 1)
        return config["rotary_emb_base"] * alpha ** (rotated / (rotated - 2))

    def linear(x, w, name):
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def logits(tokens, answer):
        x = weights["transformer.wte.weight"][tokens + answer]
        places = torch.arange(len(x))
        angles = places[:, None] / base_for(len(tokens)) ** (torch.arange(0, rotated, 2) / rotated)
        logn = [math.log(n, trained) if config["use_logn_attn"] and n > trained else 1.0 for n in range(1, len(x) + 1)]

        def rotate(part):
            return torch.cat((ref.rotate_halves(part[..., :rotated], angles), part[..., rotated:]), dim=-1)

        for i in range(config["num_hidden_layers"]):
            w = {name.removeprefix(f"transformer.h.{i}."): tensor for name, tensor in weights.items()}
            packed = linear(ref.rms_norm(x, w["ln_1.weight"], eps), w, "attn.c_attn")
            q, k, v = (ref.heads(part, head_dim) for part in packed.chunk(3, dim=-1))
            attended = ref.attend(rotate(q) * torch.tensor(logn)[:, None, None], rotate(k), v)
            x = x + linear(attended, w, "attn.c_proj")
            normed = ref.rms_norm(x, w["ln_2.weight"], eps)
            gated = linear(normed, w, "mlp.w1") * torch.nn.functional.silu(linear(normed, w, "mlp.w2"))
            x = x + linear(gated, w, "mlp.c_proj")
        return (ref.rms_norm(x, weights["transformer.ln_f.weight"], eps) @ weights["lm_head.weight"].T).numpy()

    return logits


def test_the_reference_is_qwen2_up_to_the_trained_length():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = TINY | {"seq_length": 64}
    weights = tensors_of(config)
    keys = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    sizes = {key: config[key] for key in keys} | {"intermediate_size": 40, "num_key_value_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, rms_norm_eps=1e-6, tie_word_embeddings=False)).eval()
    names = {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "transformer.h.": "model.layers.",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_proj": "mlp.down_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.w1": "mlp.up_proj",
    }
    renamed = {}
    for name, tensor in weights.items():
        for theirs, qwen2 in names.items():
            name = name.replace(theirs, qwen2)
        parts = zip("qkv", tensor.chunk(3), strict=True) if "c_attn" in name else [("", tensor)]
        renamed |= {name.replace("attn.c_attn", f"self_attn.{letter}_proj"): part for letter, part in parts}
    model.load_state_dict(renamed)
    tokens = ref.prompt(64, 96)
    ours, theirs = reference_of(config, weights)(tokens, []), ref.of_transformers(model)(tokens, [])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert np.abs(reference_of(TINY, weights)(tokens, []) - theirs).max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_beyond_the_trained_length(variant, tmp_path):
    config = VARIANTS[variant]
    weights = tensors_of(config)
    network, params = ref.open_checkpoint(ref.write_checkpoint(tmp_path, config, weights))
    ref.check_alone(network, params, reference_of(config, weights), ref.prompt(35, 96))


def test_each_request_has_its_own_stretch(tmp_path):
    """A prompt that is longer than trained with, one that decoding takes there, and one of the next doubling; the
    first is recomputed after six tokens, as after preemption."""
    weights = tensors_of(TINY)
    network, params = ref.open_checkpoint(ref.write_checkpoint(tmp_path, TINY, weights))
    ref.check_batched(network, params, reference_of(TINY, weights), [ref.prompt(length, 96) for length in (14, 33, 17)])


def test_the_stretch_steps_up_at_each_doubling(tmp_path):
    weights = tensors_of(TINY)
    network, params = ref.open_checkpoint(ref.write_checkpoint(tmp_path, TINY, weights))
    reference = reference_of(TINY, weights)
    stepper = Stepper(network, params, num_pages=80)
    prompts = [ref.prompt(length, 96) for length in (15, 16, 17, 31, 32, 33, 64, 65)]
    rows = [stepper.add(tokens) for tokens in prompts]
    logits = stepper.step({row: len(tokens) for row, tokens in zip(rows, prompts, strict=True)})
    for row, tokens in zip(rows, prompts, strict=True):
        np.testing.assert_allclose(logits[row], reference(tokens, [])[-1], atol=ref.TOLERANCE)


def test_engine_with_prompts_that_begin_alike(tmp_path):
    """All are beginnings of one text. Beyond 16 tokens, what is cached of one is wrong for those of other lengths."""
    weights = tensors_of(TINY)
    reference = reference_of(TINY, weights)
    tokens = ref.prompt(70, 96)
    prompts = [tokens[:length] for length in (20, 12, 40, 70)]
    llm = ref.check_engine(ref.write_checkpoint(tmp_path, TINY, weights), reference, prompts)
    again = llm.generate(prompts[3], use_tqdm=False)[0]
    assert again.num_cached_tokens == 64


def test_published_configs():
    chat, first = read_config(QWEN_7B_CHAT), read_config(FIRST_RELEASE)
    assert (chat.intermediate_size, chat.head_dim, chat.rope.max_positions, chat.max_model_len) == (
        11008,
        128,
        8192,
        32768,
    )
    assert (chat.attention_bias, chat.attention_out_bias, chat.mlp_bias, chat.logn_attention) == (
        True,
        False,
        False,
        True,
    )
    assert (first.intermediate_size, first.rope.max_positions, first.max_model_len) == (11008, 2048, 8192)
    assert (first.hidden_size, first.num_hidden_layers, first.num_attention_heads) == (4096, 32, 32)
    dtypes = {None: "bfloat16", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    assert {flag: read_config(QWEN_7B_CHAT | {flag: True}).dtype for flag in dtypes} == dtypes
    assert [chat.kv_depends_on_prompt_len(length) for length in (8192, 8193)] == [False, True]
    assert not read_config(QWEN_7B_CHAT | {"use_dynamic_ntk": False}).kv_depends_on_prompt_len(8193)


BAD = {
    "missing": ({"intermediate_size": None}, "ffn_hidden_size is missing"),
    "odd": ({"intermediate_size": 81}, "intermediate_size=81 must be even"),
    "heads": ({"kv_channels": 64}, "kv_channels=64 times num_attention_heads=32 must be hidden_size=4096"),
    "scale": ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
    "text": ({"use_dynamic_ntk": "true"}, "use_dynamic_ntk='true' must be true or false"),
    "base": ({"rotary_emb_base": -1}, "rotary_emb_base=-1 must be a finite number"),
    "length": ({"seq_length": 0}, "seq_length=0 must be an integer >= 1"),
    "dtype": ({"torch_dtype": "int8"}, "dtype='int8' is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_errors(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read_config(QWEN_7B_CHAT | changes)
