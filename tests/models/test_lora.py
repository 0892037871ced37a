"""LoRA adapters against PEFT: the same adapter, trained by nobody, on the same tiny model."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from jaxllm.models import CheckpointError, build, load_params, read_config  # noqa: E402
from jaxllm.models.lora import Adapter, AdapterConfig, merge_checkpoint  # noqa: E402
from tests.checkpoints import save_checkpoint, tiny_llama  # noqa: E402
from tests.models.stepping import Stepper  # noqa: E402

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
MODEL = {"num_hidden_layers": 1}


def make(folder, model=None, **config):
    """A checkpoint and an adapter for it in `folder`; returns PEFT's logits of the last token."""
    model = tiny_llama(**(MODEL | (model or {})))
    save_checkpoint(model, folder / "model")
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | config
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        logits = adapted(torch.tensor([TOKENS])).logits[0, -1].numpy()
    adapted.save_pretrained(folder / "adapter")
    return logits


def logits_of(model, adapter=None):
    network = build(read_config(json.loads((model / "config.json").read_text())))
    params = load_params(network, model, adapter=None if adapter is None else Adapter(adapter), progress=False)
    stepper = Stepper(network, params)
    row = stepper.add(TOKENS)
    return stepper.step({row: len(TOKENS)})[row]


VARIANTS = {
    "list": {},
    "rslora": {"use_rslora": True},
    "regex": {"target_modules": r".*\.(up|gate)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 3}, "alpha_pattern": {"v_proj": 11}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "saved modules": {"modules_to_save": ["lm_head", "norm"]},
    "all biases": {"bias": "all", "model": {"attention_bias": True, "mlp_bias": True}},
    "biases of the targets": {"bias": "lora_only", "model": {"attention_bias": True, "mlp_bias": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_logits_equal_pefts(variant, tmp_path):
    expected = make(tmp_path, **VARIANTS[variant])
    logits = logits_of(tmp_path / "model", tmp_path / "adapter")
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    assert np.abs(expected - logits_of(tmp_path / "model")).max() > 0.05  # the adapter does something


TIED = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "saved head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("variant", TIED)
def test_a_tied_models_embedding_or_head_alone_is_refused(variant, tmp_path):
    """PEFT changes what one of the two does and not the weight, which they share."""
    make(tmp_path, model={"tie_word_embeddings": True}, **TIED[variant])
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    for call in (logits_of, lambda *folders: merge_checkpoint(*folders, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="weight: embedding and output head are one weight"):
            call(tmp_path / "model", tmp_path / "adapter")


def test_a_tied_models_embedding_whose_head_follows(tmp_path):
    make(tmp_path, model={"tie_word_embeddings": True}, target_modules=["embed_tokens"])
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ensure_weight_tying": True}))
    merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    plain, merged = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("model", "out"))
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    expected = plain["model.embed_tokens.weight"] + 1.5 * (adapter[f"{name}B"] @ adapter[f"{name}A"]).T
    np.testing.assert_allclose(merged["model.embed_tokens.weight"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits_of(tmp_path / "model", tmp_path / "adapter"), logits_of(tmp_path / "out"))


RENAMED = {
    "model.language_model.layers.0.self_attn.q_proj": "language_model.model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.gate": "model.layers.0.block_sparse_moe.gate",
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_of_transformers_that_are_not_the_checkpoints(name, tmp_path):
    """Gemma 3's text model and Mixtral's router, as PEFT saves what was trained of them."""
    values = {f"base_model.model.{name}.lora_{one}.weight": np.ones(shape, np.float32)
              for one, shape in (("A", (2, 6)), ("B", (5, 2)))}  # fmt: skip
    for folder in ("adapter", "model"):
        (tmp_path / folder).mkdir()
    save_file(values, tmp_path / "adapter/adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 2, "target_modules": [name.rpartition(".")[2]]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    save_file({f"{RENAMED[name]}.weight": np.zeros((5, 6), np.float32)}, tmp_path / "model/model.safetensors")
    merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert (load_file(tmp_path / "out/model.safetensors")[f"{RENAMED[name]}.weight"] == 2).all()


def test_merged_checkpoint_has_the_models_names_dtypes_and_files(tmp_path, monkeypatch):
    expected = make(tmp_path)
    model, out = tmp_path / "model", tmp_path / "out"
    (model / "tokenizer.json").write_text("{}")
    merge_checkpoint(model, tmp_path / "adapter", out)
    np.testing.assert_allclose(logits_of(out), expected, atol=2e-3)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: (one.shape, one.dtype) for name, one in before.items()} == {
        name: (one.shape, one.dtype) for name, one in after.items()
    }
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    monkeypatch.setattr("jaxllm.models.lora._SHARD_BYTES", 20_000)
    merge_checkpoint(model, tmp_path / "adapter", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    np.testing.assert_allclose(logits_of(tmp_path / "shards"), expected, atol=2e-3)
    with pytest.raises(ValueError, match="out is not empty"):
        merge_checkpoint(model, tmp_path / "adapter", out)


def test_transposed_layers(tmp_path):
    """fan_in_fan_out: the checkpoint's weight is [in, out], and so the product is transposed."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    weight = rng.normal(size=(6, 5)).astype(np.float32)
    (tmp_path / "adapter").mkdir()
    name = "base_model.model.transformer.h.0.attn.c_attn"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter/adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "model").mkdir()
    # The published GPT-2 leaves out "transformer.".
    save_file({"h.0.attn.c_attn.weight": weight}, tmp_path / "model/model.safetensors")
    merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")["h.0.attn.c_attn.weight"]
    np.testing.assert_allclose(merged, weight + 1.5 * (b @ a).T, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({"use_dora": True}, ["use_dora=True", "allowed: false"]),
        ({"peft_type": "IA3"}, ["peft_type='IA3'", "LORA"]),
        ({"bias": "some"}, ["bias='some'", "lora_only"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights='pissa'", "gaussian"]),
        ({"r": 0}, ["r=0", "> 0"]),
        ({"lora_alpha": "8"}, ["lora_alpha='8'", "a number"]),
        ({"target_modules": None}, ["target_modules=None", "list of names"]),
    ],
)
def test_configs_that_cannot_be_followed(values, texts):
    with pytest.raises(ValueError) as error:
        AdapterConfig.read({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | values)
    for text in texts:
        assert text in str(error.value)


def spoil(folder, change=lambda tensors: None, **config):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | config))


def test_tensors_that_nothing_explains_are_named(tmp_path):
    make(tmp_path)
    adapter, name = tmp_path / "adapter", "base_model.model.model.layers.0.self_attn.q_proj"

    def change(tensors):
        del tensors[f"{name}.lora_B.weight"]
        tensors["base_model.model.model.layers.0.other"] = np.ones(3, np.float32)

    spoil(adapter, change, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3})
    with pytest.raises(CheckpointError) as error:
        Adapter(adapter)
    for text in (
        "4 problem(s)",
        f"{name}.lora_A.weight: the tensor B that belongs to it is missing",
        "unused: base_model.model.model.layers.0.other",
        "down_proj.lora_A.weight, of a layer that target_modules=('q_proj', 'v_proj') does not name",
        "v_proj.lora_A.weight: A [4, 32] and B [16, 4] must have the rank 3",
    ):
        assert text in str(error.value)


def test_adapter_of_another_model(tmp_path):
    make(tmp_path, model={"intermediate_size": 64, "num_hidden_layers": 2})
    save_checkpoint(tiny_llama(**MODEL), tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        logits_of(tmp_path / "model", tmp_path / "adapter")
    for text in ("changes [32, 64], but model.layers.0.mlp.down_proj.weight is [32, 48]", "no model.layers.1.mlp"):
        assert text in str(error.value)


def test_folders_that_are_no_adapters(tmp_path):
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        Adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}')
    with pytest.raises(CheckpointError, match=r"none of adapter_model\.safetensors, adapter_model\.bin"):
        Adapter(tmp_path)


def test_quantized_checkpoint_is_refused(tmp_path):
    make(tmp_path)
    tensors = load_file(tmp_path / "model/model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.qweight"] = tensors.pop(f"{name}.weight").astype(np.int32)
    save_file(tensors, tmp_path / "model/model.safetensors")
    with pytest.raises(CheckpointError, match="q_proj: the checkpoint is quantized; merge the adapter into"):
        merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
