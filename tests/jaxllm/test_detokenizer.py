"""Text as it grows: whatever the tokens, its pieces add up to what decoding all of them at once gives."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxllm.detokenizer import CHARACTER_OF_BYTE, ByteRule, ByteStream, WindowStream
from jaxllm.loading import DEFAULT_MODEL
from jaxllm.tokenizer import Tokenizer
from tests.tokenizer_folders import sentencepiece_folder, sentencepiece_model

TOKENIZER = Tokenizer.load(DEFAULT_MODEL)  # byte-level BPE
HF = TOKENIZER.hf
SPECIAL = frozenset(HF.all_special_ids)
INCOMPLETE = [i for i in range(len(HF)) if HF.decode([i]) == "\ufffd"]  # single bytes that are no character

TOKENS = st.one_of(st.integers(0, len(HF) - 1), st.sampled_from(INCOMPLETE))
# No text that spells a special token: that is a token without text.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20).filter(
    lambda text: "<" not in text
)
CLUSTERS = st.lists(
    st.sampled_from(["👩‍👩‍👧‍👦", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️‍🔥", "é", "n̰̈", "漢字", "かな", "你好", "한글", "नि", " ", "a", "🙂", "\n"]),
    max_size=12,
).map("".join)


def byte_stream(prompt=(), skip=True):
    return TOKENIZER.stream(list(prompt), skip)


def window_stream(prompt=(), skip=True):
    return WindowStream(lambda ids: HF.decode(ids, skip_special_tokens=skip), prompt)


STREAMS = pytest.mark.parametrize("make", [byte_stream, window_stream])


def decode(ids, skip=True):
    return HF.decode(ids, skip_special_tokens=skip)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    """Byte fallback and a dummy prefix, as Llama 2 has them."""
    pytest.importorskip("sentencepiece")
    return Tokenizer.load(sentencepiece_folder(tmp_path_factory.mktemp("llama"), sentencepiece_model()))


def test_each_stream_is_what_it_is_called(sentencepiece):
    assert isinstance(byte_stream(), ByteStream) and isinstance(sentencepiece.stream([], True), ByteStream)


@STREAMS
@settings(max_examples=200)
@given(ids=st.lists(TOKENS, max_size=40), skip=st.booleans())
def test_pieces_are_the_text_up_to_what_may_still_be_incomplete(make, ids, skip):
    stream, text = make(skip=skip), ""
    for i, token in enumerate(ids, 1):
        text += stream.add(token)
        whole = decode(ids[:i], skip)
        assert whole.startswith(text)  # what is given out is never taken back
        assert text == whole or whole.endswith("\ufffd")  # and only for the sake of a character is anything kept


@STREAMS
@settings(max_examples=200)
@given(text=TEXTS | CLUSTERS)
def test_characters_come_whole_and_at_once(make, text):
    stream, shown = make(), ""
    ids = HF.encode(text)
    for i, token in enumerate(ids, 1):
        shown += stream.add(token)
        assert shown == decode(ids[:i]).rstrip("\ufffd")
        assert text.startswith(shown)
    assert shown == text


@settings(max_examples=300)
@given(text=TEXTS | CLUSTERS)
def test_characters_come_whole_from_byte_fallback(sentencepiece, text):
    text = text.replace("▁", " ")  # which is a space to sentencepiece
    stream, shown = sentencepiece.stream([], True), ""
    for token in sentencepiece.encode(text):
        piece = stream.add(token)
        assert "\ufffd" not in piece
        shown += piece
        assert text.startswith(shown)
    assert shown == text


@settings(max_examples=100)
@given(text=TEXTS | CLUSTERS)
def test_text_is_the_same_however_it_is_split(sentencepiece, text):
    """All characters as bytes, one a token: the hardest case for both kinds of vocabulary."""
    for tokenizer, name in ((sentencepiece, "<0x{:02X}>".format), (TOKENIZER, CHARACTER_OF_BYTE.__getitem__)):
        stream = tokenizer.stream(tokenizer.encode("The"), True)
        pieces = [stream.add(tokenizer.hf.convert_tokens_to_ids(name(byte))) for byte in text.encode()]
        assert "".join(pieces) == text and all(len(piece) <= 1 for piece in pieces)


@STREAMS
@pytest.mark.parametrize(
    "text", ["🙂👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿", "漢字とかな", "naïve Ångström — “quoted”", "  two  spaces\n\n\tand a tab"]
)
def test_multi_byte_characters(make, text):
    stream = make()
    pieces = [stream.add(token) for token in HF.encode(text)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert text.isascii() or "" in pieces  # some character took several tokens


@settings(max_examples=200)
@given(text=TEXTS, special=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(sorted(SPECIAL))), max_size=4))
def test_both_streams_give_the_same_pieces(text, special):
    ids = HF.encode(text)
    for at, token in special:
        ids.insert(min(at, len(ids)), token)
    for skip in (True, False):
        one, other = byte_stream(skip=skip), window_stream(skip=skip)
        pieces = [(one.add(token), other.add(token)) for token in ids]
        # The window waits at the end for what may complete a character, even where nothing can.
        assert "".join(a for a, _ in pieces).rstrip("\ufffd") == "".join(b for _, b in pieces).rstrip("\ufffd")


@STREAMS
@settings(max_examples=100)
@given(prompt=TEXTS, text=TEXTS)
def test_text_goes_on_from_the_prompt(make, prompt, text):
    stream = make(HF.encode(prompt)[-6:])
    assert "".join(map(stream.add, HF.encode(text))) == text


@STREAMS
def test_special_tokens(make):
    ids = [*HF.encode("one"), 0, *HF.encode(" two"), 1]
    for skip, expected in ((True, "one two"), (False, "one<|endoftext|> two<|end|>")):
        assert "".join(map(make(skip=skip).add, ids)) == expected


@STREAMS
@settings(max_examples=50)
@given(ids=st.lists(TOKENS, max_size=12), one=st.lists(TOKENS, max_size=12), other=st.lists(TOKENS, max_size=12))
def test_a_fork_and_its_stream_go_on_alone(make, ids, one, other):
    stream = make()
    for token in ids:
        stream.add(token)
    fork = stream.fork()
    pieces = [(stream.add(a), fork.add(b)) for a, b in zip(one, other, strict=False)]
    for place, tokens in enumerate((one, other)):
        alone = make()
        for token in ids:
            alone.add(token)
        assert [piece[place] for piece in pieces] == [alone.add(token) for token in tokens[: len(pieces)]]


def test_the_space_before_the_first_word(sentencepiece):
    """It is not part of an answer's text after nothing but <s>, and is part of it after a prompt with text."""
    ids = sentencepiece.encode("scheduler", add_special_tokens=False)
    for prompt, expected in (([], "scheduler"), (sentencepiece.encode(""), "scheduler"), (ids, " scheduler")):
        assert "".join(map(sentencepiece.stream(prompt, True).add, ids)) == expected
    assert sentencepiece.encode("") == [sentencepiece.hf.bos_token_id]


