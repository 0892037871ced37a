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
        """What a sentence-transformers checkpoint says in modules.json; the defaults for others."""
        if folder is None or not (folder / "modules.json").exists():
            return cls()
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = {str(module["type"]).rsplit(".", 1)[-1]: module for module in modules}
        pooling: Pooling = "last"
        if "Pooling" in kinds:
            settings = json.loads((folder / kinds["Pooling"]["path"] / "config.json").read_text(encoding="utf-8"))
            modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
            modes["pooling_mode_lasttoken"] = "last"
            on = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
            if len(on) != 1 or on[0] not in modes:
                raise ValueError(
                    f"{folder}: of the pooling modes exactly one of {', '.join(modes)} can be on, got {on}"
                )
            pooling = modes[on[0]]
        return cls(pooling, "Normalize" in kinds)


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
