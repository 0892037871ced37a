"""The model that jaxllm ships: a complete, small Hugging Face folder whose card tells what training measured."""

import importlib.util
import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

FOLDER = Path(str(files("jaxllm") / "default_model"))
MESSAGES = [
    {"role": "system", "content": "You are a storyteller."},
    {"role": "user", "content": " Hello? "},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "Tell me a story."},
]


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_folder_is_complete_and_small():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 20e6


def test_weights_are_bf16_and_5_to_10_million():
    config = read("config.json")
    with safe_open(FOLDER / "model.safetensors", "numpy") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118, it is no dict
        assert {piece.get_dtype() for piece in slices.values()} == {"BF16"}
        num_parameters = sum(int(np.prod(piece.get_shape())) for piece in slices.values())
        assert slices["model.embed_tokens.weight"].get_shape() == [config["vocab_size"], config["hidden_size"]]
    assert 5e6 <= num_parameters <= 10e6
    assert num_parameters == read("training.json")["parameters"]


@pytest.mark.parametrize(
    "text", ["Once upon a time", "Naïve 漢字 🙂 ‘quoted’", "\n\n  two  spaces\t'tis, don't ", "\x00\x7f"]
)
def test_tokenizer_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_tokenizer_fits_the_model(tokenizer):
    assert len(tokenizer) == read("config.json")["vocab_size"] == 4096
    assert len(tokenizer("Once upon a time there was a king.").input_ids) <= 12


def test_end_tokens(tokenizer):
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert read("generation_config.json")["eos_token_id"] == read("config.json")["eos_token_id"] == ends
    assert tokenizer.eos_token_id == ends[0]


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|system|>You are a storyteller.<|end|><|user|>Hello?<|end|><|assistant|>Good day.<|end|>"
        "<|user|>Tell me a story.<|end|><|assistant|>"
    )
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("Good day.Tell me a story.")


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="system, user or assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_card_and_files_are_the_script_s():
    """Card and JSON files are exactly what the training script makes of the numbers that it measured."""
    pytest.importorskip("optax")
    path = Path(__file__).parents[1] / "scripts" / "train_default_model.py"
    spec = importlib.util.spec_from_file_location("train_default_model", path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    report = read("training.json")
    assert (FOLDER / "README.md").read_text() == script.model_card(report)
    assert f"{report['validation_loss']:.4f} nats a token" in (FOLDER / "README.md").read_text()
    tokenizer = script.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    for name, content in script.config_files(script.ModelConfig(), tokenizer).items():
        assert read(name) == content, name


# Written for this test, in the style of the books but in none of them.
PASSAGE = (
    "The old man looked at the boy for a long time, and then he said that he would go down to the river in the "
    "morning, if the weather was fine, and see whether the boat was still there. The boy was very glad to hear it, and "
    "he ran home to tell his mother."
)


def test_transformers_loads_it_and_it_knows_english(tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"

    def loss(text: str) -> float:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    shuffled = " ".join(np.random.default_rng(0).permutation(PASSAGE.split()))
    assert loss(PASSAGE) < 3.2 < 5.0 < loss(shuffled)


def test_a_chat_turn_ends(tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    messages = [{"role": "user", "content": "Where have you been?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer([prompt] * 4, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=150)[:, inputs.input_ids.shape[1] :]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert all(end in row for row in output.tolist())
