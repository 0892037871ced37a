"""What passes between the runner and a network: StepBatch in, hidden states and KV pages out.

The only things a runner needs to know about models are in this file. It knows no particular architecture, and nothing
of requests.

Letters: T flat tokens, S rows (sequences), W pages in a row's table, P pages, K KV heads, H head dim, D model width,
V vocabulary.
"""

import functools
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxllm.models.config import ModelConfig
from jaxllm.models.layers.param import ParamSpec

Params = Mapping[str, Any]
"""Nested dicts of arrays: `params["layers"]["0"]["attention"]["qkv"]["weight"]`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBatch:
    """One step's tokens, flat, and the rows they belong to.

    The first `num_decodes` rows hold one token each, and token i belongs to row i. The rows after them hold a run of
    prompt tokens each, `query_starts[s]:query_starts[s + 1]`. Rows and tokens past those in use are padding.
    """

    token_ids: jax.Array  # i32[T]
    positions: jax.Array  # i32[T]
    seq_ids: jax.Array  # i32[T] row of the token; padding: any row
    slots: (
        jax.Array
    )  # i32[T] where its KV goes: page * page_size + offset; padding: P * page_size or more. No two equal
    page_table: jax.Array  # i32[S, W]
    kv_lens: jax.Array  # i32[S] KV length with this step's tokens; 0: unused row
    query_starts: jax.Array  # i32[S + 1]
    prompt_lens: jax.Array  # i32[S] length of the row's prompt, for rope types that look at it
    num_decodes: jax.Array  # i32[]
    decode_only: bool = field(default=False, metadata={"static": True})  # T == S, and only decode rows are in use


class LayerKV(NamedTuple):
    """The KV pages of one layer. In latent attention (see layers/mla.py), one array holds a token's keys and values.

    Pages of 8 bits (int8, float8_e4m3fn) hold codes, and the scales are what a token's codes are multiplied with.
    """

    k: jax.Array  # [P, K, page_size, H]; latent: [P, page_size, C + R]
    v: jax.Array | None  # [P, K, page_size, H]; latent: None
    k_scales: jax.Array | None = None  # f32[P, K, page_size]; None where the pages hold floats of 16 bits or more
    v_scales: jax.Array | None = None


KVPages = tuple[LayerKV, ...]
"""One LayerKV per layer."""


class Model(Protocol):
    """What the registry builds: an NNX module whose weights are declared with `layers.param.param`.

    `weight_names` maps a checkpoint's names to ours, one row per module: `(checkpoint name, our path)` or
    `(checkpoint name, our path, part of a merged weight)`, and after the part (None: all of it) what is done to the
    values, one of `weights.TRANSFORMS`. `{}` stands for a layer's number, a further one on the left for an expert's in
    a stacked weight, and the last word ("weight", "bias") is carried over. `ignored_weights` are patterns (fnmatch) of
    checkpoint tensors nothing uses.
    `optional_prefixes`, where a family has them, begin names that some of its checkpoints give without.
    `known_as` names the models that people know, for lists of what is supported. Optional.
    A family whose config.json has keys of its own names a subclass of ModelConfig in `config_class`.
    """

    weight_names: ClassVar[tuple[tuple[str | None, ...], ...]]
    ignored_weights: tuple[str, ...]

    def __init__(self, config: ModelConfig, dtype: jnp.dtype): ...

    def __call__(self, kv: KVPages, batch: StepBatch) -> tuple[jax.Array, KVPages]:
        """Hidden states [T, D] after the last norm, and the pages with this step's KV written."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [S, V] of hidden [S, D]."""
        ...

    def kv_shapes(self, num_pages: int, page_size: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...] | None], ...]:
        """Per layer, the shapes of its k and its v pages; None where it has none."""
        ...