def test_tokens_beyond_the_vocabulary_have_no_text():
    assert byte_stream().add(len(HF) + 5) == ""


@pytest.mark.parametrize("byte", [0x80, 0xC3, 0xE4, 0xF0, 0xFF])
def test_a_long_run_of_invalid_bytes_is_given_out_and_not_kept(byte):
    stream = byte_stream()
    token, kept = HF.convert_tokens_to_ids(CHARACTER_OF_BYTE[byte]), 0
    for _ in range(100):
        stream.add(token)
    tracemalloc.start()
    try:
        for _ in range(20_000):
            kept += 1 - len(stream.add(token))
            assert kept <= 3
        assert tracemalloc.get_traced_memory()[0] < 10_000
    finally:
        tracemalloc.stop()
    assert "".join(map(stream.add, HF.encode("ok"))).endswith("ok")


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self):
        self.decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return HF.decode(ids, skip_special_tokens=True)


@settings(max_examples=50)
@given(ids=st.lists(TOKENS, max_size=60), run=st.sampled_from([0, 1, INCOMPLETE[0], INCOMPLETE[-1]]))
def test_a_window_stays_short_whatever_came_before(ids, run):
    counting = CountingTokenizer()
    stream = WindowStream(counting.decode, [])
    for token in ids + [run] * 100 + ids:  # a run of what gives no text must not pile up either
        before = counting.decoded
        stream.add(token)
        assert counting.decoded - before <= 48


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (decoders.ByteLevel(), ByteRule(byte_level=True)),
        (decoders.Metaspace(), ByteRule(space="▁", strips_first_space=True)),
        (decoders.Metaspace(prepend_scheme="never"), ByteRule(space="▁")),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
         ByteRule(space="▁", byte_fallback=True)),
        (decoders.Strip(" ", 1, 0), ByteRule(strips_first_space=True)),
        (decoders.Strip(" ", 0, 1), None),
        (decoders.WordPiece(), None),
        (None, None),
    ],
)  # fmt: skip
def test_which_decoders_work_by_the_byte(decoder, expected):
    backend = Backend(models.BPE())
    if decoder is not None:
        backend.decoder = decoder
    assert ByteRule.of(backend) == expected


def test_a_tokenizer_whose_words_depend_on_their_neighbours():
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"the": 0, "token": 1, "##izer": 2, ".": 3}
    backend = Backend(models.WordPiece(vocabulary, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    stream = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend)).stream([], True)
    assert [stream.add(i) for i in (0, 1, 2, 1)] == ["the", " token", "izer", " token"]


def test_no_spaces_between_special_tokens():
    """For a decoder that puts a space before each token: special tokens in a row then have none between them."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    backend.add_special_tokens([AddedToken("<a>"), AddedToken("<b>")])
    backend.decoder = decoders.WordPiece(prefix="##")
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))

    def text(skip, spaces):
        stream = tokenizer.stream([], skip, spaces)
        assert isinstance(stream, WindowStream)
        return "".join(map(stream.add, [0, 2, 3, 3, 1, 2]))

    assert text(False, True) == "one <a> <b> <b> two <a>" and text(False, False) == "one <a><b><b> two <a>"
    assert text(True, False) == text(True, True) == "one two"
    ours = TOKENIZER.stream([], False, False)  # a decoder that puts none anywhere
    assert "".join(map(ours.add, [0, 1])) == HF.decode([0, 1])
