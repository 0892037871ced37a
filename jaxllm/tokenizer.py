"""Text to tokens and back, and chat messages to text: what the engine needs of a transformers tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.chat_format import CHAT_FORMATS, ChatFormat, format_of, read_template
from jaxllm.detokenizer import PRIMING_TOKENS, ByteRule, ByteStream, TextStream, WindowStream
from jaxllm.tokenizer_formats.folder import load_folder, read_json
from jaxllm.tokenizer_formats.parts import REMEDIES


class Tokenizer:
    """A transformers tokenizer, which stays reachable as `hf`.

    Args:
      hf: the transformers tokenizer.
      config: the model's config.json; with `name` it decides the chat format where the tokenizer carries no template.
      name: the model's name, the last part of its path.
    """

    def __init__(self, hf: Any, config: Mapping[str, Any] | None = None, name: str = "") -> None:
        self.hf = hf
        self._backend = getattr(hf, "backend_tokenizer", None) or getattr(hf, "_tokenizer", None)
        self._rule = None if self._backend is None else ByteRule.of(self._backend)
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._special_ids = self._find_special_ids()
        self._id_limit: int | None = None
        self._format: ChatFormat | None = format_of(config or {}, name, self._has_special)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        trust_remote_code: bool = False,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Tokenizer:
        """From a folder with tokenizer files.

        Args:
          trust_remote_code: run the folder's own Python code, if its format is unknown.
          config: the model's config.json; None: the folder's own.
          name: the model's name, the last part of its path; None: the folder's.
        Raises: TokenizerNotFound, with the remedies.
        """
        folder = Path(folder)
        hf = load_folder(folder, trust_remote_code=trust_remote_code)
        return cls(hf, read_json(folder / "config.json") if config is None else config, name or folder.resolve().name)

    @property
    def eos_token_id(self) -> int | None:
        return self.hf.eos_token_id

    @property
    def end_of_turn_ids(self) -> list[int]:
        """Tokens besides the end of sequence that end an answer in the model's chat format."""
        ends = () if self._format is None else self._format.ends
        return [self.hf.convert_tokens_to_ids(token) for token in ends]

    def fit_vocabulary(self, size: int) -> None:
        """Makes sure that no token goes beyond a model's vocabulary of `size` tokens.

        Some checkpoints add a special token that the model has no embedding for (padding, images); it is an error only
        in a prompt. Raises ValueError if an ordinary token is beyond.
        """
        beyond = {token: i for token, i in self.hf.get_vocab().items() if i >= size}
        ordinary = {token: i for token, i in beyond.items() if i not in self._special_ids}
        if ordinary:
            token = min(ordinary, key=ordinary.__getitem__)
            raise ValueError(
                f"tokenizer: {len(ordinary)} of its tokens are beyond the model's vocabulary (vocab_size={size}), the "
                f"first {token!r} with id {ordinary[token]}: it is another model's. {REMEDIES}"
            )
        self._id_limit = size if beyond else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens in the text become what they spell.

        Args:
          add_special_tokens: begin (and end) as the model expects. A chat prompt has them already.
        """
        return self._checked(self.hf.encode(text, add_special_tokens=add_special_tokens))

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Two texts as the tokenizer joins them, for models that compare them."""
        return self._checked(self.hf(first, text_pair=second)["input_ids"])

    def encode_all(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, which the tokenizers library does in parallel."""
        if not texts:
            return []
        return [self._checked(ids) for ids in self.hf(texts, add_special_tokens=add_special_tokens)["input_ids"]]

    def token_text(self, token_id: int) -> str:
        """The text of one token, special ones included."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.hf.decode([token_id])
        return text

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: ends, roles, padding."""
        return self._special_ids

    def token_bytes(self, size: int) -> list[bytes]:
        """The bytes of the tokens 0 to size - 1; b"" for an id that no token has.

        Raises: ValueError if they depend on a token's neighbours.
        """
        if self._rule is None:
            raise ValueError("the tokenizer's tokens have no bytes of their own: its decoder is of an unknown kind")
        return [self._bytes_of(token_id) for token_id in range(size)]

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The messages as one prompt, to be encoded without special tokens of the tokenizer's own.

        Args:
          messages: dicts with "role" and "content", as in OpenAI's API.
          tools: JSON descriptions of functions, as there.
          chat_template: Jinja text, a file with it, or the name of a format (`jaxllm.chat_format`); None: the
            tokenizer's, or else the published format of the model.
          add_generation_prompt: end with what begins an answer.
          continue_final_message: leave the last message open, for the answer to go on with it.
          kwargs: variables for the template.
        Raises: ValueError if there is no template, or if it does not take these messages or tools.
        """
        from jinja2 import TemplateError

        template = self._template(chat_template, tools)
        try:
            return self.hf.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **kwargs,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"messages do not fit the chat template: {error}") from error

    def stream(
        self, prompt_token_ids: list[int], skip_special_tokens: bool, spaces_between_special_tokens: bool = True
    ) -> TextStream:
        """A detokenizer for what follows this prompt."""
        tail = prompt_token_ids[-PRIMING_TOKENS:]
        if self._rule is not None:
            skipped = self._special_ids if skip_special_tokens else frozenset()
            return ByteStream(self._bytes_of, tail, skipped, self._rule.strips_first_space)  # it adds no spaces
        added = {} if skip_special_tokens or spaces_between_special_tokens else self.hf.added_tokens_decoder
        joined = {token: one.content for token, one in added.items()}
        return WindowStream(lambda ids: self.hf.decode(ids, skip_special_tokens=skip_special_tokens), tail, joined)

    # --- vocabulary

    def _find_special_ids(self) -> frozenset[int]:
        if self._backend is None:
            return frozenset(self.hf.all_special_ids)
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def _has_special(self, token: str) -> bool:
        return self.hf.convert_tokens_to_ids(token) in self._special_ids

    def _bytes_of(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id)  # None: one of the rows that pad a vocabulary
            found = self._bytes[token_id] = b"" if token is None else self._rule.bytes_of(token)
        return found

    def _checked(self, ids: list[int]) -> list[int]:
        if self._id_limit is not None:
            for i in ids:
                if i >= self._id_limit:
                    raise ValueError(
                        f"prompt has the special token {self.token_text(i)!r} (id {i}), which is beyond the model's "
                        f"vocabulary of {self._id_limit} tokens"
                    )
        return ids

    # --- chat templates

    def _template(self, wanted: str | os.PathLike[str] | None, tools: Any) -> str | None:
        """The template to use; None for the tokenizer's own."""
        own = self.hf.chat_template
        if (wanted is None and own) or (isinstance(own, dict) and wanted in own):
            return wanted
        chosen = self._format if wanted is None else CHAT_FORMATS.get(str(wanted))
        if chosen is not None:
            if tools and not chosen.tools:
                raise ValueError("tools: the model's chat format has no place for them; pass a chat_template that does")
            return chosen.template
        if wanted is not None:
            return read_template(wanted)
        raise ValueError(
            "the tokenizer has no chat template, and the model is none whose format is known. Pass chat_template=: "
            f"Jinja text, a file with it, or one of {', '.join(CHAT_FORMATS)}"
        )
