"""Tiny checkpoints with random weights in Hugging Face's formats, written by transformers and PyTorch themselves.

The weights are large enough for attention to prefer some tokens, and no bias or norm is left at its neutral value, so
that a forgotten one shows. Tests that use this file skip without PyTorch: `pytest.importorskip("torch")`.
"""

import json
from pathlib import Path
from typing import Any

TINY_LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,  # generation never stops by itself
}

# What may differ between checkpoints of this architecture, besides the rope type.
LLAMA_VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
}


def tiny_llama(seed: int = 0, **config: Any):
    """A `transformers.LlamaForCausalLM` in float32; `config` replaces entries of TINY_LLAMA."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | config))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model


def save_checkpoint(
    model, folder: Path, *, dtype: str = "float32", file_format: str = "safetensors", shards: int = 1, **config: Any
) -> Path:
    """Write config.json and the weights as "safetensors" or "bin", in one file or in `shards` with an index.

    `config` replaces entries of config.json. Returns the folder.
    """
    import torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": dtype} | config
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    tensors = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # as save_pretrained does
    write_tensors(tensors, folder, file_format=file_format, shards=shards)
    return folder


def write_tensors(tensors: dict, folder: Path, *, file_format: str = "safetensors", shards: int = 1) -> None:
    """The files of a checkpoint from a dict of torch tensors; shard i holds every `shards`-th tensor from i on, so that
    the parts of one merged weight lie in different files."""
    if shards == 1:
        _write(tensors, folder / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[file_format])
        return
    stem, suffix = ("model", "safetensors") if file_format == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        part = dict(list(tensors.items())[i::shards])
        _write(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write(tensors: dict, file: Path) -> None:
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, file, metadata={"format": "pt"})
    else:
        import torch

        torch.save(tensors, file)
