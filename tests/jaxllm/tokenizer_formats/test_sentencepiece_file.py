"""sentencepiece models: the ids and the text are the sentencepiece library's."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer_formats.parts import TokenizerNotFound
from jaxllm.tokenizer_formats.sentencepiece_file import CHATGLM_SPECIAL, Model
from tests.tokenizer_folders import ALPHABET, sentencepiece_folder, sentencepiece_model, write_folder

spm = pytest.importorskip("sentencepiece")

# Texts that spell no control symbol, which a tokenizer reads as one and the library does not.
TEXTS = (
    st.lists(st.sampled_from([one for one in ALPHABET if one != "<s>"]), max_size=30).map("".join)
    | st.text(st.characters(codec="utf-8"), max_size=30)
).filter(lambda text: not any(one in text for one in ("<s>", "</s>", "<unk>")))


def with_equal_scores(proto: bytes) -> bytes:
    """As Chinese-Alpaca's was made: pieces added to a trained model, all with score 0."""
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")  # needs protobuf
    model = pb2.ModelProto.FromString(proto)
    of_text = {piece.piece: piece for piece in model.pieces}
    for text in ("你好", "好人", "好事", "人好", "你好人", "世界", "界和"):
        if text in of_text:
            of_text[text].score = 0.0
        else:
            model.pieces.add(piece=text, score=0.0)
    return model.SerializeToString()


