"""tiktoken's vocabulary files, of Qwen v1 and GLM-4: a line holds a token in base64 and its rank, which is its id."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jaxllm.detokenizer import CHARACTER_OF_BYTE
from jaxllm.tokenizer_formats.parts import TokenizerNotFound, add_special, as_transformers, merges_of, surround

# The pattern that cuts text into words before the merges, as published; the two models differ in digits.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_WORDS = _WORDS % r"\p{N}"
GLM4_WORDS = _WORDS % r"\p{N}{1,3}"

# Special tokens, whose ids follow those of the file.
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
GLM4_SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


def is_tiktoken(file: Path) -> bool:
    """Whether the file is tiktoken's text; sentencepiece's, which may have the same name, is binary."""
    with file.open("rb") as opened:
        line = opened.readline(1000).split()
    return len(line) == 2 and line[1].isdigit()


def qwen(file: Path, settings: dict[str, Any]) -> Any:
    """Qwen v1: no beginning of sequence; Unicode's normal form C, before special tokens are looked for."""
    from tokenizers import normalizers

    backend = byte_level_bpe(file, QWEN_WORDS)
    backend.normalizer = normalizers.NFC()
    add_special(backend, QWEN_SPECIAL, normalized=True)
    return as_transformers(backend, settings, eos_token="<|endoftext|>")


def glm4(file: Path, settings: dict[str, Any]) -> Any:
    """GLM-4: every text begins with [gMASK]<sop>."""
    backend = byte_level_bpe(file, GLM4_WORDS)
    add_special(backend, GLM4_SPECIAL)
    surround(backend, ["[gMASK]", "<sop>"])
    return as_transformers(backend, settings, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def byte_level_bpe(file: Path, words: str) -> Any:
    """The file's ranks as merges: a word that is a token stays whole, any other is merged by rank."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = _read(file)
    ranked = sorted(vocabulary, key=vocabulary.__getitem__)
    backend = Tokenizer(models.BPE(vocabulary, merges_of(ranked, vocabulary.keys()), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _read(file: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line:
            try:
                token, rank = line.split()
                text = base64.b64decode(token, validate=True).decode("latin-1")  # a character for each byte
                vocabulary[text.translate(CHARACTER_OF_BYTE)] = int(rank)
            except ValueError as error:
                raise TokenizerNotFound(
                    f"tokenizer: {file}, line {number}, must hold a token in base64 and its rank, got {line[:80]!r}"
                ) from error
    return vocabulary
