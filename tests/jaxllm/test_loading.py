"""From a folder, an id or weights in memory to a working LLM; and what is said when that cannot be."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm
from jaxllm import LLM, SamplingParams
from jaxllm.config import EngineConfig
from jaxllm.loading import DEFAULT_MODEL, open_checkpoint, sampling_defaults
from jaxllm.models import CheckpointError, ModelConfig, build, hub, registry, save_checkpoint, testing
from jaxllm.models.layers.embed import Embed
from jaxllm.models.layers.param import normal
from tests.checkpoints import TINY_LLAMA
from tests.tokenizer_folders import write_ranks

TINY = {**TINY_LLAMA, "architectures": ["LlamaForCausalLM"], "dtype": "float32", "initializer_range": 0.3}
ENGINE = dict(max_num_seqs=1, max_num_batched_tokens=16, num_gpu_blocks_override=16, use_tqdm_on_load=False)
IDS = dict(skip_tokenizer_init=True, **ENGINE)
PROMPT = [3, 1, 4, 1, 5]


def greedy(llm, prompt=PROMPT, max_tokens=6, **fields) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, **fields)
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids


def write_json(path, content) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def params():
    return build(ModelConfig.from_hf(TINY), "float32").init(jax.random.key(1))


@pytest.fixture(scope="module")
def expected(params) -> list[int]:
    """What the tiny Llama answers, its weights given in memory."""
    return greedy(LLM(TINY, params=params, **ENGINE))


@pytest.fixture
def folder(tmp_path, params):
    """A checkpoint without a tokenizer."""
    save_checkpoint(build(ModelConfig.from_hf(TINY), "float32"), params, tmp_path)
    write_json(tmp_path / "config.json", TINY)
    return tmp_path


def sum_folder(folder, generation=None, **config):
    """A checkpoint whose answers plain Python knows, to be loaded with load_format="dummy"."""
    write_json(folder / "config.json", testing.config_dict(**config))
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    return str(folder)


# --- the checkpoint's files


def test_folder_and_memory_are_the_same(folder, expected):
    assert greedy(LLM(str(folder), **IDS)) == greedy(LLM(folder, **IDS)) == expected


@pytest.mark.parametrize("architectures", [["T5ForConditionalGeneration"], ["LLamaForCausalLM"]])
def test_an_unsupported_architecture_lists_the_supported(folder, architectures):
    write_json(folder / "config.json", TINY | {"architectures": architectures})
    with pytest.raises(ValueError, match=f"{architectures[0]}.*Supported: .*LlamaForCausalLM"):
        LLM(str(folder), **IDS)


RERANKER = TINY | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
ACTIVATION = "sbert_ce_default_activation_function"


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({}, "sigmoid"),
        ({ACTIVATION: "torch.nn.modules.linear.Identity"}, "none"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "none"),
        ({"problem_type": "regression", ACTIVATION: "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
    ],
)
def test_a_reranker_s_scores_are_of_the_activation_that_it_names(fields, activation):
    llm = LLM(RERANKER | fields, load_format="dummy", **IDS)
    raw = llm.encode([PROMPT], {"use_activation": False}, use_tqdm=False)[0].outputs.data
    expected = raw if activation == "none" else 1 / (1 + np.exp(-raw))
    np.testing.assert_allclose(llm.classify([PROMPT], use_tqdm=False)[0].outputs.probs, expected, atol=1e-6)
    assert abs(raw[0] - 1 / (1 + np.exp(-raw[0]))) > 1e-4  # or the test would see no difference


def test_an_unknown_activation_is_refused_where_it_matters():
    unknown = {ACTIVATION: "torch.nn.modules.activation.Tanh"}
    with pytest.raises(ValueError, match=rf"{ACTIVATION}='torch.*Tanh' is not supported; allowed: Identity, Sigmoid"):
        LLM(RERANKER | unknown, load_format="dummy", **IDS)
    assert len(greedy(LLM(TINY | unknown, load_format="dummy", **IDS), max_tokens=2)) == 2


def test_a_config_without_an_architecture(folder):
    write_json(folder / "config.json", {key: TINY[key] for key in TINY if key != "architectures"})
    with pytest.raises(ValueError, match=r"architectures=None must be a list.*LlamaForCausalLM"):
        LLM(str(folder), **IDS)


@pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("[1]", "must hold a JSON object")])
def test_broken_json(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model: .*config\.json {message}"):
        LLM(str(folder), **IDS)


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"without a config\.json"):
        LLM(str(tmp_path), **IDS)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: looked for model\.safetensors.*it holds config\.json"):
        LLM(str(folder), **IDS)


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        LLM(str(folder), **IDS)


def test_all_wrong_shapes_at_once(folder):
    write_json(folder / "config.json", TINY | {"intermediate_size": 40})
    with pytest.raises(CheckpointError) as error:
        LLM(str(folder), **IDS)
    for name, shapes in (("gate", "[40, 32], found [48, 32]"), ("down", "[32, 40], found [32, 48]")):
        for layer in (0, 1):
            problem = f"model.layers.{layer}.mlp.{name}_proj.weight in model.safetensors: expected shape {shapes}"
            assert problem in str(error.value)


def test_missing_and_unused_tensors(folder):
    write_json(folder / "config.json", TINY | {"num_hidden_layers": 1, "attention_bias": True})
    with pytest.raises(CheckpointError, match=r"(?s)missing: model\.layers\.0\.self_attn\.q_proj\.bias.*unused: model"):
        LLM(str(folder), **IDS)


def test_a_hub_id_without_a_network():
    with pytest.raises(FileNotFoundError) as error:
        LLM("nobody/no-such-model", revision="v1")
    for words in ("model='nobody/no-such-model'", "Hugging Face hub at revision 'v1' failed", "path of its folder"):
        assert words in str(error.value)


def test_an_unknown_policy_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"scheduling_policy.*'lifo'"):
        LLM("nobody/no-such-model", scheduling_policy="lifo")


# --- what replaces the checkpoint's own


def test_hf_overrides(folder, expected):
    write_json(folder / "config.json", TINY | {"rms_norm_eps": 0.5})
    assert greedy(LLM(str(folder), hf_overrides={"rms_norm_eps": 1e-5}, **IDS)) == expected
    llm = LLM(str(folder), hf_overrides={"max_position_embeddings": 32}, enforce_eager=True, **IDS)
    assert llm.llm_engine.config.max_model_len == 32
    with pytest.raises(ValueError, match=r"hidden_act='no' is not supported"):
        LLM(str(folder), hf_overrides={"hidden_act": "no"}, **IDS)
    with pytest.raises(ValueError, match=r"hf_overrides must be a dict of config\.json's keys, got \['a'\]"):
        LLM(str(folder), hf_overrides=["a"], **IDS)


def test_dummy_weights_depend_on_the_seed(tmp_path):
    write_json(tmp_path / "config.json", TINY)  # and no weights

    def answer(seed):
        return greedy(LLM(str(tmp_path), load_format="dummy", seed=seed, **IDS))

    assert answer(0) == answer(0) != answer(1)


def test_a_config_in_memory_needs_weights():
    with pytest.raises(ValueError, match=r'pass params=, or load_format="dummy"'):
        LLM(TINY, **ENGINE)


def test_all_problems_with_weights_in_memory_at_once(params):
    wrong = {**params, "extra": np.zeros(3), "norm": {"weight": jnp.zeros(31)}}
    wrong["embed"] = {"weight": params["embed"]["weight"].astype(jnp.bfloat16)}
    wrong["layers"] = {"0": params["layers"]["0"]}
    with pytest.raises(CheckpointError) as error:
        LLM(TINY, params=wrong, **ENGINE)
    for problem in (
        "unused: extra",
        "norm.weight: expected float32 [32], found float32 [31]",
        "embed.weight: expected float32 [96, 32], found bfloat16 [96, 32]",
        "missing: layers.1.attention.qkv.weight, expected float32 [64, 32]",
    ):
        assert problem in str(error.value)
    with pytest.raises(CheckpointError, match="nested dict of arrays, not a list"):
        LLM(TINY, params=[1], **ENGINE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_nearly_the_same(folder, expected, dtype):
    whole = LLM(str(folder), **IDS).generate([PROMPT], {"temperature": 0, "logprobs": 20}, use_tqdm=False)
    half = LLM(str(folder), dtype=dtype, **IDS)
    runner = half.llm_engine.runner
    assert {array.dtype.name for array in jax.tree.leaves((runner.params, runner._kv))} == {dtype}
    output = half.generate([PROMPT], {"temperature": 0, "logprobs": 20}, use_tqdm=False)
    first, reference = output[0].outputs[0].logprobs[0], whole[0].outputs[0].logprobs[0]
    both = first.keys() & reference.keys()
    assert len(both) > 15
    np.testing.assert_allclose([first[i].logprob for i in both], [reference[i].logprob for i in both], atol=0.15)


# --- tokenizers


def test_without_a_tokenizer_the_remedies_are_named(folder):
    with pytest.raises(ValueError, match=r"(?s)tokenizer: .*Pass tokenizer=.*or skip_tokenizer_init=True"):
        LLM(str(folder), **ENGINE)


def test_skip_tokenizer_init(folder, expected):
    llm = LLM(str(folder), **IDS)
    assert llm.get_tokenizer() is None and greedy(llm) == expected
    with pytest.raises(ValueError, match=r"prompt is text, but .*no tokenizer \(skip_tokenizer_init\): pass token ids"):
        llm.generate("some text")
    output = llm.generate([PROMPT], {"temperature": 0, "max_tokens": 2, "logprobs": 1}, use_tqdm=False)[0].outputs[0]
    assert output.text == "" and all(one.decoded_token is None for entry in output.logprobs for one in entry.values())


def test_a_tokenizer_from_elsewhere(folder, tmp_path_factory):
    """A folder that holds a tokenizer and nothing else, and a tokenizer object."""
    alone = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEFAULT_MODEL / name, alone)
    vocabulary = {"vocab_size": 4096}
    llm = LLM(str(folder), str(alone), load_format="dummy", hf_overrides=vocabulary, **ENGINE)
    tokenizer = llm.get_tokenizer()
    output = llm.generate("The sea", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)[0]
    assert output.prompt_token_ids == tokenizer.encode("The sea")
    assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
    fits = dict(load_format="dummy", hf_overrides=vocabulary, enforce_eager=True)
    other = LLM(str(folder), tokenizer, **fits, **ENGINE)
    assert other.get_tokenizer() is tokenizer
    with pytest.raises(FileNotFoundError, match="nobody/no-such-tokenizer"):
        LLM(str(folder), "nobody/no-such-tokenizer", **ENGINE)


def test_another_model_s_tokenizer_is_refused_before_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tokenizer: .* beyond the model's vocabulary \(vocab_size=96\)"):
        LLM(str(folder), str(DEFAULT_MODEL), **ENGINE)


def test_of_a_tokenizer_s_repository_no_weights_are_fetched(folder, monkeypatch):
    asked, resolve = [], hub.resolve

    def recording(name, *arguments, **options):
        asked.append((str(name), options.get("tokenizer_only", False)))
        return resolve(DEFAULT_MODEL if name == "some/tokenizer" else name, *arguments, **options)

    monkeypatch.setattr(hub, "resolve", recording)
    fits = dict(load_format="dummy", hf_overrides={"vocab_size": 4096}, enforce_eager=True)
    LLM(str(folder), "some/tokenizer", **fits, **ENGINE)
    assert asked[:2] == [(str(folder), False), ("some/tokenizer", True)]


# --- end of sequence, and sampling defaults


def test_the_end_of_a_turn_ends_an_answer(tmp_path):
    """In Qwen v1's chat format, which its generation_config.json does not say."""
    write_ranks(tmp_path / "qwen.tiktoken", {bytes([byte]): byte for byte in range(256)})
    model = sum_folder(tmp_path, {"eos_token_id": [256]}, model_type="qwen", vocab_size=512)
    llm = LLM(model, load_format="dummy", enforce_eager=True, **ENGINE)
    assert llm.llm_engine.eos_token_ids == (256, 258)
    prompt = llm.llm_engine.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_end_tokens_of_both_files(tmp_path):
    config = EngineConfig(model=sum_folder(tmp_path, {"eos_token_id": [9, 7]}, eos_token_id=8))
    assert open_checkpoint(config).eos_token_ids == [9, 7, 8]
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 8})
    assert open_checkpoint(config).eos_token_ids == [8]
    (tmp_path / "generation_config.json").unlink()
    assert open_checkpoint(config).eos_token_ids == [8]


