"""ModelConfig: a checkpoint's config.json, checked and in one form, whichever version of transformers wrote it.

It knows the keys of config.json and nothing of files or arrays. A bad or missing key is a ValueError that names the
key, the value and what is allowed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.models.layers.mlp import ACTIVATIONS

DTYPES = ("float32", "bfloat16", "float16")

# rope type -> (keys it requires besides rope_theta, keys it may have)
ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        set(),
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}
# Found in rope settings without any effect on the values.
_ROPE_COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings. Fields that a type does not use keep their neutral values."""

    rope_type: str
    theta: float
    rotary_dim: int  # the first rotary_dim of a head's dimensions are rotated
    max_positions: int  # the length trained with: type dynamic, llama3 and yarn scale beyond it
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn

    def kv_depends_on_prompt_len(self, prompt_len: int) -> bool:
        """Whether prompts of this length have keys that prompts of other lengths, but equal beginnings, don't have."""
        return self.rope_type == "dynamic" and prompt_len > self.max_positions


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one checkpoint, under the names that config.json gives them."""

    architecture: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool  # of q, k and v
    attention_out_bias: bool  # of the projection after attention
    mlp_bias: bool
    initializer_range: float  # standard deviation of random weights
    rope: RopeConfig
    dtype: str  # the checkpoint's: what dtype "auto" means

    @property
    def max_model_len(self) -> int:
        """The longest sequence: rope types that stretch the trained length by a factor may leave it out of
        max_position_embeddings; llama3's is always in it."""
        stretched = 0 if self.rope.rope_type == "llama3" else int(self.rope.max_positions * self.rope.factor)
        return max(self.max_position_embeddings, stretched)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """From the dict of a Hugging Face config.json. Keys without a meaning here are left alone.

        Raises: ValueError naming the key, its value and what is allowed.
        """
        get = _Reader(config)
        _refuse_unsupported(config)
        hidden_size = get.integer("hidden_size")
        num_heads = get.integer("num_attention_heads")
        num_kv_heads = get.integer("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}: "
                "every KV head serves the same number of query heads"
            )
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads}, or head_dim be given"
            )
        head_dim = get.integer("head_dim", default=hidden_size // num_heads)
        attention_bias = get.boolean("attention_bias", default=False)
        return cls(
            architecture=architecture_of(config),
            vocab_size=get.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=get.integer("intermediate_size"),
            num_hidden_layers=get.integer("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_act=get.choice("hidden_act", ACTIVATIONS, default="silu"),
            rms_norm_eps=get.number("rms_norm_eps", default=1e-6),
            max_position_embeddings=get.integer("max_position_embeddings", default=2048),
            tie_word_embeddings=get.boolean("tie_word_embeddings", default=False),
            attention_bias=attention_bias,
            attention_out_bias=get.boolean("attention_out_bias", default=attention_bias),
            mlp_bias=get.boolean("mlp_bias", default=False),
            initializer_range=get.number("initializer_range", default=0.02),
            rope=_rope_from_hf(config, head_dim),
            dtype=_dtype(config),
        )


class _Reader:
    """Checked reads from a dict. A key whose value is null counts as absent."""

    def __init__(self, config: Mapping[str, Any], where: str = ""):
        self.config, self.where = config, where

    def _get(self, key: str, default):
        value = self.config.get(key)
        if value is None and default is None:
            raise ValueError(f"{self.where}{key} is missing from the model's config")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.where}{key}={value!r} must be an integer >= 1")
        return value

    def number(self, key: str, default: float | None = None, minimum: float = 0.0) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < math.inf:
            raise ValueError(f"{self.where}{key}={value!r} must be a finite number >= {minimum}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}{key}={value!r} must be true or false")
        return value

    def choice(self, key: str, allowed, default: str) -> str:
        value = self._get(key, default)
        if value not in allowed:
            raise ValueError(f"{self.where}{key}={value!r} is not supported; allowed: {', '.join(allowed)}")
        return value


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first of config.json's `architectures`. Raises ValueError if there is none."""
    names = config.get("architectures")
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"architectures={names!r} must be a list with the model's class name, e.g. ['LlamaForCausalLM']"
        )
    return names[0]


