"""sentencepiece's `tokenizer.model`, of Llama 2, Vicuna, Yi, Baichuan, Chinese-Alpaca, ChatGLM2 and 3.

The file is a protocol buffer (sentencepiece_model.proto), of which a few fields are read here. A byte-pair model whose
scores put its pieces in order becomes merges. Where they don't (Chinese-Alpaca's added pieces all have score 0, and
the leftmost pair goes first) and where text is changed first, the sentencepiece library cuts it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.tokenizer_formats.parts import TokenizerNotFound, add_special, as_transformers, content, merges_of, surround

# Special tokens of ChatGLM2 and 3, whose ids follow those of the file.
CHATGLM_SPECIAL = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip

_SPACE = "▁"
_BPE = 2  # TrainerSpec.model_type
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # SentencePiece.type
_ORDINARY = {_NORMAL, _UNKNOWN, _CONTROL, 6}  # 6: a byte; others are cut in ways that merges cannot say


@dataclass(frozen=True)
class Model:
    """A ModelProto's fields that decide how text is cut.

    Attributes:
      proto: the file.
      pieces: (text, score, SentencePiece.type) by token id.
      byte_pairs: pieces are merged from characters, the best score first.
      byte_fallback: a character that is no piece becomes its bytes, which are.
      charsmap: compiled normalization rules; b"" for none.
      dummy_prefix: text begins with a space, whether it does or not.
      one_space: of several spaces one is left, and none at either end.
    """

    proto: bytes
    pieces: list[tuple[str, float, int]]
    byte_pairs: bool
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    one_space: bool

    @classmethod
    def read(cls, file: Path) -> Model:
        """Raises TokenizerNotFound if the file is no sentencepiece model."""
        proto = file.read_bytes()
        try:
            pieces = [_piece(value) for number, value in _fields(proto) if number == 1]
            sections = {number: dict(_fields(value)) for number, value in _fields(proto) if number in (2, 3)}
        except (IndexError, ValueError, TypeError, AttributeError, struct.error) as error:
            raise TokenizerNotFound(f"tokenizer: {file} is no sentencepiece model") from error
        trainer, normalizer = sections.get(2, {}), sections.get(3, {})
        return cls(
            proto=proto,
            pieces=pieces,
            byte_pairs=trainer.get(3) == _BPE,
            byte_fallback=bool(trainer.get(35, 0)),
            charsmap=normalizer.get(2, b""),
            dummy_prefix=bool(normalizer.get(3, 1)),
            one_space=bool(normalizer.get(4, 1)),
        )

    def of_type(self, *types: int) -> list[str]:
        return [text for text, _, type_ in self.pieces if type_ in types]

    @property
    def is_merges(self) -> bool:
        """Whether merges can say what the scores say: they put all pieces in order, and text is left as it is."""
        scores = [score for text, score, type_ in self.pieces if type_ == _NORMAL and len(text) > 1]
        ordered = len(set(scores)) == len(scores) and {type_ for _, _, type_ in self.pieces} <= _ORDINARY
        return self.byte_pairs and ordered and not self.charsmap and not self.one_space


def llama(model: Model, settings: dict[str, Any], added_tokens: dict[str, int]) -> Any:
    """A tokenizer of Llama's kind: <s> before every text unless tokenizer_config.json says otherwise.

    Args:
      settings: tokenizer_config.json. With `legacy` (the default, as published checkpoints had it) the text after a
        special token begins with a space like that at the start.
      added_tokens: added_tokens.json, {token: id}.
    """
    backend, cutter = _convert(model, after_special=settings.get("legacy") is not False)
    _add_tokens(backend, settings.get("added_tokens_decoder") or {}, added_tokens)
    bos, eos = content(settings.get("bos_token")) or "<s>", content(settings.get("eos_token")) or "</s>"
    starts, ends = settings.get("add_bos_token") is not False, settings.get("add_eos_token") is True
    surround(backend, [bos] * starts, [eos] * ends)
    hf = as_transformers(backend, settings, bos_token=bos, eos_token=eos, unk_token="<unk>")
    return _cut_by(hf, cutter)


def chatglm(model: Model, settings: dict[str, Any]) -> Any:
    """ChatGLM2 and 3: every text begins with [gMASK]sop."""
    backend, cutter = _convert(model, after_special=True)
    add_special(backend, CHATGLM_SPECIAL)
    surround(backend, ["[gMASK]", "sop"])
    return _cut_by(as_transformers(backend, settings, eos_token="</s>", unk_token="<unk>", pad_token="<unk>"), cutter)


def _convert(model: Model, *, after_special: bool) -> tuple[Any, _Cutter | None]:
    """The model as a tokenizers.Tokenizer, and what must cut the text for it if merges can't."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    by_merges = model.is_merges and (after_special or not model.dummy_prefix)
    vocabulary = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    merges = _merges(model) if by_merges else []
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=next(iter(model.of_type(_UNKNOWN)), None),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=not by_merges,
        )
    )
    space = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(space + [decoders.Strip(" ", 1, 0)] * model.dummy_prefix)
    add_special(backend, model.of_type(_UNKNOWN, _CONTROL))
    if not by_merges:
        return backend, _Cutter(model.proto, after_special)
    prefix = [normalizers.Prepend(_SPACE)] * model.dummy_prefix
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    return backend, None