def test_every_end_token_ends_an_answer(tmp_path):
    whole = testing.continuation(PROMPT, 20)
    first, second = whole[4], next(token for token in whole[6:] if token not in whole[:6])
    llm = LLM(sum_folder(tmp_path, {"eos_token_id": [first]}, eos_token_id=second), load_format="dummy", **IDS)
    for prompt, end, reason in ((PROMPT, first, None), (PROMPT + whole[:5], second, second)):
        tokens = testing.continuation(prompt, 20)
        output = llm.generate([prompt], {"temperature": 0, "max_tokens": 20}, use_tqdm=False)[0].outputs[0]
        assert output.token_ids == tokens[: tokens.index(end) + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", reason)
    assert greedy(llm, max_tokens=20, ignore_eos=True) == whole


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.0}, {"temperature": 0.6,
          "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.0}),
        ({"do_sample": True, "temperature": None, "max_new_tokens": 99}, {"max_tokens": 99}),
        ({"do_sample": False, "temperature": 0.6, "max_new_tokens": 99}, {"temperature": 0.0, "max_tokens": 99}),
    ],
)  # fmt: skip
def test_generation_config_gives_the_defaults(generation, expected):
    assert sampling_defaults(generation) == expected


def test_generation_config_can_be_overridden(tmp_path):
    model = str(sum_folder(tmp_path, {"temperature": 0.5, "top_k": 3}))
    overrides = {"temperature": 0.25, "eos_token_id": 9}
    options = dict(load_format="dummy", override_generation_config=overrides, enforce_eager=True, **IDS)
    llm = LLM(model, **options)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25, top_k=3)
    assert 9 in llm.llm_engine.eos_token_ids
    llm = LLM(model, generation_config="vllm", **options)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25)
    with pytest.raises(
        ValueError, match=r"override_generation_config must be a dict of generation_config\.json's keys"
    ):
        LLM(model, override_generation_config=["top_k"], **IDS)


