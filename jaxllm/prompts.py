"""Prompts and chat messages as callers give them, today's forms and vLLM 0.4's -> lists of one form. No tokens yet."""

from __future__ import annotations

import json
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


_OF_THE_TOKENIZER = {"conversation", "messages", "tokenize", "return_tensors", "return_dict", "tokenizer_kwargs"}


def checked_template_options(options: Any) -> dict[str, Any]:
    """`chat_template_kwargs`, which go before a call's own arguments. Raises TypeError and ValueError naming them."""
    if not isinstance(options, Mapping | None):
        raise TypeError(f"chat_template_kwargs must be a dict of variables for the template, got {options!r:.100}")
    for name in (options or {}).keys() & _OF_THE_TOKENIZER:
        raise ValueError(f"chat_template_kwargs must not hold {name!r}: it is no variable of a template")
    return dict(options or {})


def _checked(conversation: Any) -> list[Mapping[str, Any]]:
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise TypeError(f"messages: a conversation must be a non-empty list of messages, got {conversation!r:.100}")
    for message in conversation:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f'messages: a message must be a dict with "role" and "content", got {message!r:.100}')
    return list(conversation)


def _as_text(message: Mapping[str, Any]) -> Message:
    message, content = _with_arguments(message), message.get("content")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, Sequence):
        raise TypeError(f"messages: content must be text or a list of parts, got {content!r:.100}")
    return {**message, "content": "\n".join(_text_of(part) for part in content)}


def _with_arguments(message: Mapping[str, Any]) -> Message:
    """The arguments of tool calls, JSON in OpenAI's messages, as the dicts that templates write themselves."""
    calls = message.get("tool_calls")
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    return others | {"tool_calls": [_with_dict(call) for call in calls]} if calls else others


def _with_dict(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments) if arguments else {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"messages: tool_calls[...].function.arguments must be JSON, got {arguments!r:.100}: {error}"
        ) from error
    return {**call, "function": {**function, "arguments": parsed}}


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
