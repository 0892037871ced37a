"""Text to tokens and back: a thin layer over transformers' tokenizers, and the incremental detokenizer."""

from __future__ import annotations

import os
from typing import Any, Protocol

_MAX_PENDING = 8  # tokens without a complete character, after which the first of them are taken for none
PRIMING_TOKENS = 6  # prompt tokens that the detokenizer sees first, since a token's text can depend on the one before


class TokenizerNotFound(ValueError):
    """No tokenizer where one was expected."""


class Tokenizer:
    """What the engine needs of a transformers tokenizer, which stays reachable as `hf`."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._backend = getattr(hf, "backend_tokenizer", None) or getattr(hf, "_tokenizer", None)
        added = self._backend.get_added_tokens_decoder() if self._backend is not None else {}
        self._special_ids = frozenset(token for token, one in added.items() if one.special)
        self._added_texts = {token: one.content for token, one in added.items()}
        self._token_texts: dict[int, str] = {}

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Tokenizer:
        """From a folder with tokenizer files. Raises TokenizerNotFound with the remedies if it has none."""
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TokenizerNotFound(
                f"tokenizer: {str(folder)!r} holds none that transformers can load ({error}). Pass tokenizer= (a "
                f"folder, a hub id or a tokenizer object), or skip_tokenizer_init=True to work with token ids alone"
            ) from error
        return cls(hf)

    @property
    def eos_token_id(self) -> int | None:
        return self.hf.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self.hf.encode(text)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, which the tokenizers library does in parallel."""
        return self.hf(texts)["input_ids"] if texts else []

    def encode_words(self, text: str) -> list[int]:
        """The text's tokens without those that frame a prompt (beginning of sequence, ...)."""
        return self.hf.encode(text, add_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """The text of one token, special ones included."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.hf.decode([token_id])
        return text

    def chat_prompt(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        """The messages as one prompt, by the tokenizer's chat template. Raises ValueError if it has none."""
        if not self.hf.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: chat needs a chat-tuned model, or a template of yours"
            )
        return self.hf.apply_chat_template(messages, tokenize=False, **({"add_generation_prompt": True} | kwargs))

    def stream(
        self, prompt_token_ids: list[int], skip_special_tokens: bool, spaces_between_special_tokens: bool = True
    ) -> TextStream:
        """A detokenizer for what follows this prompt."""
        if self._backend is not None:
            skipped = self._special_ids if skip_special_tokens else frozenset()
            joined = {} if skip_special_tokens or spaces_between_special_tokens else self._added_texts
            return _BackendStream(self._backend, prompt_token_ids, skipped, joined)
        return _PrefixStream(self.hf, prompt_token_ids, skip_special_tokens, spaces_between_special_tokens)


class TextStream(Protocol):
    def add(self, token_id: int) -> str:
        """The text that this token completes: "" while a character is still incomplete."""
        ...


class _BackendStream:
    """By the tokenizers library's own incremental decoder: O(1) a token.

    Args:
      joined: tokens that stand behind one another without a space: id -> text.
    """

    def __init__(
        self, backend: Any, prompt_token_ids: list[int], skipped: frozenset[int], joined: dict[int, str]
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._joined, self._after_joined = joined, False
        self._skipped = skipped  # left to the library, they would pile up in it until the next text
        self._new_stream = lambda: DecodeStream(skip_special_tokens=bool(skipped))
        self._stream = self._new_stream()
        for token in prompt_token_ids[-PRIMING_TOKENS:]:
            self.add(token)

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._step(token_id)
        is_joined = token_id in self._joined
        joins = is_joined and self._after_joined
        self._after_joined = is_joined
        return self._joined[token_id] if joins else piece

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception as error:  # the library has no class of its own for it
            if "nvalid prefix" not in str(error):
                raise
            # Bytes that are no text in any encoding can leave the decoder without a valid prefix: begin afresh.
            self._stream = self._new_stream()
            return self._stream.step(self._backend, token_id) or ""


class _PrefixStream:
    """For tokenizers in pure Python: decodes a short window twice a token and takes the difference."""

    def __init__(
        self, hf: Any, prompt_token_ids: list[int], skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> None:
        options = {} if spaces_between_special_tokens else {"spaces_between_special_tokens": False}
        self._decode = lambda ids: hf.decode(ids, skip_special_tokens=skip_special_tokens, **options)
        self._window = list(prompt_token_ids[-PRIMING_TOKENS:])
        self._read = len(self._window)  # tokens of the window whose text has been given out

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        before, now = self._decode(self._window[: self._read]), self._decode(self._window)
        start, end = max(self._read - 1, 0), len(self._window)  # one token of context is enough
        if now.endswith("\ufffd") or len(now) <= len(before):
            if end - self._read < _MAX_PENDING:
                return ""
            end -= 3  # of an incomplete character there are three bytes at most
            now = self._decode(self._window[:end])
        self._window, self._read = self._window[start:], end - start
        return now[len(before) :]
