"""What the formats share: merges from ranks, special tokens, and the transformers tokenizer around all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


REMEDIES = (
    "Pass tokenizer= (a folder, a hub id or a tokenizer object), or skip_tokenizer_init=True to work with token ids "
    "alone"
)


class TokenizerNotFound(ValueError):
    """No tokenizer where one was expected."""


def merges_of(ranked: Iterable[str], vocabulary: Set[str]) -> list[tuple[str, str]]:
    """The merges that build tokens, in order: all ways to make each from two others.

    A merge loop that always takes the best-ranked pair, and the leftmost of equals (tiktoken, sentencepiece), gives the
    same tokens by these merges. That a token has several of them does no harm: how the text between two token borders
    is cut depends on nothing outside as long as no merge crosses them, so only one of its pairs can ever meet.

    Args:
      ranked: tokens, best first, no two of the same rank.
      vocabulary: all tokens.
    """
    return [
        (token[:i], token[i:])
        for token in ranked
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]


def add_special(backend: Any, tokens: Iterable[str], *, normalized: bool = False) -> None:
    """Adds special tokens, which take the next ids unless they are in the vocabulary.

    One that is a word ("sop") is special only where it stands alone.
    """
    from tokenizers import AddedToken

    backend.add_special_tokens(
        [AddedToken(token, normalized=normalized, single_word=token.isalpha(), special=True) for token in tokens]
    )


def surround(backend: Any, before: Sequence[str], after: Sequence[str] = ()) -> None:
    """Puts special tokens around every text that is encoded with them."""
    from tokenizers.processors import TemplateProcessing

    if before or after:
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
        )


def as_transformers(backend: Any, settings: dict[str, Any], **named: str) -> Any:
    """A transformers tokenizer around `backend`, with the tokens that tokenizer_config.json names.

    Args:
      settings: tokenizer_config.json.
      named: the format's own eos_token, ..., where the file names none.
    """
    from transformers import PreTrainedTokenizerFast

    named |= {name: token for name in _NAMED if (token := content(settings.get(name)))}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **{name: token for name, token in named.items() if backend.token_to_id(token) is not None},
        **{name: settings[name] for name in ("model_max_length",) if name in settings},
    )


def content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a token in a JSON file, which is written as a string or with its properties."""
    return token["content"] if isinstance(token, dict) else token