def _merges(model: Model) -> list[tuple[str, str]]:
    normal = [(score, text) for text, score, type_ in model.pieces if type_ == _NORMAL]
    ranked = [text for _, text in sorted(normal, key=lambda pair: -pair[0])]
    return merges_of(ranked, set(ranked))


class _Cutter:
    """A pre-tokenizer: normalizes text and cuts it into pieces, both by the sentencepiece library."""

    # Fields of normalizer_spec; appended to the file they replace its own.
    _NO_PREFIX = bytes([0x1A, 2, 0x18, 0])
    _NOTHING = bytes([0x1A, 8, 0x12, 0, 0x18, 0, 0x20, 0, 0x28, 0])  # no rules, and spaces stay as they are

    def __init__(self, proto: bytes, after_special: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        self._first = SentencePieceProcessor(model_proto=proto)
        self._later = self._first if after_special else SentencePieceProcessor(model_proto=proto + self._NO_PREFIX)
        self._cut = SentencePieceProcessor(model_proto=proto + self._NOTHING)

    def pre_tokenize(self, text: Any) -> None:
        text.split(self._pieces)

    def _pieces(self, index: int, segment: Any) -> list[Any]:
        from tokenizers import NormalizedString

        text = (self._later if index else self._first).normalize(segment.normalized)
        found = _fields(self._cut.encode(text, out_type="serialized_proto"))  # SentencePieceText
        surfaces = [dict(_fields(piece)).get(3) for number, piece in found if number == 2]
        # A character that became bytes has several pieces, one of them with the whole of it.
        return [NormalizedString(surface.decode()) for surface in surfaces if surface]


def _cut_by(hf: Any, cutter: _Cutter | None) -> Any:
    from tokenizers.pre_tokenizers import PreTokenizer

    if cutter is not None:  # only now: one in Python can't be copied
        hf.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(cutter)
    return hf


def _add_tokens(backend: Any, decoder: dict[str, Any], added: dict[str, int]) -> None:
    """Adds the tokens that were given to the tokenizer after its training, in the order of their ids."""
    from tokenizers import AddedToken

    tokens = {int(i): AddedToken(**{**token, "normalized": False}) for i, token in decoder.items()}
    for text, i in added.items():
        tokens.setdefault(i, AddedToken(text, normalized=False, special=True))
    for i, token in sorted(tokens.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != i:
            raise TokenizerNotFound(
                f"tokenizer: added token {token.content!r} has id {i} in its file, but would be "
                f"{backend.token_to_id(token.content)} after tokenizer.model's {backend.get_vocab_size(False)} pieces"
            )


# --- protocol buffers: a message is a row of (field number, wire type) keys, each followed by its value


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    return fields[1].decode(), fields.get(2, 0.0), fields.get(3, _NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: an int, a float or bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        elif wire_type == 2:
            size, position = _varint(message, position)
            value, position = message[position : position + size], position + size
            if len(value) < size:
                raise ValueError("the message ends early")
        elif wire_type in (1, 5):
            code, size = ("<d", 8) if wire_type == 1 else ("<f", 4)
            (value,) = struct.unpack_from(code, message, position)
            position += size
        else:
            raise ValueError(f"wire type {wire_type}")
        yield number, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