def _dtype(config: Mapping[str, Any]) -> str:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"  # transformers < 5 wrote torch_dtype
    value = config.get(key)
    if value is None:
        return "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{key}={value!r} is not supported; allowed: {', '.join(DTYPES)}")
    return name


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"quantization_config.quant_method={method!r}: quantized checkpoints are not supported; "
            "use the model's float32, bfloat16 or float16 checkpoint"
        )


def _rope_from_hf(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    where, settings = _rope_settings(config)
    get = _Reader(settings, where)
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{where}rope_type={rope_type!r} is not supported; allowed: {', '.join(ROPE_TYPES)}")
    _check_rope_keys(where, rope_type, settings)
    fraction = get.number("partial_rotary_factor", default=1.0)
    rotary_dim = int(head_dim * fraction)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(
            f"head_dim={head_dim} with {where}partial_rotary_factor={fraction} rotates {rotary_dim} dimensions; "
            f"it must be an even number from 2 to head_dim"
        )
    common = {"rope_type": rope_type, "theta": get.number("rope_theta", default=10000.0), "rotary_dim": rotary_dim}
    max_positions = _Reader(config).integer("max_position_embeddings", default=2048)
    if rope_type in ("default", "linear", "dynamic"):
        factor = get.number("factor", default=1.0, minimum=1.0) if rope_type != "default" else 1.0
        if rope_type == "dynamic" and rotary_dim < 4:
            raise ValueError(f"{where}rope_type='dynamic' needs at least 4 rotated dimensions, not {rotary_dim}")
        return RopeConfig(**common, max_positions=max_positions, factor=factor)
    original = get.integer("original_max_position_embeddings", default=max_positions)
    if rope_type == "llama3":
        low, high = get.number("low_freq_factor"), get.number("high_freq_factor")
        if not 0 < low < high:
            raise ValueError(f"{where}low_freq_factor={low} must be above 0 and below high_freq_factor={high}")
        factor = get.number("factor", minimum=1.0)
        return RopeConfig(**common, max_positions=original, factor=factor, low_freq_factor=low, high_freq_factor=high)
    factor = get.number("factor", default=max_positions / original)
    return RopeConfig(
        **common,
        max_positions=original,
        factor=factor,
        attention_factor=_yarn_attention_factor(get, factor),
        beta_fast=get.number("beta_fast", default=32.0),
        beta_slow=get.number("beta_slow", default=1.0),
        truncate=get.boolean("truncate", default=True),
    )


def _rope_settings(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(prefix for messages, settings): transformers 5 has one dict, `rope_parameters`; older versions have
    `rope_scaling` with `rope_theta` and `partial_rotary_factor` beside it. What the dict says comes first."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{key}={found!r} must be an object with a rope_type")
    settings = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    settings |= {name: value for name, value in found.items() if value is not None}
    if config.get("original_max_position_embeddings") is not None:
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return f"{key}." if found else "", settings


def _check_rope_keys(where: str, rope_type: str, settings: Mapping[str, Any]) -> None:
    required, optional = ROPE_TYPES[rope_type]
    # Checkpoints carry keys of another type, of no effect on theirs; a key of no type we know could have one.
    known = _ROPE_COMMON.union(*(keys for pair in ROPE_TYPES.values() for keys in pair))
    for key in settings:
        if key not in known:
            allowed = ", ".join(sorted(required | optional | {"rope_type", "rope_theta", "partial_rotary_factor"}))
            raise ValueError(
                f"{where}{key}={settings[key]!r} is not supported; allowed with rope_type={rope_type!r}: {allowed}"
            )
    missing = sorted(required - set(settings))
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing: rope_type={rope_type!r} needs {', '.join(sorted(required))}")


def _yarn_attention_factor(get: _Reader, factor: float) -> float:
    """YaRN's temperature as a factor on cos and sin (Peng et al. 2023, section 3.4), with DeepSeek's two mscales."""
    if get.config.get("attention_factor") is not None:
        return get.number("attention_factor")

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = get.config.get("mscale"), get.config.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(get.number("mscale")) / temperature(get.number("mscale_all_dim"))
    return temperature(1.0)
