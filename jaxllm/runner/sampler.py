"""Sampling on the device: temperature, min_p, top_k, top_p, and how much of it a step needs; all rows at once.

A row's draw depends on its seed and on the position of the token it draws, on nothing else: not on batch mates, on how
the prompt was chunked, or on whether the request was preempted.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_STOP_IDS = 4  # that a row brings to the device
_RUN = 128  # tokens
_SPAN = 256  # tokens


class Level(IntEnum):
    """How much sampling work a step does: a program each, for a branch on the device would make the host wait for it.

    The bits are kinds of work: a step runs at the level that has the bits of all of its rows.
    """

    GREEDY = 0
    DRAW = 0b001  # temperature
    FILTER = 0b011  # and min_p, top_k, top_p, which read the logits many times
    CONTROL = 0b101  # temperature, and penalties, bias, token masks and log probabilities
    FULL = 0b111  # all of it

    @property
    def filters(self) -> bool:
        return bool(self & 0b010)

    @property
    def controls(self) -> bool:
        return bool(self & 0b100)


@dataclass(frozen=True)
class SamplingSpec:
    """One request's sampling, as the device wants it.

    Attributes:
      temperature: 0 for greedy. top_k: 0 for off. top_p, min_p: 1 and 0 for off.
      seed: 64 bits.
      presence_penalty, frequency_penalty, repetition_penalty: 0, 0 and 1 for off.
      num_logprobs: how many top log probabilities to return beside the sampled token's own; -1 for none at all.
      logprob_ids: tokens whose log probabilities are returned as well.
      processed_logprobs: whether log probabilities are those of the distribution after temperature, bias, penalties and
        masks, not the model's own.
      min_tokens, masked_ids: before so many tokens, none of these is sampled.
      allowed_ids: only these are sampled; None: all. banned_ids: none of these is.
      bias: (token, what is added to its logit).
      constraints: what the host says may be sampled next (constraints.Constraint); each request has its own.
      logits_processors: the host's functions of the logits (constraints.run_processors).
      scores_prompt: whether the prompt's own log probabilities are wanted, from the position `first_scored` on, and
        with them those of `prompt_logprob_ids`.
      pooling: how the prompt's hidden states are summed up (runner.pooling); None: they are not wanted.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    num_logprobs: int = -1
    logprob_ids: tuple[int, ...] = ()
    processed_logprobs: bool = False
    min_tokens: int = 0
    masked_ids: tuple[int, ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    banned_ids: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    constraints: tuple[Any, ...] = ()
    logits_processors: tuple[Any, ...] = ()
    scores_prompt: bool = False
    first_scored: int = 0
    prompt_logprob_ids: tuple[int, ...] = ()
    pooling: str | None = None

    def fork(self) -> "SamplingSpec":
        """The spec of another answer that begins as this one does, and whose prompt has been scored."""
        return replace(self, scores_prompt=False, constraints=tuple(one.fork() for one in self.constraints))

    @property
    def level(self) -> Level:
        level = Level.CONTROL if self.num_logprobs >= 0 or self.controlled or self.stepwise else Level.GREEDY
        if self.temperature == 0:
            return level
        filters = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return Level(level | (Level.FILTER if filters else Level.DRAW))

    @property
    def controlled(self) -> bool:
        """Whether it has a row of its own in the control tables."""
        masked = bool(self.masked_ids or self.banned_ids) or self.allowed_ids is not None
        return self.penalized or masked or bool(self.bias or self.logprob_ids)

    @property
    def penalized(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def stepwise(self) -> bool:
        """Whether the host must see each token before the next one is sampled."""
        return bool(self.constraints or self.logits_processors)


class SamplingTable:
    """The host's table of every slot's sampling parameters: i32[max_num_seqs, width], floats by their bits.

    The last columns are stop tokens, for loops (see `ends`). Of a request with more than MAX_STOP_IDS only the first
    are here: after one of the others the device goes on, until the host has seen it.
    """

    width: ClassVar[int] = 12 + MAX_STOP_IDS

    def __init__(self, max_num_seqs: int) -> None:
        self.rows = np.zeros((max_num_seqs, self.width), np.int32)
        self.prompt_len = np.zeros(max_num_seqs, np.int32)
        self._level = np.zeros(max_num_seqs, np.int8)
        self.scores_prompt = np.zeros(max_num_seqs, np.bool_)
        self.stepwise = np.zeros(max_num_seqs, np.bool_)
        self.pools = np.zeros(max_num_seqs, np.bool_)

    def fill(self, slot: int, spec: SamplingSpec, prompt_len: int, stop_ids: Iterable[int] = ()) -> None:
        row = self.rows[slot]
        penalties = spec.presence_penalty, spec.frequency_penalty, spec.repetition_penalty
        row[:6] = np.array([spec.temperature, spec.top_p, spec.min_p, *penalties], np.float32).view(np.int32)
        row[6:8] = np.array([spec.seed & 0xFFFFFFFFFFFFFFFF], np.uint64).view(np.int32)
        row[8:12] = spec.top_k, spec.min_tokens, spec.controlled, spec.processed_logprobs
        # Before min_tokens a stop token ends nothing. (Such rows mask theirs, and are never in a loop.)
        kept = [] if spec.min_tokens else sorted(stop_ids)[:MAX_STOP_IDS]
        row[12:] = kept + [-1] * (MAX_STOP_IDS - len(kept))
        self.prompt_len[slot] = prompt_len
        self._level[slot] = spec.level
        self.scores_prompt[slot], self.stepwise[slot] = spec.scores_prompt, spec.stepwise
        self.pools[slot] = spec.pooling is not None

    def level(self, slots: np.ndarray) -> Level:
        """The level of a step with the requests of these slots."""
        return Level(int(np.bitwise_or.reduce(self._level[slots])))


class SamplingRows(NamedTuple):
    """The same on the device, for the rows of a step. Padding rows are greedy."""

    temperature: jax.Array  # f32[S]
    top_p: jax.Array  # f32[S]
    min_p: jax.Array  # f32[S]
    presence_penalty: jax.Array  # f32[S]
    frequency_penalty: jax.Array  # f32[S]
    repetition_penalty: jax.Array  # f32[S]
    seed: jax.Array  # u32[S, 2]
    top_k: jax.Array  # i32[S]
    before_min_tokens: jax.Array  # bool[S]
    controlled: jax.Array  # bool[S] whether the row's slot has a row of its own in the control tables
    processed_logprobs: jax.Array  # bool[S]
    positions: jax.Array  # i32[S] of the token to be drawn

    @classmethod
    def unpack(cls, rows: jax.Array, kv_lens: jax.Array, prompt_lens: jax.Array) -> "SamplingRows":
        floats = jax.lax.bitcast_convert_type(rows[:, :6], jnp.float32)
        in_use = kv_lens > 0
        return cls(
            temperature=jnp.where(in_use, floats[:, 0], 0.0),
            top_p=jnp.where(in_use, floats[:, 1], 1.0),
            min_p=floats[:, 2],
            presence_penalty=floats[:, 3],
            frequency_penalty=floats[:, 4],
            repetition_penalty=jnp.where(in_use, floats[:, 5], 1.0),
            seed=jax.lax.bitcast_convert_type(rows[:, 6:8], jnp.uint32),
            top_k=rows[:, 8],
            before_min_tokens=kv_lens - prompt_lens < rows[:, 9],
            controlled=in_use & (rows[:, 10] > 0),
            processed_logprobs=rows[:, 11] > 0,
            positions=kv_lens,
        )


def ends(table_rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """Whether each of the sampled tokens i32[S] ends its row, one of SamplingTable's [S, width]: bool[S]."""
    return jnp.any(table_rows[:, -MAX_STOP_IDS:] == tokens[:, None], axis=1)


def sample(logits: jax.Array, rows: SamplingRows, level: Level) -> jax.Array:
    """Draws a token a row from f32[S, V] logits -> i32[S]."""
    return _draw(logits, rows, level) if level >= Level.DRAW else argmax(logits)


def argmax(x: jax.Array) -> jax.Array:
    """The first index of each row's maximum, i32[S]. As two plain reductions: on a CPU XLA's argmax is slow."""
    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, x.shape[1] - 1), axis=-1)


def _draw(logits: jax.Array, rows: SamplingRows, level: Level) -> jax.Array:
    is_greedy = rows.temperature == 0
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(is_greedy, 1.0, rows.temperature)[:, None]
    if level.filters:  # in vLLM's order
        scaled = _keep_top_p(_keep_top_k(_keep_min_p(scaled, rows.min_p), rows.top_k), rows.top_p)
    drawn = _pick(jnp.exp(scaled), jax.vmap(_two_uniforms)(rows.seed, rows.positions))
    return jnp.where(is_greedy, argmax(logits), drawn)


def _two_uniforms(seed: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, position), (2,))


