"""What is in a folder decides how it is loaded, and none of its code runs unasked."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from jaxllm.loading import DEFAULT_MODEL
from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer_formats.parts import TokenizerNotFound
from tests.tokenizer_folders import (
    ALPHABET,
    byte_level_bpe,
    sentencepiece_folder,
    sentencepiece_model,
    write_folder,
    write_ranks,
)

TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=30).map("".join)
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOUCH = "from pathlib import Path\nPath({file!r}).touch()\nfrom transformers import PreTrainedTokenizerFast as Theirs\n"


def vocabulary_and_merges(backend) -> dict:
    model = json.loads(backend.to_str())["model"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return {"vocab.json": model["vocab"], "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n"}


def with_tokens(backend, *tokens: str):
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    return backend


@settings(max_examples=200)
@given(text=TEXTS)
def test_gpt2(gpt2, text):
    tokenizer, reference = gpt2
    assert tokenizer.encode(text) == reference.encode(text).ids


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    backend = byte_level_bpe()
    files = vocabulary_and_merges(backend)
    with_tokens(backend, "<|endoftext|>")
    files["vocab.json"]["<|endoftext|>"] = backend.token_to_id("<|endoftext|>")
    folder = write_folder(
        tmp_path_factory.mktemp("gpt2"),
        files | {"config.json": {"model_type": "gpt2"}, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
    )
    return Tokenizer.load(folder), backend


def test_opt(tmp_path):
    """GPT-2's vocabulary after four special tokens, and </s> before every text."""
    files = vocabulary_and_merges(byte_level_bpe())
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    files["vocab.json"] = special | {token: i + 4 for token, i in files["vocab.json"].items()}
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "add_prefix_space": False,
        "pad_token": "<pad>",
        **{name: token | {"content": "</s>"} for name in ("bos_token", "eos_token", "unk_token")},
    }
    write_folder(tmp_path, files | {"config.json": {"model_type": "opt"}, "tokenizer_config.json": config})
    tokenizer = Tokenizer.load(tmp_path)
    reference = byte_level_bpe()
    for text in ("The scheduler hands out tokens", " 你好", ""):
        assert tokenizer.encode(text) == [2, *(i + 4 for i in reference.encode(text).ids)]
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2] and tokenizer.eos_token_id == 2


def test_qwen2(tmp_path):
    backend = byte_level_bpe(QWEN2_WORDS)
    files = vocabulary_and_merges(backend)
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    with_tokens(backend, *added)
    properties = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(backend.token_to_id(one)): properties | {"content": one} for one in added},
        "additional_special_tokens": added[1:],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    write_folder(tmp_path, files | {"config.json": {"model_type": "qwen2"}, "tokenizer_config.json": config})
    tokenizer = Tokenizer.load(tmp_path)
    for text in ("The scheduler, 1234!", "<|im_start|>user\n你好 we'LL<|im_end|>\n", "", "  two  spaces\n\n"):
        assert tokenizer.encode(text) == backend.encode(text).ids
    assert tokenizer.token_text(tokenizer.eos_token_id) == "<|im_end|>"


def test_tokenizer_json_with_a_class_of_the_folder_s_own(tmp_path):
    """The file says it all; the class need not run."""
    backend = with_tokens(byte_level_bpe(), "<|end|>")
    settings_ = {
        "tokenizer_class": "TheirTokenizer",
        "auto_map": {"AutoTokenizer": ["theirs.TheirTokenizer", "theirs.TheirTokenizerFast"]},
        "eos_token": "<|end|>",
    }
    write_folder(tmp_path, {"tokenizer.json": backend.to_str(), "tokenizer_config.json": settings_})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the token") == backend.encode("the token").ids
    assert tokenizer.eos_token_id == backend.token_to_id("<|end|>")


def test_llama_s_tokenizer_json(tmp_path):
    """As the file has it: a space before the text that follows a special token, and a second one before a space."""
    pytest.importorskip("sentencepiece")
    original = Tokenizer.load(sentencepiece_folder(tmp_path / "sentencepiece", sentencepiece_model()))
    original.hf.save_pretrained(tmp_path / "json")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    write_folder(
        tmp_path / "json",
        {
            "config.json": {"model_type": "llama"},
            "tokenizer_config.json": names | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        },
    )
    tokenizer = Tokenizer.load(tmp_path / "json")
    for text in ("the token", " the token", "the</s><s>the token 你好 🙂"):
        assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("auto_map", [["theirs.Theirs", None], {"AutoTokenizer": [None, "theirs.Theirs"]}])
def test_code_runs_only_when_trusted(tmp_path, auto_map):
    ran = tmp_path / "ran"
    backend = with_tokens(byte_level_bpe(), "<|end|>")
    code = TOUCH.format(file=str(ran)) + (
        "import pathlib, tokenizers\n"
        f"class Theirs(Theirs):\n"
        "    def __init__(self, **kwargs):\n"
        f"        self._tokenizer = tokenizers.Tokenizer.from_file({str(tmp_path / 'their.vocab')!r})\n"
        "        super().__init__(**kwargs)\n"
    )
    folder = write_folder(
        tmp_path / "model",
        {"theirs.py": code, "tokenizer_config.json": {"tokenizer_class": "Theirs", "auto_map": auto_map}},
    )
    (tmp_path / "their.vocab").write_text(backend.to_str(), encoding="utf-8")
    with pytest.raises(TokenizerNotFound, match=r"its class Theirs in theirs\.py would have to run.*trust_remote_code"):
        Tokenizer.load(folder)
    assert not ran.exists()
    tokenizer = Tokenizer.load(folder, trust_remote_code=True)
    assert ran.exists() and tokenizer.encode("the token", add_special_tokens=False) == backend.encode("the token").ids


def test_no_tokenizer_says_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerNotFound, match=r"(?s)holds none.*Pass tokenizer=.*skip_tokenizer_init=True"):
        Tokenizer.load(tmp_path)


def test_broken_json(tmp_path):
    write_folder(tmp_path, {"tokenizer_config.json": "{"})
    with pytest.raises(TokenizerNotFound, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "{{ 'here' }}"},
        {"chat_template.json": {"chat_template": "{{ 'here' }}"}},
        {"tokenizer_config.json": {"chat_template": "{{ 'here' }}"}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{ 'here' }}"}]}},
    ],
    ids=["jinja", "json", "settings", "named"],
)
@pytest.mark.parametrize("known", [True, False], ids=["ours", "transformers"])
def test_where_chat_templates_are_kept(tmp_path, files, known):
    config = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | files.get("tokenizer_config.json", {})
    }
    write_folder(tmp_path, files | config)
    if known:
        write_ranks(tmp_path / "qwen.tiktoken", {bytes([byte]): byte for byte in range(256)})
    else:
        (tmp_path / "tokenizer.json").write_bytes((DEFAULT_MODEL / "tokenizer.json").read_bytes())
    assert Tokenizer.load(tmp_path).apply_chat_template([{"role": "user", "content": ""}]) == "here"