class Network:
    """A model as pure functions of its parameters, which are a plain nested dict of arrays.

    The module is split once, here. At a jit boundary there is only the dict, and the module is put together again while
    tracing, so a step costs no walk through module objects.
    """

    def __init__(self, module: nnx.Module, config: ModelConfig, dtype: jnp.dtype, packed: Mapping | None = None):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.module_class = type(module)
        self.packed = packed or {}  # see quantization.apply.quantize_linears
        self.weight_names = module.weight_names
        self.tied_head = _tied_head(module, config)
        # Some checkpoints hold a tied head beside the embedding.
        self.ignored_weights = (*module.ignored_weights, *(self.tied_head or ())[:1])
        self.optional_prefixes: tuple[str, ...] = getattr(module, "optional_prefixes", ())
        self.kv_shapes = module.kv_shapes
        self._graph, state = nnx.split(module)
        # NNX keys the items of a list by int; the public tree has strings alone.
        self._keys = {tuple(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
        self.specs: dict[tuple[str, ...], ParamSpec] = {
            tuple(map(str, path)): variable.get_metadata("spec") for path, variable in nnx.to_flat_state(state)
        }

    @property
    def abstract_params(self) -> dict:
        """The tree of parameters as `jax.ShapeDtypeStruct`s."""
        return unflatten_dict({path: spec.abstract for path, spec in self.specs.items()})

    @property
    def axes(self) -> dict:
        """The same tree, holding for each weight the tuple of its logical axes."""
        return unflatten_dict({path: spec.axes for path, spec in self.specs.items()})

    def init(self, key: jax.Array) -> dict:
        """Random weights. A weight's values depend on `key` and its path alone. Can be traced: to have large weights
        made where they belong, `jax.jit(network.init, out_shardings=...)`."""
        return unflatten_dict(
            {
                path: _initialize(spec.initializer, spec.shape, spec.dtype, jax.random.fold_in(key, _path_hash(path)))
                for path, spec in self.specs.items()
            }
        )

    def forward(self, params: Params, kv: KVPages, batch: StepBatch) -> tuple[jax.Array, KVPages]:
        """(hidden [T, D], kv) of one step. Pure; donate `kv` to have the pages written in place."""
        return self._merge(params)(kv, batch)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """float32 [S, V] of hidden [S, D]."""
        return self._merge(params).logits(hidden)

    def classify(self, params: Params, hidden: jax.Array) -> jax.Array:
        """float32 [S, num_labels] of hidden [S, D], for a model with config.num_labels (models.classification)."""
        return self._merge(params).classify(hidden)

    def _merge(self, params: Params) -> Any:
        flat = flatten_dict(params)
        return nnx.merge(self._graph, nnx.from_flat_state([(key, flat[path]) for path, key in self._keys.items()]))


def _tied_head(module: nnx.Module, config: ModelConfig) -> tuple[str, str] | None:
    """The checkpoint's names of the output head and of the embedding that stands for it; None where they are two."""
    names = {ours: f"{theirs}.weight" for theirs, ours, *_ in module.weight_names}
    if not config.tie_word_embeddings or "lm_head" not in names:
        return None
    return names["lm_head"], names["embed"]


def checkpoint_names(
    weight_names: tuple, path: tuple[str, ...], expert: int = 0
) -> dict[str | None, tuple[str, str | None]]:
    """A parameter's part (None: all of it) -> the checkpoint's name and a transform, from `Model.weight_names`.
    `expert` is which matrix of a stacked weight."""
    module, leaf = ".".join(path[:-1]), path[-1]
    names = {}
    for theirs, ours, *rest in weight_names:
        match = _pattern(ours).fullmatch(module)
        if match:
            part, transform = (*rest, None, None)[:2]
            names[part] = (f"{theirs.format(*match.groups(), expert)}.{leaf}", transform)
    return names


@functools.cache  # it is asked for every expert of every layer
def _pattern(ours: str) -> re.Pattern:
    return re.compile(re.escape(ours).replace(r"\{\}", r"(\d+)"))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _initialize(initializer, shape, dtype, key):
    return initializer(key, shape, dtype)


def _path_hash(path: tuple[str, ...]) -> int:
    return zlib.crc32(".".join(path).encode())