def test_generation_config_can_be_left_out(tmp_path):
    model = sum_folder(tmp_path, {"do_sample": False, "max_new_tokens": 3})
    llm = LLM(model, load_format="dummy", generation_config="vllm", **IDS)
    assert llm.get_default_sampling_params() == SamplingParams()


def test_generate_without_params_uses_the_defaults(tmp_path):
    llm = LLM(sum_folder(tmp_path, {"do_sample": False, "max_new_tokens": 3}), load_format="dummy", **IDS)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=3)
    output = llm.generate([PROMPT], use_tqdm=False)[0].outputs[0]
    assert output.token_ids == testing.continuation(PROMPT, 3)


# --- other people's models


class CountsUp(nnx.Module):
    """Someone else's model: the token after t is t + 3. It has no use for its one layer's KV."""

    weight_names = (("counter", "embed"),)
    ignored_weights = ()

    def __init__(self, config, dtype):
        self.config = config
        self.embed = Embed(config.vocab_size, config.hidden_size, dtype=dtype, initializer=normal(0.02))

    def __call__(self, kv, batch):
        following = (batch.token_ids + 3) % self.config.vocab_size
        return jnp.broadcast_to(following[:, None].astype(jnp.float32), (len(following), self.config.hidden_size)), kv

    def logits(self, hidden):
        return -jnp.abs(hidden[:, :1] - jnp.arange(self.config.vocab_size, dtype=jnp.float32))

    def kv_shapes(self, num_pages, page_size):
        return (((num_pages, 1, page_size, 1),) * 2,)


def test_a_model_registered_from_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    config = testing.config_dict(architectures=["CountsUp"], dtype="float32")
    with pytest.raises(ValueError, match="'CountsUp' is not supported"):
        LLM(config, load_format="dummy", **ENGINE)
    jaxllm.register_model("CountsUp", CountsUp)
    assert greedy(LLM(config, load_format="dummy", **ENGINE)) == [8, 11, 14, 17, 20, 23]
    network = build(ModelConfig.from_hf(config))
    save_checkpoint(network, network.init(jax.random.key(0)), tmp_path)
    write_json(tmp_path / "config.json", config)
    assert greedy(LLM(str(tmp_path), **IDS), [31]) == [2, 5, 8, 11, 14, 17]
