"""Qwen v1's and GLM-4's files: the ids are tiktoken's."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer_formats.parts import TokenizerNotFound, merges_of
from jaxllm.tokenizer_formats.tiktoken_file import GLM4_SPECIAL, GLM4_WORDS, QWEN_SPECIAL, QWEN_WORDS, is_tiktoken
from tests.tokenizer_folders import ALPHABET, sentencepiece_model, tiktoken_ranks, write_folder, write_ranks

tiktoken = pytest.importorskip("tiktoken")

TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=30).map("".join) | st.text(
    st.characters(codec="utf-8"), max_size=30
)


def load(folder, file: str, ranks: dict[bytes, int], cls: str) -> Tokenizer:
    # The folder names code, as the published ones do; it is not there, so that nobody can have run it.
    settings = {"tokenizer_class": cls, "auto_map": {"AutoTokenizer": ["tokenization.Absent", None]}}
    write_folder(folder, {"tokenizer_config.json": settings})
    write_ranks(folder / file, ranks)
    return Tokenizer.load(folder)


def reference(words: str, ranks: dict[bytes, int], special: tuple[str, ...]):
    ids = {token: len(ranks) + i for i, token in enumerate(special)}
    return tiktoken.Encoding("reference", pat_str=words, mergeable_ranks=ranks, special_tokens=ids)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    ranks = tiktoken_ranks(QWEN_WORDS)
    tokenizer = load(tmp_path_factory.mktemp("qwen"), "qwen.tiktoken", ranks, "QWenTokenizer")
    return tokenizer, reference(QWEN_WORDS, ranks, QWEN_SPECIAL)


@pytest.fixture(scope="module")
def glm4(tmp_path_factory):
    ranks = tiktoken_ranks(GLM4_WORDS)
    tokenizer = load(tmp_path_factory.mktemp("glm4"), "tokenizer.model", ranks, "ChatGLM4Tokenizer")
    return tokenizer, reference(GLM4_WORDS, ranks, GLM4_SPECIAL)


@settings(max_examples=400)
@given(text=TEXTS)
def test_qwen(qwen, text):
    tokenizer, encoding = qwen
    expected = encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
    assert tokenizer.encode(text) == expected  # nothing before it, nothing after it
    assert tokenizer.hf.decode(expected) == encoding.decode(expected)


@settings(max_examples=400)
@given(text=TEXTS)
def test_glm4(glm4, text):
    tokenizer, encoding = glm4
    expected = encoding.encode(text, allowed_special="all")
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) == encoding.encode("[gMASK]<sop>", allowed_special="all") + expected
    assert tokenizer.hf.decode(expected) == encoding.decode(expected)


def test_qwen_special_tokens(qwen):
    tokenizer, encoding = qwen
    n = encoding.n_vocab - 208
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|><|extra_204|><|endoftext|>")
    assert (ids[0], ids[-3:]) == (n + 1, [n + 2, n + 207, n])
    assert (tokenizer.eos_token_id, tokenizer.hf.bos_token_id, len(tokenizer.hf)) == (n, None, n + 208)
    assert tokenizer.hf.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert "".join(map(tokenizer.stream([], True).add, ids)) == "user\nhi"
    # As Qwen's own: text is normalized as a whole, so this is no end of a turn but a "not greater than".
    assert n + 2 not in tokenizer.encode("<|im_end|>\u0338")


def test_glm4_special_tokens(glm4):
    tokenizer, encoding = glm4
    n = encoding.n_vocab - 14
    assert tokenizer.encode("[gMASK]<sop><|user|>\n", add_special_tokens=False)[:3] == [n + 2, n + 4, n + 7]
    assert tokenizer.eos_token_id == n and tokenizer.encode("12345") != tokenizer.encode("1 2 3 4 5")


def test_words(qwen, glm4):
    """One digit a word in Qwen, up to three in GLM-4; what an apostrophe begins is a word in any case."""
    cases = ((qwen, ["9", "0", "8", "1", "7"]), (glm4, ["908", "17"]))
    for (tokenizer, _), numbers in cases:
        words = tokenizer.hf.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It'S 90817!\n")
        assert [word for word, _ in words] == ["It", "'S", "Ġ", *numbers, "!Ċ"]


@settings(max_examples=200)
@given(
    tokens=st.sets(st.text("abc", min_size=2, max_size=5), max_size=20),
    text=st.text("abc", min_size=1, max_size=40),
)
def test_merges_of_any_vocabulary(tokens, text):
    """Even of tokens in an order that no training gives."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    ordered = [*"abc", *sorted(tokens, key=lambda token: token[::-1])]
    ids = {token: i for i, token in enumerate(ordered)}
    merges = merges_of(ordered, ids.keys())
    backend = Backend(models.BPE(ids, merges, ignore_merges=True))
    ranks = {token.encode(): i for token, i in ids.items()}
    encoding = tiktoken.Encoding("any", pat_str=r".+", mergeable_ranks=ranks, special_tokens={})
    assert backend.encode(text).ids == encoding.encode(text)


def test_a_broken_line_is_named(tmp_path):
    write_folder(tmp_path, {"qwen.tiktoken": "IQ== 0\nIg==\n"})
    with pytest.raises(TokenizerNotFound, match=r"qwen\.tiktoken, line 2, must hold a token in base64 and its rank"):
        Tokenizer.load(tmp_path)


def test_which_of_the_two_a_file_is(tmp_path):
    write_ranks(tmp_path / "text", {b"!": 0, b'"': 1})
    assert is_tiktoken(tmp_path / "text")
    pytest.importorskip("sentencepiece")
    (tmp_path / "binary").write_bytes(sentencepiece_model())
    assert not is_tiktoken(tmp_path / "binary")
