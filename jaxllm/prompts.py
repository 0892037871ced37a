"""Prompts and chat messages as callers give them, today's forms and vLLM 0.4's -> lists of one form. No tokens yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from jaxllm.validation import check_known

Message = dict[str, Any]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, with its text or without."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]


PromptType = str | Sequence[int] | TextPrompt | TokensPrompt
"""What vLLM calls a prompt in whatever form."""


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or many -> many. A sequence of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a prompt or a sequence of prompts, got {prompts!r:.100}")
    if prompts and all(isinstance(token, int) for token in prompts):
        return [list(prompts)]
    return list(prompts)


def with_token_ids(prompts: Any, prompt_token_ids: Any) -> list[Any]:
    """The prompts of a call in vLLM 0.4's form: `prompt_token_ids` beside texts, or alone.

    Raises: ValueError if there are neither, or not as many of the one as of the other; TypeError for a bad value.
    """
    if prompt_token_ids is None:
        if prompts is None:
            raise ValueError("either prompts or prompt_token_ids must be given")
        return as_prompts(prompts)
    if isinstance(prompt_token_ids, bool):
        raise TypeError(
            f"prompt_token_ids must be lists of token ids, got {prompt_token_ids!r} (use_tqdm must be given by name)"
        )
    ids = as_prompts(prompt_token_ids)
    texts = [None] * len(ids) if prompts is None else as_prompts(prompts)
    if len(texts) != len(ids):
        raise ValueError(f"prompt_token_ids has {len(ids)} entries for {len(texts)} prompts")
    for text in texts:
        if not isinstance(text, str | None):
            raise TypeError(f"prompts beside prompt_token_ids must be text, got {text!r:.100}")
    return [{"prompt": text, "prompt_token_ids": one} for text, one in zip(texts, ids, strict=True)]


def as_conversations(messages: Any) -> list[list[Message]]:
    """One conversation or many -> many, each message's content as text.

    Raises: TypeError for what is no conversation; ValueError for a content part that is not text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TypeError(f"messages must be a list of messages or of such lists, got {messages!r:.100}")
    conversations = [messages] if isinstance(messages[0], Mapping) else messages
    return [[_as_text(message) for message in _checked(one)] for one in conversations]


def _checked(conversation: Any) -> list[Mapping[str, Any]]:
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise TypeError(f"messages: a conversation must be a non-empty list of messages, got {conversation!r:.100}")
    for message in conversation:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f'messages: a message must be a dict with "role" and "content", got {message!r:.100}')
    return list(conversation)


def _as_text(message: Mapping[str, Any]) -> Message:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        raise TypeError(f"messages: content must be text or a list of parts, got {content!r:.100}")
    return {**message, "content": "\n".join(_text_of(part) for part in content)}


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f'messages: a content part must be {{"type": "text", "text": ...}}, got one of type {kind!r}: this model '
            f"takes text alone"
        )
    return part["text"]


_REFUSED = {
    "lora_request": "adapters are merged while loading, LLM(lora=folder)",
    "multi_modal_data": "this model takes text alone",
    "mm_processor_kwargs": "this model takes text alone",
    "tokenization_kwargs": "truncate_prompt_tokens is a field of SamplingParams and PoolingParams",
}
"""vLLM's arguments of requests that are not honoured, and why."""


def refuse(**fields: Any) -> None:
    """Raises ValueError for one of vLLM's arguments that is given and not honoured, TypeError for an unknown one."""
    check_known(fields, _REFUSED, "a request")
    for name, value in fields.items():
        if value is not None:
            raise ValueError(f"{name} must be None, got {value!r:.100}: {_REFUSED[name]}")
