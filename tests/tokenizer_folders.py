"""Tiny tokenizers in the formats that models ship, trained on a few lines by the libraries that made the real ones."""

import base64
import io
import json
from pathlib import Path

from jaxllm.detokenizer import BYTE_OF_CHARACTER

CORPUS = (
    "The scheduler hands out tokens, and the tokens come back as text: two  spaces, a\ttab, 1234567 and 3.14.",
    "def add(self, token_id):\n    return self._decoder.decode(self._bytes_of(token_id))",
    "你好世界，今天天气很好。你是谁？中文分词与字节回退，好人好事，世界和平。",
    "naïve Ångström — “quoted” ﬁn, 漢字とかな, 🙂👩‍👩‍👧‍👦, it's we'll I'd DON'T",
)
# What random texts are made of: pieces of the corpus, characters outside of it, and what is special to some format.
ALPHABET = [
    *"abcdehlotTS ▁\n\t.,(){}<>0123456789_'é你好世界人🙂\u200d\u0301\u0338\u3000ﬁſK\x00\x7f\xa0",
    "  ", "the", "scheduler", "token", "好人", "'s", "'LL", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "<0x41>", "<|im_end|>", "<s>",
]  # fmt: skip


def sentencepiece_model(**options) -> bytes:
    """A sentencepiece byte-pair model like Llama's, unless `options` of the trainer say otherwise."""
    from sentencepiece import SentencePieceTrainer

    defaults = dict(
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    out = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 3), model_writer=out, **(defaults | options))
    return out.getvalue()


def byte_level_bpe(words: str | None = None, vocab_size: int = 420):
    """A byte-level tokenizers.Tokenizer; `words` is the pattern that cuts text into words, GPT-2's if None."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(False, use_regex=words is None)
    cut = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def tiktoken_ranks(words: str) -> dict[bytes, int]:
    """{token: rank} as in tiktoken's files."""
    vocabulary = byte_level_bpe(words).get_vocab()
    return {bytes(BYTE_OF_CHARACTER[c] for c in token): i for token, i in vocabulary.items()}


def write_ranks(file: Path, ranks: dict[bytes, int]) -> None:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered))


def write_folder(folder: Path, files: dict[str, bytes | str | dict]) -> Path:
    """A folder with these files; a dict is written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def sentencepiece_folder(folder: Path, model: bytes, *, cls: str = "LlamaTokenizer", **settings) -> Path:
    return write_folder(
        folder, {"tokenizer.model": model, "tokenizer_config.json": {"tokenizer_class": cls, **settings}}
    )
