"""LoRA adapters (Hu et al. 2021) in PEFT's format, merged into a checkpoint's tensors before anything else sees them.

An adapter folder holds adapter_config.json and adapter_model.safetensors or .bin. The tensors of a layer are

    <layer>.lora_A.weight [r, in], <layer>.lora_B.weight [out, r]        weight += scale * B A
    <layer>.lora_embedding_A [r, V], <layer>.lora_embedding_B [D, r]     likewise, transposed
    <layer>.weight, <layer>.bias                                        trained whole: they replace the checkpoint's

where scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023).
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxllm.models.checkpoint_files import CheckpointError, CheckpointTensor, list_tensors, list_tensors_of
from jaxllm.models.registry import build, read_config

_SHARD_BYTES = 5 * 10**9
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# What changes the arithmetic, or the weights that the adapter was trained on -> the values that leave it as it is.
_NEUTRAL: dict[str, tuple] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_EMBEDDINGS = ("embed_tokens", "lm_head")
_PAIRS = {("lora_A.weight", "lora_B.weight"): False, ("lora_embedding_A", "lora_embedding_B"): True}


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json, checked."""

    rank: int
    alpha: float
    rank_stabilized: bool
    targets: tuple[str, ...] | str  # names of layers, or their last words; or one regular expression, or all-linear
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    transposed: bool  # the layers' weights are [in, out] ("fan_in_fan_out")
    bias: str
    saved: tuple[str, ...]  # modules trained whole
    ties: bool  # a tied model's output head follows its embedding

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """Raises: ValueError naming the key, its value and what is allowed."""
        _check(values, "peft_type", ("LORA",), default="LORA")
        for key, neutral in _NEUTRAL.items():
            _check(values, key, neutral, default=neutral[0])
        return cls(
            rank=_number(values, "r", int),
            alpha=_number(values, "lora_alpha", float),
            rank_stabilized=_check(values, "use_rslora", (True, False), default=False),
            targets=_targets(values.get("target_modules")),
            rank_pattern=values.get("rank_pattern") or {},
            alpha_pattern=values.get("alpha_pattern") or {},
            transposed=_check(values, "fan_in_fan_out", (True, False), default=False),
            bias=_check(values, "bias", ("none", "all", "lora_only"), default="none"),
            saved=tuple(values.get("modules_to_save") or ()),
            ties=_check(values, "ensure_weight_tying", (True, False), default=False),
        )

    def rank_of(self, layer: str) -> int:
        return _by_pattern(self.rank_pattern, layer, self.rank)

    def scale_of(self, layer: str) -> float:
        rank = self.rank_of(layer)
        return _by_pattern(self.alpha_pattern, layer, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def has_target(self, layer: str) -> bool:
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or re.fullmatch(self.targets, layer) is not None
        return any(f".{layer}".endswith(f".{target}") for target in self.targets)


class Adapter:
    """A LoRA adapter. Its tensors are read when the weights that they change are.

    Raises: ValueError for a config that cannot be followed; CheckpointError for a folder that is no adapter, and for
      tensors that the config does not explain, all in one message.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = AdapterConfig.read(_read_config(self.folder))
        file = next((self.folder / name for name in ADAPTER_FILES if (self.folder / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{folder} is no LoRA adapter: it has none of {', '.join(ADAPTER_FILES)}")
        tensors = {_plain_name(tensor.name): tensor for tensor in list_tensors_of(file)}
        self._deltas, self._replaced, problems = _sorted_out(self.config, tensors)
        _raise_if(problems, f"{folder} does not fit its adapter_config.json")

    def merged(
        self, tensors: list[CheckpointTensor], tied_head: tuple[str, str] | None = None
    ) -> list[CheckpointTensor]:
        """A checkpoint's tensors, those that the adapter changes with what changes them; no value is read yet.

        `tied_head`: the names of an output head and an embedding that are one weight (Network.tied_head).
        Raises: CheckpointError naming every tensor of the adapter that fits none of the checkpoint's, or that changes
          one alone of the two.
        """
        names = {tensor.name: tensor for tensor in tensors}
        shared = {_find(name, names) for name in tied_head or ()} - {None}
        problems = []
        for wanted, change in (*self._replaced.items(), *self._deltas.items()):
            name = _find(wanted, names)
            problem = _misfit(wanted, names) if name is None else change.misfit(names[name])
            if problem is None and name in shared and self._trains_alone(wanted):
                problem = (
                    f"{wanted}: embedding and output head are one weight (tie_word_embeddings=true), and the adapter "
                    "changes one of them; have PEFT merge it into a model whose tie_word_embeddings is false"
                )
            if problem is not None:
                problems.append(problem)
            else:
                names[name] = change.of(names[name])
        _raise_if(problems, f"{self.folder} does not fit the model")
        return [names[tensor.name] for tensor in tensors]

    def _trains_alone(self, name: str) -> bool:
        """Whether an embedding's or a head's values are the adapter's, and not saved with it as what they were."""
        trained = name in self._deltas or name.rpartition(".")[0].endswith(self.config.saved)
        return trained and not self.config.ties


@dataclass(frozen=True)
class _Delta:
    """weight + scale * B A."""

    a: CheckpointTensor  # [r, in]
    b: CheckpointTensor  # [out, r]
    scale: float
    transposed: bool

    def misfit(self, weight: CheckpointTensor) -> str | None:
        shape = (self.b.shape[0], self.a.shape[1])
        shape = shape[::-1] if self.transposed else shape
        return None if weight.shape == shape else f"{self.a.name}: changes {list(shape)}, {_listed(weight)}"

    def of(self, weight: CheckpointTensor) -> CheckpointTensor:
        return replace(weight, dtype="float32", read=partial(self._read, weight))

    def _read(self, weight: CheckpointTensor) -> np.ndarray:
        delta = self.scale * (self.b.read().astype(np.float32) @ self.a.read().astype(np.float32))
        return weight.read().astype(np.float32) + (delta.T if self.transposed else delta)


@dataclass(frozen=True)
class _Replaced:
    """A tensor that was trained whole."""

    value: CheckpointTensor

    def misfit(self, weight: CheckpointTensor) -> str | None:
        if weight.shape == self.value.shape:
            return None
        return f"{self.value.name}: {list(self.value.shape)}, {_listed(weight)}"

    def of(self, weight: CheckpointTensor) -> CheckpointTensor:
        return replace(weight, dtype=self.value.dtype, read=self.value.read)


def _sorted_out(
    config: AdapterConfig, tensors: Mapping[str, CheckpointTensor]
) -> tuple[dict[str, _Delta], dict[str, _Replaced], list[str]]:
    """(changed weights, replaced tensors, problems), the first two by the checkpoint's names."""
    left, deltas, problems = dict(tensors), {}, []
    for (a_name, b_name), embedding in _PAIRS.items():
        for name in [name for name in left if name.endswith(f".{a_name}")]:
            layer = name.removesuffix(f".{a_name}")
            a, b = left[name], left.get(f"{layer}.{b_name}")
            problem = _misfit_of_pair(config, layer, a, b)
            if problem is not None:
                problems.append(problem)
            else:
                transposed = embedding or config.transposed
                deltas[f"{layer}.weight"] = _Delta(a, b, config.scale_of(layer), transposed)
            del left[name]
            left.pop(f"{layer}.{b_name}", None)
    replaced = {name: _Replaced(tensor) for name, tensor in left.items() if _is_trained_whole(config, name, deltas)}
    problems += [f"unused: {tensor.name}" for name, tensor in left.items() if name not in replaced]
    return deltas, replaced, problems


def _misfit_of_pair(config: AdapterConfig, layer: str, a: CheckpointTensor, b: CheckpointTensor | None) -> str | None:
    rank = config.rank_of(layer)
    if b is None:
        return f"{a.name}: the tensor B that belongs to it is missing"
    if not config.has_target(layer):
        return f"unused: {a.name}, of a layer that target_modules={config.targets!r} does not name"
    if a.shape[:1] != (rank,) or b.shape[1:] != (rank,):
        return f"{a.name}: A {list(a.shape)} and B {list(b.shape)} must have the rank {rank} that the config gives"
    return None


def _is_trained_whole(config: AdapterConfig, name: str, deltas: Mapping[str, _Delta]) -> bool:
    layer, _, last = name.rpartition(".")
    # PEFT compares the ends of names: "norm" is "input_layernorm" too. It saves embeddings that it has changed or that
    # have grown in any case, and the weight below a changed one as well.
    if layer.endswith(config.saved) or layer.rpartition(".")[2] in _EMBEDDINGS:
        return True
    return last == "bias" and (config.bias == "all" or (config.bias == "lora_only" and f"{layer}.weight" in deltas))


def _plain_name(name: str) -> str:
    """PEFT's name of a tensor -> the model's: without the wrappers that PEFT puts around the model and its layers."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(base_layer|original_module|modules_to_save(\.default)?)\.", ".", name)


def _find(wanted: str, names: Mapping[str, CheckpointTensor]) -> str | None:
    """The checkpoint's own name of a tensor: some checkpoints leave out the first words, such as "transformer."."""
    wanted = next((name for name in (wanted, *_as_stored(wanted)) if name in names), wanted)
    if wanted in names:
        return wanted
    shorter = [name for name in names if f".{wanted}".endswith(f".{name}")]
    longer = [name for name in names if f".{name}".endswith(f".{wanted}")]
    return next((found[0] for found in (shorter, longer) if len(found) == 1), None)


def _as_stored(name: str) -> list[str]:
    """What transformers calls by this name, and adapters with it, is called in the checkpoints of some families."""
    return [
        name.replace("model.language_model.", "language_model.model.", 1),  # Gemma 3
        name.replace(".mlp.gate.", ".block_sparse_moe.gate."),  # Mixtral
    ]


def _misfit(wanted: str, names: Mapping[str, CheckpointTensor]) -> str:
    layer = wanted.removesuffix(".weight")
    if _find(f"{layer}.qweight", names) or _find(f"{layer}.weight_packed", names):
        return f"{layer}: the checkpoint is quantized; merge the adapter into the checkpoint that it was quantized from"
    return f"unused: the checkpoint has no {wanted}"


def _listed(weight: CheckpointTensor) -> str:
    return f"but {weight.name} is {list(weight.shape)}"


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no LoRA adapter: it has no adapter_config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values


def _check(values: Mapping[str, Any], key: str, allowed: tuple, default: Any) -> Any:
    value = values.get(key, default)
    value = default if value is None else value
    if value not in allowed:
        listed = ", ".join(map(json.dumps, allowed))
        raise ValueError(f"adapter_config.json: {key}={value!r} is not supported; allowed: {listed}")
    return value


def _number(values: Mapping[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    accepted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or value <= 0:
        raise ValueError(
            f"adapter_config.json: {key}={value!r} must be {'an integer' if kind is int else 'a number'} > 0"
        )
    return kind(value)


def _targets(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f"adapter_config.json: target_modules={value!r} must be a list of names or a regular expression"
        )
    return tuple(value)


def _by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a layer's name, from a dot on."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), default)


def _raise_if(problems: list[str], headline: str) -> None:
    if problems:
        raise CheckpointError("\n  ".join([f"{headline}, {len(problems)} problem(s):", *problems]))


def merge_checkpoint(model: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write a checkpoint folder with an adapter merged in: the model's names, dtypes and other files; returns `out`.

    The arithmetic is in float32. Memory holds one shard, of up to 5 GB.

    Raises: ValueError if `out` is there and not empty; CheckpointError as Adapter and its `merged` do.
    """
    model, out = Path(model), Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: a merged checkpoint is written to a folder of its own")
    stored = list_tensors(model)
    dtypes = {tensor.name: tensor.dtype for tensor in stored}
    shards = _shards(Adapter(adapter).merged(stored, _tied_head_of(model)), dtypes)
    out.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, shard in enumerate(shards):
        last = "" if len(shards) == 1 else f"-{i + 1:05}-of-{len(shards):05}"
        values = {one.name: np.ascontiguousarray(one.read().astype(dtypes[one.name], copy=False)) for one in shard}
        save_file(values, out / f"model{last}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, f"model{last}.safetensors")
    if len(shards) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in model.iterdir():
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    return out


def _tied_head_of(model: Path) -> tuple[str, str] | None:
    path = model / "config.json"
    return build(read_config(json.loads(path.read_text(encoding="utf-8")))).tied_head if path.is_file() else None


def _shards(tensors: list[CheckpointTensor], dtypes: Mapping[str, str]) -> list[list[CheckpointTensor]]:
    shards: list[list[CheckpointTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.shape) * np.dtype(dtypes[tensor.name]).itemsize
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards
