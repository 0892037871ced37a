"""A folder's tokenizer files -> a transformers tokenizer; the folder's own code runs only if its format is unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxllm.tokenizer_formats import sentencepiece_file, tiktoken_file
from jaxllm.tokenizer_formats.parts import REMEDIES, TokenizerNotFound

# Classes whose tokenizer.model, a sentencepiece file, says all of it.
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "BaichuanTokenizer", "BaiChuanTokenizer", "YiTokenizer")


def load_folder(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer of a folder, with its chat template if it has one.

    Args:
      trust_remote_code: run the folder's own Python code if its format is unknown.
    Raises: TokenizerNotFound, with the remedies: there is none, a file is broken, a library is missing, or code would
      have to run.
    """
    settings = read_json(folder / "tokenizer_config.json")
    try:
        hf = _known_format(folder, settings) or _by_transformers(folder, settings, trust_remote_code)
    except ImportError as error:
        raise TokenizerNotFound(
            f"tokenizer: {str(folder)!r} needs a library that is not installed: pip install 'jaxllm[tokenizers]' "
            f"({error})"
        ) from error
    hf.chat_template = hf.chat_template or _chat_template(folder, settings)
    return hf


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TokenizerNotFound(f"tokenizer: {path} is not valid JSON: {error}") from error


def _known_format(folder: Path, settings: dict[str, Any]) -> Any | None:
    if (folder / "qwen.tiktoken").is_file():
        return tiktoken_file.qwen(folder / "qwen.tiktoken", settings)
    model, cls = folder / "tokenizer.model", (settings.get("tokenizer_class") or "").removesuffix("Fast")
    if not model.is_file():
        return None
    if cls in ("ChatGLMTokenizer", "ChatGLM4Tokenizer"):
        if tiktoken_file.is_tiktoken(model):
            return tiktoken_file.glm4(model, settings)
        return sentencepiece_file.chatglm(sentencepiece_file.Model.read(model), settings)
    if cls not in _SENTENCEPIECE_CLASSES or (folder / "tokenizer.json").is_file():
        return None  # a tokenizer.json was made from it, and has whatever was added since
    pieces = sentencepiece_file.Model.read(model)
    if not pieces.byte_pairs:
        return None
    return sentencepiece_file.llama(pieces, settings, read_json(folder / "added_tokens.json"))


def _by_transformers(folder: Path, settings: dict[str, Any], trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    code, cls = _remote_code(settings), (settings.get("tokenizer_class") or "").removesuffix("Fast")
    complete = (folder / "tokenizer.json").is_file()  # it says all that the code would
    if code and not complete and not trust_remote_code:
        raise TokenizerNotFound(
            f"tokenizer: {str(folder)!r} is in a format that jaxllm does not know; to load it, its class {code[1]} in "
            f"{code[0]} would have to run. Read that file, and pass trust_remote_code=True if you trust it. Or else: "
            f"{REMEDIES}"
        )
    try:
        # transformers 5 builds Llama's anew, without the space that the file puts after special tokens.
        if complete and (code or cls in _SENTENCEPIECE_CLASSES):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenizerNotFound(
            f"tokenizer: {str(folder)!r} holds none that transformers can load ({error}). {REMEDIES}"
        ) from error


def _remote_code(settings: dict[str, Any]) -> tuple[str, str] | None:
    """The file and the class that transformers would run to load the tokenizer."""
    named = settings.get("auto_map") or {}
    classes = named if isinstance(named, list) else named.get("AutoTokenizer") or []
    found = next((one for one in reversed(classes) if one), None)
    if found is None:
        return None
    module, _, name = found.rpartition(".")
    return f"{module.replace('--', '/')}.py", name  # repository--module, if it is in another one


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template in a folder's files, in any of the places where they are kept; None if there is none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        return {one["name"]: one["template"] for one in template}
    return template
