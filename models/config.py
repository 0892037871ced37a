"""ModelConfig: a checkpoint's config.json, checked and in one form, whichever version of transformers wrote it.

It knows the keys of config.json and nothing of files or arrays. A bad or missing key is a ValueError that names the
key, the value and what is allowed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from jaxllm.models.layers.mlp import ACTIVATIONS

if TYPE_CHECKING:
    from jaxllm.models.quantization import Quantization

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
    "longrope": (
        {"short_factor", "long_factor"},
        {"factor", "original_max_position_embeddings", "attention_factor"},
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
    max_positions: int  # the length trained with: types dynamic, llama3, yarn and longrope scale beyond it
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    short_factors: tuple[float, ...] = ()  # longrope: [rotary_dim / 2], of periods in sequences up to max_positions
    long_factors: tuple[float, ...] = ()  # longrope: those in longer ones
    interleaved: bool = False  # pairs are neighbours (2i, 2i + 1), as in RoFormer and GLM; else halves apart

    def kv_depends_on_prompt_len(self, prompt_len: int) -> bool:
        """Whether prompts of this length have keys that prompts of other lengths, but equal beginnings, don't have."""
        return self.rope_type in ("dynamic", "longrope") and prompt_len > self.max_positions


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one checkpoint, under the names that config.json gives them.

    A family is data on a subclass: `names` for keys that it spells its own way (ours -> its), `defaults` for those that
    its config.json may lack, `qk_norm` for a norm of each head's queries and keys. What its keys mean beyond that is
    for an override of `from_hf`.
    """

    names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    qk_norm: ClassVar[bool] = False

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
    rope: RopeConfig | None  # None: positions are not rotated in
    dtype: str  # the checkpoint's: what dtype "auto" means
    alibi: bool = False  # attention scores fall with the distance (ALiBi)
    windows: tuple[int | None, ...] = ()  # of each layer, how many keys a query sees; None: all. Empty: all, everywhere
    num_labels: int = field(default=0, kw_only=True)  # of a sequence classifier's head; 0: it has none
    quantization: "Quantization | None" = field(default=None, kw_only=True)  # set by registry.read_config

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def max_model_len(self) -> int:
        """The longest sequence: rope types that stretch the trained length by a factor may leave it out of
        max_position_embeddings; llama3's and longrope's is always in it."""
        if self.rope is None:
            return self.max_position_embeddings
        included = self.rope.rope_type in ("llama3", "longrope")
        return max(self.max_position_embeddings, 0 if included else int(self.rope.max_positions * self.rope.factor))

    def kv_depends_on_prompt_len(self, prompt_len: int) -> bool:
        """See RopeConfig."""
        return self.rope is not None and self.rope.kv_depends_on_prompt_len(prompt_len)

    @classmethod
    def reader(cls, config: Mapping[str, Any]) -> "_Reader":
        """Checked reads from config.json, under our names or the family's, or from the family's defaults."""
        given = {key: value for key, value in config.items() if value is not None}
        return _Reader({**cls.defaults, **given}, names=cls.names)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """From the dict of a Hugging Face config.json. Keys without a meaning here are left alone.

        Raises: ValueError naming the key, its value and what is allowed.
        """
        get = cls.reader(config)
        config = get.config
        hidden_size = get.integer("hidden_size")
        num_heads = get.integer("num_attention_heads")
        num_kv_heads = get.integer("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{get.name('num_key_value_heads')}={num_kv_heads} must divide "
                f"{get.name('num_attention_heads')}={num_heads}: "
                "every KV head serves the same number of query heads"
            )
        if not get.has("head_dim") and hidden_size % num_heads:
            raise ValueError(
                f"{get.name('hidden_size')}={hidden_size} must be a multiple of "
                f"{get.name('num_attention_heads')}={num_heads}, or {get.name('head_dim')} be given"
            )
        head_dim = get.integer("head_dim", default=hidden_size // num_heads)
        max_positions = get.integer("max_position_embeddings", default=2048)
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
            max_position_embeddings=max_positions,
            tie_word_embeddings=get.boolean("tie_word_embeddings", default=False),
            attention_bias=attention_bias,
            attention_out_bias=get.boolean("attention_out_bias", default=attention_bias),
            mlp_bias=get.boolean("mlp_bias", default=False),
            initializer_range=get.number("initializer_range", default=0.02),
            rope=_rope_from_hf(config, head_dim, max_positions),
            dtype=_dtype(config),
        )


class _Reader:
    """Checked reads from a dict. A key whose value is null counts as absent. `names`: our key -> the dict's own."""

    def __init__(self, config: Mapping[str, Any], where: str = "", names: Mapping[str, str] = ModelConfig.names):
        self.config, self.where, self.names = config, where, names

    def has(self, key: str) -> bool:
        return self.config.get(self.name(key)) is not None

    def name(self, key: str) -> str:
        """How the config spells a key: its family's way, or ours where the config has that alone."""
        own = self.names.get(key, key)
        return key if self.config.get(own) is None and self.config.get(key) is not None else own

    def _get(self, key: str, default) -> tuple[str, Any]:
        name = self.name(key)
        value = self.config.get(name)
        if value is None and default is None:
            raise ValueError(f"{self.where}{name} is missing from the model's config")
        return f"{self.where}{name}", default if value is None else value

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        name, value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}={value!r} must be an integer >= {minimum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.config.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None, minimum: float = 0.0) -> float:
        name, value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be a finite number >= {minimum}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        name, value = self._get(key, None)
        if (
            not isinstance(value, list | tuple)
            or len(value) != count
            or not all(isinstance(item, int | float) and 0 < item < math.inf for item in value)
        ):
            raise ValueError(f"{name}={value!r} must be a list of {count} finite numbers > 0")
        return tuple(map(float, value))

    def boolean(self, key: str, default: bool) -> bool:
        name, value = self._get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")
        return value

    def choice(self, key: str, allowed, default):
        name, value = self._get(key, default)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not supported; allowed: {', '.join(map(str, allowed))}")
        return value


