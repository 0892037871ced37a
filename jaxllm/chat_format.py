"""Chat templates: those of models whose folders carry none, and the one that a user names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class ChatFormat:
    """A published chat format, and the models it belongs to.

    Attributes:
      file: the template's, in chat_templates/; without its suffix.
      config: values that the model's config.json must have.
      name: a pattern that must be found in the model's name, lower case.
      tokens: special tokens that the tokenizer must have.
      ends: those that end an answer, besides the end of sequence.
      default_system: the system message of a conversation without one.
      tools: whether the format has a place for tools.
    """

    file: str
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    tokens: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    default_system: str = ""
    tools: bool = False

    @property
    def template(self) -> str:
        default = f"{{%- set default_system = {self.default_system!r} -%}}\n"
        return default + (_FOLDER / f"{self.file}.jinja").read_text(encoding="utf-8")


_HELPFUL = "You are a helpful assistant."
_LLAMA = {"model_type": "llama"}
_CHATGLM = {"model_type": "chatglm"}
_ROLES = ("<|user|>", "<|observation|>")  # what comes after an answer
CHAT_FORMATS = {
    "glm-4": ChatFormat("glm-4", _CHATGLM, tokens=("[gMASK]", "<sop>", *_ROLES), ends=_ROLES, tools=True),
    # ChatGLM2 has the same files and another format.
    "chatglm3": ChatFormat(
        "chatglm3", _CHATGLM, "^(?!.*chatglm-?2)", tokens=("[gMASK]", "sop", *_ROLES), ends=_ROLES, tools=True
    ),
    "qwen": ChatFormat(
        "chatml", {"model_type": "qwen"}, tokens=("<|im_start|>",), ends=("<|im_end|>",), default_system=_HELPFUL
    ),
    "yi": ChatFormat("chatml", _LLAMA, r"\byi-.*chat", tokens=("<|im_start|>",), ends=("<|im_end|>",)),
    "baichuan2": ChatFormat("baichuan2", {"model_type": "baichuan", "vocab_size": 125696}),
    "chinese-alpaca-2": ChatFormat(
        "llama-2", _LLAMA, "chinese-alpaca-2", default_system=f"{_HELPFUL} 你是一个乐于助人的助手。"
    ),
    "llama-2": ChatFormat("llama-2", _LLAMA, "llama-?2.*chat"),
    "vicuna": ChatFormat(
        "vicuna",
        _LLAMA,
        "vicuna",
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    ),
}
"""By the name under which a user can ask for one; the first that fits a model is the model's."""


def format_of(config: Mapping[str, Any], name: str, has_token: Callable[[str], bool]) -> ChatFormat | None:
    """The chat format of a model.

    Args:
      config: config.json.
      name: the model's name, the last part of its path.
      has_token: whether the tokenizer has a special token.
    """
    names = f"{name} {config.get('_name_or_path', '')}".lower()
    for one in CHAT_FORMATS.values():
        if (
            one.config.items() <= dict(config).items()
            and re.search(one.name, names)
            and all(map(has_token, one.tokens))
        ):
            return one
    return None


def read_template(value: str | Path) -> str:
    """A template as a user gives it: Jinja text, or the path of a file with it.

    Raises: ValueError if it is neither.
    """
    if isinstance(value, str) and any(character in value for character in "{}\n"):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"chat_template={str(value)!r} is neither a Jinja template, nor a file ({error.strerror}), nor one of "
            f"{', '.join(CHAT_FORMATS)}"
        ) from error
