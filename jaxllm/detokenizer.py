"""Text from tokens as they come, in constant time a token and never half a character."""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

PRIMING_TOKENS = 6  # prompt tokens that a stream sees first, since a token's text can depend on the one before
_MAX_PENDING = 8  # tokens without a complete character, after which the first of them are taken for none
_REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    def add(self, token_id: int) -> str:
        """The text that this token completes: "" while a character is still incomplete."""
        ...

    def fork(self) -> TextStream:
        """A stream of its own that goes on from here."""
        ...


@dataclass(frozen=True)
class ByteRule:
    """How a tokenizer's decoder turns one token into bytes, where it does so whatever the tokens around it.

    Attributes:
      byte_level: each character of a token stands for a byte, as in GPT-2.
      space: the character that stands for a space; "" for none.
      byte_fallback: `<0xE4>` is the byte 0xE4.
      strips_first_space: the space before the first word is not part of the text (sentencepiece's dummy prefix).
    """

    byte_level: bool = False
    space: str = ""
    byte_fallback: bool = False
    strips_first_space: bool = False

    @classmethod
    def of(cls, backend: Any) -> ByteRule | None:
        """The rule of a `tokenizers.Tokenizer`; None if its decoder is of another kind."""
        if backend.decoder is None:
            return None
        try:
            state = json.loads(backend.decoder.__getstate__())
        except Exception:  # a decoder written in Python has no state, and says so by a bare Exception
            return None
        fields: dict[str, Any] = {}
        for step in state["decoders"] if state["type"] == "Sequence" else [state]:
            match step:
                case {"type": "ByteLevel"}:
                    fields["byte_level"] = True
                case {"type": "ByteFallback"}:
                    fields["byte_fallback"] = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": str(space)}, "content": " "} if len(space) == 1:
                    fields["space"] = space
                case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                    fields["strips_first_space"] = True
                case {"type": "Metaspace", "replacement": space, "prepend_scheme": scheme}:
                    fields |= {"space": space, "strips_first_space": scheme != "never"}
                case _:
                    return None
        return cls(**fields)

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token is written as it is
                return token.encode()
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return (token.replace(self.space, " ") if self.space else token).encode()


class ByteStream:
    """For tokens that are bytes whatever their neighbours: at most the three bytes of a begun character are kept back.

    Bytes that are no UTF-8 become U+FFFD as soon as that is certain, one for each maximal part of a character.
    """

    def __init__(
        self, bytes_of: Callable[[int], bytes], prompt_token_ids: Iterable[int], skipped: frozenset[int], strip: bool
    ) -> None:
        self._bytes_of, self._skipped = bytes_of, skipped
        self._strip = strip  # the text's first space is still to come, and to be left out
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in prompt_token_ids:
            self.add(token)

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        text = self._decoder.decode(self._bytes_of(token_id))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def fork(self) -> ByteStream:
        other = copy.copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        other._decoder.setstate(self._decoder.getstate())
        return other


class WindowStream:
    """For any other tokenizer: decodes a short window twice a token and takes the difference.

    Args:
      joined: tokens that stand behind one another without a space, with their texts.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt_token_ids: Iterable[int],
        joined: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._decode = decode
        self._joined, self._after_joined = joined, False
        self._window = list(prompt_token_ids)
        self._read = len(self._window)  # tokens of the window whose text has been given out

    def add(self, token_id: int) -> str:
        piece = self._take(token_id)
        after, self._after_joined = self._after_joined, token_id in self._joined
        return self._joined[token_id] if after and self._after_joined else piece

    def fork(self) -> WindowStream:
        other = copy.copy(self)
        other._window = list(self._window)
        return other

    def _take(self, token_id: int) -> str:
        self._window.append(token_id)
        before, now = self._decode(self._window[: self._read]), self._decode(self._window)
        start, end = max(self._read - 1, 0), len(self._window)  # one token of context is enough
        if now.endswith(_REPLACEMENT) or len(now) <= len(before):
            if end - self._read < _MAX_PENDING:
                return ""
            end -= 3  # of an incomplete character there are three bytes at most
            now = self._decode(self._window[:end])
        self._window, self._read = self._window[start:], end - start
        return now[len(before) :]


def _byte_characters() -> dict[int, str]:
    """GPT-2's alphabet: a printable character for each byte, most of them the byte's own in Latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


CHARACTER_OF_BYTE = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
