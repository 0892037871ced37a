"""A model's name -> a local folder with its config, tokenizer and weights: a folder's path, or a Hugging Face id."""

import re
from pathlib import Path

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "modules.json",  # of sentence-transformers, and what its modules are set to
    "*/config.json",
    "*.py",  # a tokenizer's own code, which runs only with trust_remote_code
)
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_PYTORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(
    model: str | Path,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    *,
    tokenizer_only: bool = False,
) -> Path:
    """The local folder of `model`, which is downloaded (or found in Hugging Face's cache) if it is an id of the hub.

    Of a repository, only the config, the tokenizer and one form of the weights are fetched: safetensors, or .bin where
    there are none.

    Args:
      model: a folder with a config.json, or an id such as "meta-llama/Llama-3.2-1B".
      revision: a branch, tag or commit of the repository.
      download_dir: where to keep downloads; None for Hugging Face's own cache.
      tokenizer_only: neither fetch weights nor ask for a config.json.
    Raises: FileNotFoundError saying what was tried, and how to pass a folder.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not tokenizer_only and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model={str(model)!r} is a folder without a config.json: not a checkpoint")
        return folder
    if folder.exists():
        raise FileNotFoundError(f"model={str(model)!r} is a file; pass the folder that holds it, with its config.json")
    if not _HUB_ID.fullmatch(str(model)):
        raise FileNotFoundError(f"model={str(model)!r} is neither a folder nor an id of the Hugging Face hub")
    return _download(str(model), revision, download_dir, tokenizer_only)


def _download(model: str, revision: str | None, download_dir: str | Path | None, tokenizer_only: bool) -> Path:
    # Imported here: most uses have a folder, and the import takes a noticeable time.
    from huggingface_hub import snapshot_download

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=list(patterns)))

    try:
        folder = fetch(_SMALL_FILES + (() if tokenizer_only else _SAFETENSORS))
        if not tokenizer_only and not any(folder.glob("model*.safetensors")):
            folder = fetch(_SMALL_FILES + _PYTORCH)
    except Exception as error:  # the hub's errors, its HTTP client's and the system's share no base class
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"model={model!r}: there is no folder of that name in {Path.cwd()}, and fetching it from the Hugging Face "
            f"hub{at} failed ({type(error).__name__}: {_first_line(error)}). Check the name, and access (HF_TOKEN) if "
            "it is gated; without a network, download the model elsewhere and pass the path of its folder"
        ) from error
    if not tokenizer_only and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"model={model!r} on the Hugging Face hub has no config.json: not a model in its format"
        )
    return folder


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