def _pick(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draws an index a row with probability proportional to weights [S, V]; uniforms [S, 2] in [0, 1) -> i32[S].

    Inverse transform sampling in two levels: first a run of _RUN tokens, then a token of it. So one number of each pair
    decides among V / _RUN sums and the other among _RUN weights: no running sum over the whole vocabulary, and
    unlikely tokens keep their odds where a single 23-bit number could not tell them apart.
    """
    runs = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % _RUN))).reshape(len(weights), -1, _RUN)
    run = _invert(jnp.sum(runs, axis=-1), uniforms[:, 0])
    token = _invert(jnp.take_along_axis(runs, run[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return jnp.minimum(run * _RUN + token, weights.shape[1] - 1)  # a row that may sample nothing has no odds at all


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index of a row at which the running sum of weights [S, M] exceeds uniform [S] times their total."""
    sums = jnp.cumsum(weights, axis=-1)
    positive = weights > 0  # rounding must not pick what has been filtered out
    beyond = (sums > (uniform * sums[:, -1])[:, None]) & positive
    last = weights.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last).astype(jnp.int32)


def _keep_min_p(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Drops tokens less likely than min_p times the likeliest (Nguyen et al. 2024)."""
    threshold = jnp.max(logits, axis=-1) + jnp.log(min_p)  # log(0) = -inf keeps all
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def _keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Drops tokens below the k-th likeliest; ties with it stay."""
    target = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[1]), logits.shape[1])
    return jnp.where(_among_largest(logits, target.astype(jnp.float32), weigh=jnp.ones_like), logits, -jnp.inf)


