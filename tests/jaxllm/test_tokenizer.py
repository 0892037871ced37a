"""Text as it grows: whatever the tokens, its pieces add up to what decoding all of them at once gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.loading import DEFAULT_MODEL
from jaxllm.tokenizer import Tokenizer, TokenizerNotFound, _BackendStream, _PrefixStream

TOKENIZER = Tokenizer.load(DEFAULT_MODEL)
HF = TOKENIZER.hf
SPECIAL = frozenset(HF.all_special_ids)
INCOMPLETE = [i for i in range(len(HF)) if HF.decode([i]) == "\ufffd"]  # single bytes that are no character

TOKENS = st.one_of(st.integers(0, len(HF) - 1), st.sampled_from(INCOMPLETE))
# No text that spells a special token: that is a token without text.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20).filter(
    lambda text: "<|" not in text
)


def backend_stream(prompt=(), skip=True):
    return TOKENIZER.stream(list(prompt), skip)


def prefix_stream(prompt=(), skip=True):
    return _PrefixStream(HF, list(prompt), skip, True)


STREAMS = pytest.mark.parametrize("make", [backend_stream, prefix_stream])


def decode(ids, skip=True):
    return HF.decode(ids, skip_special_tokens=skip)


def test_each_stream_is_what_it_is_called():
    assert isinstance(backend_stream(), _BackendStream) and isinstance(prefix_stream(), _PrefixStream)


@STREAMS
@settings(max_examples=200, deadline=None)
@given(ids=st.lists(TOKENS, max_size=40), skip=st.booleans())
def test_pieces_are_the_text_up_to_what_may_still_be_incomplete(make, ids, skip):
    stream, text = make(skip=skip), ""
    for i, token in enumerate(ids, 1):
        text += stream.add(token)
        whole = decode(ids[:i], skip)
        assert whole.startswith(text)  # what is given out is never taken back
        assert text == whole or whole.endswith("\ufffd")  # and only for the sake of a character is anything kept


@STREAMS
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_characters_come_whole_and_at_once(make, text):
    stream, shown = make(), ""
    ids = HF.encode(text)
    for i, token in enumerate(ids, 1):
        shown += stream.add(token)
        assert shown == decode(ids[:i]).rstrip("\ufffd")
        assert text.startswith(shown)
    assert shown == text


@STREAMS
@pytest.mark.parametrize(
    "text", ["🙂👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿", "漢字とかな", "naïve Ångström — “quoted”", "  two  spaces\n\n\tand a tab"]
)
def test_multi_byte_characters(make, text):
    stream = make()
    pieces = [stream.add(token) for token in HF.encode(text)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert text.isascii() or "" in pieces  # some character took several tokens


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, special=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(sorted(SPECIAL))), max_size=4))
def test_both_streams_give_the_same_pieces(text, special):
    ids = HF.encode(text)
    for at, token in special:
        ids.insert(min(at, len(ids)), token)
    for skip in (True, False):
        one, other = backend_stream(skip=skip), prefix_stream(skip=skip)
        pieces = [(one.add(token), other.add(token)) for token in ids]
        assert "".join(a for a, _ in pieces) == "".join(b for _, b in pieces)


@STREAMS
@settings(max_examples=100, deadline=None)
@given(prompt=TEXTS, text=TEXTS)
def test_text_goes_on_from_the_prompt(make, prompt, text):
    stream = make(HF.encode(prompt))
    assert "".join(map(stream.add, HF.encode(text))) == text


@STREAMS
def test_special_tokens(make):
    ids = [*HF.encode("one"), 0, *HF.encode(" two"), 1]
    for skip, expected in ((True, "one two"), (False, "one<|endoftext|> two<|end|>")):
        assert "".join(map(make(skip=skip).add, ids)) == expected


def test_no_spaces_between_special_tokens():
    """For a decoder that puts a space before each token: special tokens in a row then have none between them."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    backend.add_special_tokens([AddedToken("<a>"), AddedToken("<b>")])
    backend.decoder = decoders.WordPiece(prefix="##")
    ids = [0, 2, 3, 3, 1, 2]

    def text(spaces):
        joined = {} if spaces else {2: "<a>", 3: "<b>"}
        return "".join(map(_BackendStream(backend, [], frozenset(), joined).add, ids))

    assert text(True) == "one <a> <b> <b> two <a>" and text(False) == "one <a><b><b> two <a>"
    for skip in (True, False):  # the parameter reaches both kinds of streams
        streams = TOKENIZER.stream([], skip, False), _PrefixStream(HF, [], skip, False)
        assert len({"".join(map(stream.add, [0, 1, *HF.encode("one"), 1])) for stream in streams}) == 1


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self):
        self.decoded = 0

    def decode(self, ids, **kwargs):
        self.decoded += len(ids)
        return HF.decode(ids, **kwargs)


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(TOKENS, max_size=60), run=st.sampled_from([0, 1, INCOMPLETE[0], INCOMPLETE[-1]]))
def test_a_step_decodes_few_tokens_whatever_came_before(ids, run):
    counting = CountingTokenizer()
    stream = _PrefixStream(counting, [], True, True)
    for token in ids + [run] * 100 + ids:  # a run of what gives no text must not pile up either
        before = counting.decoded
        stream.add(token)
        assert counting.decoded - before <= 48


def test_no_tokenizer_says_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerNotFound, match=r"(?s)holds none.*Pass tokenizer=.*skip_tokenizer_init=True"):
        Tokenizer.load(tmp_path)


def test_chat_without_a_template():
    plain = Tokenizer.load(DEFAULT_MODEL)
    plain.hf.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        plain.chat_prompt([{"role": "user", "content": "Hello"}])


def test_token_text_shows_special_tokens():
    assert TOKENIZER.token_text(0) == "<|endoftext|>" and TOKENIZER.eos_token_id == 0
