"""Tokenizers as models ship them, each format a `tokenizers.Tokenizer` that gives its reference's ids."""