def _keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the smallest set of likeliest tokens that has at least probability top_p (Holtzman et al. 2019).

    A row's largest logit is 0.
    """
    weights = jnp.exp(logits)
    target = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny) * jnp.sum(weights, axis=-1)  # so that one is kept
    kept = _among_largest(weights, target, weigh=lambda one: one)
    return jnp.where(kept | (top_p >= 1)[:, None], logits, -jnp.inf)


def _among_largest(x: jax.Array, target: jax.Array, weigh: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Whether an element of x [S, V] is among the fewest largest of its row whose weights add up to `target` [S].

    All are, if no weights do. The threshold is exact, and nothing is sorted: it is searched in an integer form of x
    that has its order.
    """
    keys = _ordered_bits(x)
    # A GPU's pass costs its launches and its reading of [S, V], a CPU's pass its comparisons.
    threshold = jax.lax.platform_dependent(
        keys, target, cpu=partial(_search, weigh=weigh, bits=1), default=partial(_search, weigh=weigh, bits=4)
    )
    return keys >= threshold[:, None]


def _search(keys: jax.Array, target: jax.Array, weigh: Callable[[jax.Array], jax.Array], bits: int) -> jax.Array:
    """The largest u32[S] for which the weights of {keys [S, V] >= it} add up to `target` [S]; 0 if none does.

    From the highest bit down, `bits` (a divisor of 32) in a pass: all 2**bits - 1 candidates' sums are one reduction.
    """
    count = 2**bits - 1
    # In spans, so that of a single row too all multiprocessors of a GPU have some.
    keys = jnp.pad(keys, ((0, 0), (0, -keys.shape[1] % _SPAN))).reshape(len(keys), -1, _SPAN)
    keys = jax.lax.optimization_barrier(keys)  # stored once; XLA would pad again in each pass, and store its summands

    def refine(_: Any, state: jax.Array) -> jax.Array:
        # The threshold's bits so far, and a bit that marks where the next digit's unit is. (As a number that XLA knows,
        # the unit would make it compile each pass by itself.)
        unit = state & -state
        threshold = state ^ unit
        candidates = [threshold + digit * unit for digit in range(1, count + 1)]
        weights = weigh(_from_ordered_bits(keys))
        sums = tuple(jnp.where(keys >= one[:, None, None], weights, 0.0) for one in candidates)
        for axis in (2, 1):
            sums = jax.lax.reduce(sums, (np.float32(0),) * count, lambda a, b: tuple(map(operator.add, a, b)), (axis,))
        digit = sum((one >= target).astype(jnp.uint32) for one in sums)  # the sums fall from one to the next
        return threshold + digit * unit | unit >> bits

    start = jnp.full(len(keys), 1 << (32 - bits), jnp.uint32)
    return jax.lax.fori_loop(0, 32 // bits, refine, start, unroll=bits > 1)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """u32 in the order of f32: flips all bits of negative numbers and the sign bit of the others."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 > 0, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.where(bits >> 31 > 0, bits ^ jnp.uint32(1 << 31), ~bits), jnp.float32)