MODELS = {
    "llama": lambda: sentencepiece_model(),
    "baichuan": lambda: sentencepiece_model(add_dummy_prefix=False),
    "no bytes": lambda: sentencepiece_model(byte_fallback=False, vocab_size=160),
    "normalized": lambda: sentencepiece_model(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
    "user-defined": lambda: sentencepiece_model(user_defined_symbols=["<reserved_106>", "the", "<|im_end|>"]),
    "equal scores": lambda: with_equal_scores(sentencepiece_model()),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A folder's tokenizer and the library's own."""
    proto = MODELS[request.param]()
    folder = sentencepiece_folder(tmp_path_factory.mktemp("sentencepiece"), proto)
    return request.param, Tokenizer.load(folder), spm.SentencePieceProcessor(model_proto=proto)


@settings(max_examples=300)
@given(text=TEXTS)
def test_ids_and_text(pair, text):
    name, tokenizer, reference = pair
    expected = reference.encode(text)
    assert tokenizer.encode(text) == [1, *expected]
    if name != "no bytes":  # the library writes " ⁇ " for an unknown character
        assert tokenizer.hf.decode(expected) == reference.decode(expected)


def test_the_library_cuts_only_where_merges_cannot(pair):
    name, tokenizer, _ = pair
    by_library = tokenizer.hf.backend_tokenizer.pre_tokenizer is not None
    assert by_library == (name in ("normalized", "user-defined", "equal scores"))


def test_many_texts_at_once(pair):
    _, tokenizer, reference = pair
    texts = ["The scheduler", "", "你好人好事 🙂"]
    assert tokenizer.encode_all(texts) == [[1, *reference.encode(text)] for text in texts]


def test_the_first_of_equals_is_the_leftmost(tmp_path):
    proto = with_equal_scores(sentencepiece_model(add_dummy_prefix=False))
    tokenizer = Tokenizer.load(sentencepiece_folder(tmp_path, proto, add_bos_token=False))
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("你好人好")) == ["你好人", "好"]
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("好人好事")) == ["好人", "好事"]


def test_without_the_library_it_is_asked_for(tmp_path, monkeypatch):
    proto = sentencepiece_model(add_dummy_prefix=False), sentencepiece_model(user_defined_symbols=["the"])
    plain, special = (sentencepiece_folder(tmp_path / str(i), one) for i, one in enumerate(proto))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert Tokenizer.load(plain).encode("The")
    with pytest.raises(TokenizerNotFound, match=r"needs a library.*pip install 'jaxllm\[tokenizers\]'.*sentencepiece"):
        Tokenizer.load(special)


@pytest.mark.parametrize("legacy", [None, True, False])
def test_what_follows_a_special_token(tmp_path, legacy):
    """It begins with a space as published (and as Vicuna was trained); not with `legacy` false."""
    proto = sentencepiece_model()
    reference = spm.SentencePieceProcessor(model_proto=proto)
    folder = sentencepiece_folder(tmp_path, proto, **({} if legacy is None else {"legacy": legacy}))
    tokens = Tokenizer.load(folder).hf.convert_ids_to_tokens(Tokenizer.load(folder).encode("the token</s>the token"))
    first, later = tokens[: tokens.index("</s>")], tokens[tokens.index("</s>") + 1 :]
    assert first == ["<s>", *reference.encode("the token", out_type=str)]
    assert "".join(later) == ("the▁token" if legacy is False else "▁the▁token")


def test_beginning_and_end_of_sequence(tmp_path):
    proto = sentencepiece_model()
    cases = [({}, [1], []), ({"add_bos_token": False}, [], []), ({"add_eos_token": True}, [1], [2])]
    body = spm.SentencePieceProcessor(model_proto=proto).encode("the")
    for i, (settings_, before, after) in enumerate(cases):
        tokenizer = Tokenizer.load(sentencepiece_folder(tmp_path / str(i), proto, **settings_))
        assert tokenizer.encode("the") == [*before, *body, *after]
        assert tokenizer.encode("the", add_special_tokens=False) == body
        assert (tokenizer.hf.bos_token, tokenizer.hf.eos_token, tokenizer.eos_token_id) == ("<s>", "</s>", 2)


def test_tokens_added_after_training(tmp_path):
    proto = sentencepiece_model()
    size = spm.SentencePieceProcessor(model_proto=proto).vocab_size()
    end = {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": True}
    folder = sentencepiece_folder(
        tmp_path, proto, eos_token=end, added_tokens_decoder={str(size): end | {"single_word": False}}
    )
    write_folder(folder, {"added_tokens.json": {"<|im_end|>": size, "<pad>": size + 1}})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<|im_end|><pad>") == [1, size, size + 1] and tokenizer.eos_token_id == size
    write_folder(folder, {"added_tokens.json": {"<pad>": size + 7}})
    with pytest.raises(TokenizerNotFound, match=rf"'<pad>' has id {size + 7} in its file, but would be {size + 1}"):
        Tokenizer.load(folder)


def test_chatglm3(tmp_path):
    proto = sentencepiece_model()
    reference = spm.SentencePieceProcessor(model_proto=proto)
    n = reference.vocab_size()
    special = {token: n + i for i, token in enumerate(CHATGLM_SPECIAL)}
    tokenizer = Tokenizer.load(sentencepiece_folder(tmp_path, proto, cls="ChatGLMTokenizer"))
    prefix = [special["[gMASK]"], special["sop"]]
    assert tokenizer.encode("你好, the token") == prefix + reference.encode("你好, the token")
    # A message is encoded on its own in ChatGLM3's code: the end of the role's line, then its text.
    prompt = "[gMASK]sop<|user|>\n 你好<|assistant|>"
    message = reference.encode("\n") + reference.encode("你好")
    expected = [*prefix, special["<|user|>"], *message, special["<|assistant|>"]]
    assert tokenizer.encode(prompt, add_special_tokens=False) == expected
    assert tokenizer.eos_token_id == 2 and len(tokenizer.hf) == n + 9
    philosophy = "philosophers sophisticate people: eops"
    assert tokenizer.encode(philosophy) == prefix + reference.encode(philosophy)


@pytest.mark.parametrize("content", [b"\x0a\xff", b"\x0a\x05\x0a\x01a", b"\x0c", b"\x0d\x00", b"\x08\x01"])
def test_a_broken_file(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerNotFound, match=r"tokenizer\.model is no sentencepiece model"):
        Model.read(tmp_path / "tokenizer.model")


def test_other_kinds_of_model_are_left_to_transformers(tmp_path):
    pytest.importorskip("google.protobuf")
    proto = sentencepiece_model(model_type="unigram", vocab_size=400, hard_vocab_limit=False)
    tokenizer = Tokenizer.load(sentencepiece_folder(tmp_path, proto))
    assert type(tokenizer.hf).__name__ == "LlamaTokenizer"


def test_the_fields_of_a_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(add_dummy_prefix=False))
    model = Model.read(tmp_path / "tokenizer.model")
    reference = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert [(text, score) for text, score, _ in model.pieces] == [
        (reference.id_to_piece(i), pytest.approx(reference.get_score(i))) for i in range(reference.vocab_size())
    ]
    assert (model.byte_fallback, model.charsmap, model.dummy_prefix, model.one_space) == (True, b"", False, False)
