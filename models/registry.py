"""Architecture name -> model class, imported only when it is asked for.

Our models and other people's are in one table. Another package adds its own with `register_model`, or without any call
through the entry-point group "jaxllm.models", whose names are architectures and whose values are "module:Class".
"""

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import jax.numpy as jnp

from jaxllm.models.config import DTYPES, ModelConfig, architecture_of
from jaxllm.models.interface import Network

ENTRY_POINT_GROUP = "jaxllm.models"

_MODELS: dict[str, str | type] = {
    "LlamaForCausalLM": "jaxllm.models.llama:LlamaForCausalLM",
    "RunningSumForTesting": "jaxllm.models.testing:RunningSumForTesting",
}


def register_model(architecture: str, target: str | type, *, replace: bool = False) -> None:
    """Make an architecture known: `target` is a class or "module:Class", which is imported when it is first built.

    Raises: ValueError if `target` is neither, or if the name is taken by another target and `replace` is false.
    """
    if isinstance(target, str) and (target.count(":") != 1 or not all(target.split(":"))):
        raise ValueError(f"target={target!r} of architecture {architecture!r} must be a class or 'module:Class'")
    known = _targets().get(architecture)
    if known is not None and known != target and not replace:
        raise ValueError(
            f"architecture={architecture!r} is registered already, as {known!r}; replace=True would replace it"
        )
    _MODELS[architecture] = target


def supported_architectures() -> list[str]:
    """The names that `build` accepts, sorted."""
    return sorted(_targets())


def model_class(architecture: str) -> type:
    """The class behind a name.

    Raises: ValueError for an unknown name, listing the supported ones and the nearest; ImportError, naming the
    registered target, if it cannot be imported.
    """
    targets = _targets()
    if architecture not in targets:
        nearest = difflib.get_close_matches(architecture, targets, n=1, cutoff=0.0)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        raise ValueError(
            f"architecture={architecture!r} is not supported{hint}. Supported: {', '.join(sorted(targets))}. "
            f"Others can be added with jaxllm.models.register_model"
        )
    target = targets[architecture]
    if isinstance(target, type):
        return target
    module_name, class_name = target.split(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"architecture {architecture!r} is registered as {target!r}: {error}") from error


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The dict of a config.json, checked by the class that its architecture names for it (`Model.config_class`).

    Raises: ValueError naming the key, its value and what is allowed.
    """
    return getattr(model_class(architecture_of(config)), "config_class", ModelConfig).from_hf(config)


def build(config: ModelConfig, dtype=None) -> Network:
    """The network of a config, its weights in `dtype` (float32, bfloat16 or float16; None: the checkpoint's own).

    No array is made: see `Network.init` and `weights.load_params`.
    Raises: ValueError for an unsupported architecture or dtype.
    """
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype={dtype.name!r} is not supported; allowed: {', '.join(DTYPES)}")
    return Network(model_class(config.architecture)(config, dtype), config, dtype)


def _targets() -> dict[str, str | type]:
    others = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return others | _MODELS
