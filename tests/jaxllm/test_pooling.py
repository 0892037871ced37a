"""Embeddings, classes and scores: transformers' values, whatever the chunks and batch mates."""

import json

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.pooling import PoolerConfig, PoolingParams, problem_type_of
from jaxllm.runner.pooling import span
from tests.jaxllm.conftest import make_sum_llm

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
# Chunks of 16 tokens: whole prompts, several chunks, a last chunk of a single token, a prompt of one.
ENGINE = dict(max_num_seqs=4, max_num_batched_tokens=16, num_gpu_blocks_override=32, block_size=4, enforce_eager=True)
LENGTHS = (5, 17, 40, 1, 33)


def prompts() -> list[list[int]]:
    return [np.random.default_rng(n).integers(1, 96, n).tolist() for n in LENGTHS]


def save(model, folder, **config):
    """`config` is added to config.json."""
    from tests.models.references import randomize

    randomize(model).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def open_llm(folder, **options) -> LLM:
    return LLM(str(folder), skip_tokenizer_init=True, use_tqdm_on_load=False, **ENGINE | options)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """An LLM and transformers' hidden states [T, D] of each of the prompts."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    folder = save(model, tmp_path_factory.mktemp("llama"))
    with torch.no_grad():
        hidden = [model.model(torch.tensor([one])).last_hidden_state[0].numpy() for one in prompts()]
    return open_llm(folder), hidden


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("pooling", "reference"),
    [("mean", lambda hidden: hidden.mean(0)), ("last", lambda hidden: hidden[-1]), ("cls", lambda hidden: hidden[0])],
)
def test_embeddings_are_transformers(embedder, monkeypatch, pooling, reference):
    llm, hidden = embedder
    monkeypatch.setattr(llm.llm_engine, "_pooler", PoolerConfig(pooling, use_activation=False))
    outputs = llm.embed(prompts(), use_tqdm=False)
    for output, ids, states in zip(outputs, prompts(), hidden, strict=True):
        np.testing.assert_allclose(output.outputs.embedding, reference(states), atol=2e-5)
        assert output.prompt_token_ids == ids and output.finished and output.outputs.hidden_size == 32
    normal = llm.embed(prompts()[1], {"use_activation": True}, use_tqdm=False)[0].outputs.embedding
    np.testing.assert_allclose(normal, unit(reference(hidden[1])), atol=2e-5)
    short = llm.embed(prompts()[1], PoolingParams(dimensions=8, use_activation=True), use_tqdm=False)[0]
    np.testing.assert_allclose(short.outputs.embedding, unit(reference(hidden[1])[:8]), atol=2e-5)


def test_each_token_s_embedding(embedder):
    """In chunks, beside prompts that become one vector."""
    llm, hidden = embedder
    mean = llm.llm_engine.prepare_pooling(prompts()[4], PoolingParams(task="embed"))
    llm.llm_engine.add_pooling_request("one vector", mean)
    outputs = llm.encode(prompts(), {"use_activation": False}, use_tqdm=False, pooling_task="token_embed")
    for output, states in zip(outputs, hidden, strict=True):
        assert output.outputs.data.dtype == np.float32
        np.testing.assert_allclose(output.outputs.data, states, atol=2e-5)
    normal = llm.encode(prompts()[2], PoolingParams(task="token_embed", dimensions=8), use_tqdm=False)[0].outputs.data
    np.testing.assert_allclose(normal, [unit(one[:8]) for one in hidden[2]], atol=2e-5)


def test_embeddings_beside_generation(embedder):
    llm, hidden = embedder
    greedy = SamplingParams(temperature=0, max_tokens=20)
    alone = llm.generate(prompts()[2], greedy, use_tqdm=False)[0].outputs[0].token_ids
    stream = llm.stream(prompts()[2], greedy)
    next(stream)
    (vector,) = llm.encode(prompts()[4], use_tqdm=False)
    assert [output for output in stream][-1].outputs[0].token_ids == alone
    np.testing.assert_allclose(vector.outputs.data, unit(hidden[4][-1]), atol=2e-5)
    np.testing.assert_allclose(vector.outputs.embedding, vector.outputs.data)
    llm.llm_engine.scheduler.check()


@pytest.mark.parametrize("task", ["embed", "token_embed"])
def test_a_preempted_prompt_is_pooled_once(embedder, task):
    """An answer grows into the pages that the prompt needs: it gives its own up in the middle and begins again."""
    llm, hidden = embedder
    tight = LLM(
        llm.config.model, skip_tokenizer_init=True, use_tqdm_on_load=False,
        **ENGINE | dict(num_gpu_blocks_override=12, max_model_len=48, async_scheduling=False, num_scheduler_steps=1),
    )  # fmt: skip
    expected = hidden[2] if task == "token_embed" else hidden[2][-1]
    for steps in range(1, 9):
        tight.llm_engine.add_request("a", prompts()[0], SamplingParams(temperature=0, max_tokens=40))
        for _ in range(steps):
            tight.llm_engine.step()
        (output,) = tight.encode(prompts()[2], {"use_activation": False}, pooling_task=task, use_tqdm=False)
        np.testing.assert_allclose(output.outputs.data, expected, atol=2e-5)
        tight.llm_engine.abort_request("a")
    assert tight.llm_engine.scheduler.num_preemptions > 0


def test_score_is_the_cosine(embedder, monkeypatch):
    llm, hidden = embedder
    texts = dict(zip("abcde", prompts(), strict=True))
    monkeypatch.setattr(llm.llm_engine, "tokenize", lambda given: [texts[one] for one in given])
    expected = [unit(hidden[0][-1]) @ unit(one[-1]) for one in hidden]
    scores = [one.outputs.score for one in llm.score("a", list("abcde"), use_tqdm=False)]
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert scores[0] == pytest.approx(1, abs=1e-5)
    (one,) = llm.score("a", "b", pooling_params={"dimensions": 8}, use_tqdm=False)
    assert one.outputs.score == pytest.approx(unit(hidden[0][-1][:8]) @ unit(hidden[1][-1][:8]), abs=1e-5)
    (one,) = llm.score("b", "a", use_tqdm=False)
    assert one.outputs.score == pytest.approx(scores[1], abs=1e-6)
    with pytest.raises(ValueError, match="data_1 has 2 texts and data_2 3"):
        llm.score(["a", "b"], ["a", "b", "c"])


MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, decoder_sparse_step=1)
DEEPSEEK = dict(
    num_key_value_heads=4, first_k_dense_replace=1, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": dict(query_pre_attn_scalar=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    "Mistral": dict(sliding_window=None),
    "Phi3": {},
    "Qwen3": {},
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "Qwen2Moe": dict(num_experts=4, **MOE),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1),
    "OPT": dict(num_key_value_heads=4, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False, dropout=0.0),
    "Glm": dict(partial_rotary_factor=0.5),
    "DeepseekV2": dict(**DEEPSEEK, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy"),
    "DeepseekV3": dict(**DEEPSEEK, q_lora_rank=16, n_group=2, topk_group=1, scoring_func="sigmoid", head_dim=4),
    "Gemma3Text": dict(query_pre_attn_scalar=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
}
SLOW = set(FAMILIES) - {"Llama", "Qwen2", "Gemma2"}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES]
)
def test_classes_are_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    config_class = getattr(transformers, family.removesuffix("Text") + ("TextConfig" if "Text" in family else "Config"))
    tiny = TINY if family != "GPT2" else {"vocab_size": 96, "pad_token_id": 0}
    config = config_class(**tiny | FAMILIES[family], num_labels=3)
    model = getattr(transformers, family + "ForSequenceClassification")(config)
    llm = open_llm(save(model, tmp_path / "c", **FAMILIES[family]))
    outputs = llm.classify(prompts(), use_tqdm=False)
    raw = llm.encode(prompts(), {"use_activation": False}, use_tqdm=False)
    for ids, output, scores in zip(prompts(), outputs, raw, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        np.testing.assert_allclose(scores.outputs.data, expected.numpy(), atol=1e-4)
        np.testing.assert_allclose(output.outputs.probs, expected.softmax(-1).numpy(), atol=1e-4)
        assert output.outputs.num_classes == 3
    with pytest.raises(ValueError, match="classifies and does not generate"):
        llm.generate([1, 2])
    with pytest.raises(ValueError, match="a classifier with 1 label"):
        llm.score("a", "b")


def test_a_reranker_scores_pairs(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.tokenizer_folders import byte_level_bpe

    model = LlamaForSequenceClassification(LlamaConfig(**TINY | {"vocab_size": 420}, num_labels=1))
    folder = save(model, tmp_path / "r")
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    llm = LLM(str(folder), use_tqdm_on_load=False, **ENGINE)
    outputs = llm.score("two spaces", ["a tab", "the text"], use_tqdm=False)
    for output, second in zip(outputs, ["a tab", "the text"], strict=True):
        ids = llm.get_tokenizer()("two spaces", text_pair=second)["input_ids"]
        with torch.no_grad():
            expected = torch.sigmoid(model(torch.tensor([ids])).logits[0, 0])
        assert output.outputs.score == pytest.approx(float(expected), abs=1e-5)
    (raw,) = llm.score("two spaces", "a tab", pooling_params={"use_activation": False}, use_tqdm=False)
    assert 1 / (1 + np.exp(-raw.outputs.score)) == pytest.approx(outputs[0].outputs.score, abs=1e-6)


def test_what_a_model_cannot_do_is_refused():
    llm = make_sum_llm(enforce_eager=True)
    with pytest.raises(ValueError, match="has no classes"):
        llm.classify([1, 2])
    with pytest.raises(ValueError, match="dimensions=1000 must be at most"):
        llm.embed([1, 2], {"dimensions": 1000})
    with pytest.raises(ValueError, match="task is 'classify', but 'embed' was called"):
        llm.embed([1, 2], PoolingParams(task="classify"))
    with pytest.raises(
        ValueError, match="pooling_task must be one of embed, classify, token_embed, got 'token_classify'"
    ):
        llm.encode([1, 2], pooling_task="token_classify")
    with pytest.raises(TypeError, match="did you mean 'dimensions'"):
        llm.embed([1, 2], {"dimension": 3})
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.embed([[1, 2]], [None, None])
    with pytest.raises(ValueError, match="lora_request must be None"):
        llm.embed([1, 2], lora_request="adapter")


def test_pooler_config(tmp_path):
    assert PoolerConfig.of({"pooling_type": "MEAN", "normalize": False}) == PoolerConfig("mean", False)
    assert PoolerConfig.of({"pooling_type": "CLS"}) == PoolerConfig("cls", True)
    with pytest.raises(ValueError, match="pooling_type must be one of MEAN, LAST, CLS, got 'STEP'"):
        PoolerConfig.of({"pooling_type": "STEP"})
    assert PoolerConfig.of_checkpoint(None) == PoolerConfig.of_checkpoint(tmp_path) == PoolerConfig("last", True)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert PoolerConfig.of_checkpoint(tmp_path) == PoolerConfig("mean", False)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings | {"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="exactly one of"):
        PoolerConfig.of_checkpoint(tmp_path)


POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        (json.dumps([POOLING, DENSE]), r"modules\.json.*'2_Dense'.*models\.Dense'.*allowed: Transformer, Pooling, Nor"),
        ("[", r"modules\.json is not valid JSON"),
        ("{}", r"modules\.json must hold a list of objects, got {}"),
        ('["Pooling"]', r"modules\.json must hold a list of objects with.*one is Pooling"),
        ('[{"type": "Pooling"}]', r"modules\.json must hold a list of objects with the strings 'type' and 'path'"),
        (json.dumps([POOLING]), r"1_Pooling/config\.json cannot be read: No such file"),
    ],
)
def test_modules_that_cannot_be_followed_are_refused(tmp_path, modules, match):
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(ValueError, match=match):
        PoolerConfig.of_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (b"{", "is not valid JSON"),
        (b'{"\xff": 1}', "is not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"{}", "exactly one of"),
    ],
)
def test_a_broken_pooling_config_is_named(tmp_path, settings, match):
    (tmp_path / "modules.json").write_text(json.dumps([POOLING]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_bytes(settings)
    with pytest.raises(ValueError, match=rf"1_Pooling/config\.json.*{match}"):
        PoolerConfig.of_checkpoint(tmp_path)


def test_the_activation_of_a_cross_encoder_counts_more_than_its_problem_type():
    both = {"problem_type": "single_label_classification", "sbert_ce_default_activation_function": None}
    assert problem_type_of({}) is None and problem_type_of(both) == "single_label_classification"
    for field in ("old", "new"):
        for name, expected in (
            ("torch.nn.modules.linear.Identity", "regression"),
            ("torch.nn.modules.activation.Sigmoid", "multi_label_classification"),
            ("torch.nn.modules.activation.Softmax", "single_label_classification"),
        ):
            old = {"sbert_ce_default_activation_function": name}
            new = {"sentence_transformers": {"activation_fn": name, "version": "5.0.0"}}
            assert problem_type_of({"problem_type": "?"} | (old if field == "old" else new)) == expected
    with pytest.raises(ValueError, match=r"sbert_ce_default_activation_function='torch.*LogSigmoid'.*: Identity, Sig"):
        problem_type_of({"sbert_ce_default_activation_function": "torch.nn.modules.activation.LogSigmoid"})
    with pytest.raises(ValueError, match=r"sentence_transformers\.activation_fn='torch.*Tanh' is not supported"):
        problem_type_of({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}})


def test_which_tokens_of_a_chunk_count():
    assert span("mean", 16, 8, 24) == (0, 8)
    assert span("last", 16, 8, 24) == (7, 8) and span("last", 0, 16, 24) == (0, 0)
    assert span("cls", 0, 16, 24) == (0, 1) and span("cls", 16, 8, 24) == (0, 0)
