"""Embeddings and classes: what a request for them may ask, how a checkpoint wants them made, and the last steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.runner.pooling import Pooling
from jaxllm.validation import check_known

TASKS = ("embed", "classify", "token_embed")
_POOLINGS: dict[str, Pooling] = {"MEAN": "mean", "LAST": "last", "CLS": "cls"}
_MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers
# What the class of an activation does -> the problem_type of transformers that asks for the same.
_ACTIVATIONS = {
    "Identity": "regression",
    "Sigmoid": "multi_label_classification",
    "Softmax": "single_label_classification",
}


@dataclass(kw_only=True)
class PoolingParams:
    """What a request for a vector wants, with vLLM's names.

    Attributes:
      task: "embed", "classify" or "token_embed"; the methods of LLM set it.
      dimensions: keep only the embedding's first so many numbers (Matryoshka embeddings); None: all.
      use_activation: normalize an embedding to length 1, or turn a class's scores into probabilities; None: as the
        engine's `pooler_config` or the checkpoint says, else yes.
      truncate_prompt_tokens: use only the last so many tokens of the prompt; -1: as many as the engine takes.

    Raises: ValueError naming the field, the value and what is allowed.
    """

    task: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.task not in (None, *TASKS):
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        for name in ("dimensions", "truncate_prompt_tokens"):
            value = getattr(self, name)
            allowed = value is None or (name != "dimensions" and value == -1)
            if not allowed and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    @classmethod
    def of(cls, params: PoolingParams | Mapping[str, Any] | None, task: str | None, default: str = "") -> PoolingParams:
        """`params`, or what a dict of fields or None makes, for a task; for None its own, else the `default`.

        Raises: ValueError if it is for another task; TypeError for an unknown field.
        """
        if not isinstance(params, cls):
            check_known(params or {}, (one.name for one in dataclasses.fields(cls)), cls.__name__)
            params = cls(**(params or {}))
        if task is not None and params.task not in (None, task):
            raise ValueError(f"pooling_params: task is {params.task!r}, but {task!r} was called")
        return dataclasses.replace(params, task=task or params.task or default)


@dataclass(frozen=True)
class PoolerConfig:
    """How hidden states become one vector.

    Attributes:
      pooling: the mean over the prompt's tokens, the last token's, or the first one's.
      use_activation: what PoolingParams.use_activation is by default.
    """

    pooling: Pooling = "last"
    use_activation: bool = True

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> PoolerConfig:
        """From the engine's `pooler_config`: "pooling_type" (MEAN, LAST or CLS), "use_activation" or "normalize".

        Raises: TypeError for another key, ValueError for a bad value.
        """
        check_known(fields, ("pooling_type", "use_activation", "normalize"), "pooler_config")
        kind = fields.get("pooling_type") or "LAST"
        if kind not in _POOLINGS:
            raise ValueError(f"pooler_config: pooling_type must be one of {', '.join(_POOLINGS)}, got {kind!r}")
        given = [fields[name] for name in ("use_activation", "normalize") if fields.get(name) is not None]
        return cls(_POOLINGS[kind], bool(given[0]) if given else True)

    @classmethod
    def of_checkpoint(cls, folder: Path | None) -> PoolerConfig:
        """What a sentence-transformers checkpoint says in modules.json; the defaults for others.

        Raises: ValueError naming the path, for a file that is missing or broken, or a module that is not supported.
        """
        if folder is None or not (folder / "modules.json").exists():
            return cls()
        kinds = _read_modules(folder / "modules.json")
        pooling = _read_pooling(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else "last"
        return cls(pooling, "Normalize" in kinds)


def _read_modules(path: Path) -> dict[str, str]:
    """The folder of each kind of module in modules.json."""
    modules = _read_json(path)
    if not isinstance(modules, list):
        raise ValueError(f"{path} must hold a list of objects, got {str(modules)[:100]}")
    kinds: dict[str, str] = {}
    for module in modules:
        kind, place = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str):
            raise ValueError(
                f"{path} must hold a list of objects with the strings 'type' and 'path', one is {str(module)[:100]}"
            )
        name = kind.rsplit(".", 1)[-1]
        if name not in _MODULES:
            raise ValueError(
                f"{path}: module {place!r} of type {kind!r} is not supported; allowed: {', '.join(_MODULES)}"
            )
        kinds[name] = place
    return kinds


def _read_pooling(path: Path) -> Pooling:
    """What the config.json of a Pooling module says."""
    settings = _read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, got {str(settings)[:100]}")
    modes: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    modes["pooling_mode_lasttoken"] = "last"
    on = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    if len(on) != 1 or on[0] not in modes:
        raise ValueError(f"{path}: of the pooling modes exactly one of {', '.join(modes)} can be on, got {on}")
    return modes[on[0]]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of JSON or of its encoding
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def problem_type_of(config: Mapping[str, Any]) -> str | None:
    """What decides a classifier's probabilities, of the dict of its config.json.

    The activation that a reranker of sentence-transformers names, as the problem_type of the same effect; else its own
    problem_type. Softmax of a single label, which would always be 1, is a sigmoid as everywhere.

    Raises: ValueError naming the field, for an activation that is not supported.
    """
    field, name = "sbert_ce_default_activation_function", config.get("sbert_ce_default_activation_function")
    settings = config.get("sentence_transformers")
    if isinstance(settings, Mapping) and settings.get("activation_fn") is not None:
        field, name = "sentence_transformers.activation_fn", settings["activation_fn"]
    if name is None:
        return config.get("problem_type")
    kind = str(name).rsplit(".", 1)[-1]
    if kind not in _ACTIVATIONS:
        raise ValueError(f"config.json: {field}={name!r} is not supported; allowed: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[kind]


class PooledVector:
    """A prompt's hidden states, summed up chunk by chunk."""

    def __init__(self, pooling: Pooling, prompt_len: int) -> None:
        self._divisor = prompt_len if pooling == "mean" else 1
        self._sum: np.ndarray | None = None

    def take(self, start: int, part: np.ndarray) -> None:
        """Takes in f32[D] of the chunk at `start`; from 0 it begins anew, as after a preemption."""
        self._sum = part.copy() if start == 0 or self._sum is None else self._sum + part

    @property
    def value(self) -> np.ndarray:
        """f32[D]."""
        assert self._sum is not None
        return self._sum / self._divisor


class PooledTokens:
    """A prompt's hidden states themselves, chunk by chunk."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def take(self, start: int, part: np.ndarray) -> None:
        """Takes in f32[count, D] of the chunk at `start`; from 0 it begins anew, as after a preemption."""
        self._parts = [part] if start == 0 else [*self._parts, part]

    @property
    def value(self) -> np.ndarray:
        """f32[T, D]."""
        return np.concatenate(self._parts)


def embedding(vectors: np.ndarray, params: PoolingParams, config: PoolerConfig) -> np.ndarray:
    """f32[..., dimensions]: the first so many numbers of f32[..., D], of length 1 if that is wanted."""
    vectors = vectors[..., : params.dimensions]
    wanted = config.use_activation if params.use_activation is None else params.use_activation
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12) if wanted else vectors


def probabilities(scores: np.ndarray, params: PoolingParams, config: PoolerConfig, problem_type: str | None) -> Any:
    """f32[L] of the head's scores f32[L]: a softmax over labels that exclude each other, else a sigmoid of each."""
    wanted = config.use_activation if params.use_activation is None else params.use_activation
    if not wanted or problem_type == "regression":
        return scores
    if len(scores) == 1 or problem_type == "multi_label_classification":
        return 1 / (1 + np.exp(-scores))
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()