LAYER_TYPES = ("full_attention", "sliding_attention")


def windows_of(
    config: Mapping[str, Any], num_layers: int, window: int | None, slides: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Each layer's window: `window` where `layer_types` says "sliding_attention", or, where a config has no such list,
    where `slides` says so of the layer's index.

    Raises: ValueError for a list of another length or with other types, or with sliding layers and no window.
    """
    types = config.get("layer_types")
    if types is None:
        return tuple(window if slides(layer) else None for layer in range(num_layers))
    if not isinstance(types, list | tuple) or len(types) != num_layers or not set(types) <= set(LAYER_TYPES):
        raise ValueError(
            f"layer_types={types!r} must list one of {', '.join(LAYER_TYPES)} for each of "
            f"num_hidden_layers={num_layers}"
        )
    if window is None and "sliding_attention" in types:
        raise ValueError(f"layer_types={types!r} has sliding layers, so sliding_window must be an integer >= 1")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


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


def _rope_from_hf(config: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    where, settings = _rope_settings(config)
    get = _Reader(settings, where)
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    if rope_type == "su":  # what the first Phi-3 configs call it
        rope_type = "longrope"
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
    if rope_type == "longrope":
        return RopeConfig(
            **common,
            max_positions=original,
            factor=factor,
            attention_factor=_longrope_attention_factor(get, factor, original),
            short_factors=get.numbers("short_factor", rotary_dim // 2),
            long_factors=get.numbers("long_factor", rotary_dim // 2),
        )
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


def _longrope_attention_factor(get: _Reader, factor: float, original: int) -> float:
    """What makes up for the longer context in the scores (Ding et al. 2024, "LongRoPE")."""
    if get.config.get("attention_factor") is not None:
        return get.number("attention_factor")
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
