"""Rotary position embedding (Su et al. 2021, "RoFormer") and the ways checkpoints stretch it to longer contexts.

Frequencies are computed in float32 with transformers' formulas, so that logits agree with it far into a context.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.config import RopeConfig


class Rope:
    """positions -> (cos, sin); computed once per step and shared by all layers."""

    def __init__(self, config: RopeConfig):
        self.config = config
        self.inv_freq = inverse_frequencies(config)

    def __call__(self, positions: jax.Array, seq_lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """positions i32[T] -> (cos, sin), float32 [T, rotary_dim / 2].

        seq_lens i32[T] is the length of each token's sequence, which types "dynamic" and "longrope" alone look at: see
        `sequence_lengths`.
        """
        inv_freq = self.inv_freq[None, :]
        if self.config.rope_type == "dynamic":
            inv_freq = _dynamic_inverse_frequencies(self.config, inv_freq, seq_lens)
        elif self.config.rope_type == "longrope":
            long = _rescaled(self.config, self.config.long_factors)[None, :]
            inv_freq = jnp.where((seq_lens > self.config.max_positions)[:, None], long, inv_freq)
        angles = positions.astype(jnp.float32)[:, None] * inv_freq
        return jnp.cos(angles) * self.config.attention_factor, jnp.sin(angles) * self.config.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate the first rotary_dim dimensions of x [T, N, H]; dimension i is paired with i + rotary_dim / 2, or with
    `interleaved`, 2i with 2i + 1.

    cos, sin: float32 [T, rotary_dim / 2]. Computed in float32, returned in x's dtype.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned, rest = jnp.split(x, (2 * half,), axis=-1)
    shape, axis = ((half, 2), -1) if interleaved else ((2, half), -2)
    pairs = turned.astype(jnp.float32).reshape(*x.shape[:-1], *shape)
    # (a, b) cos + (b, a) (-sin, sin): all in one pass, where two halves put together would be two
    cos, sin = jnp.expand_dims(cos, axis), jnp.stack((-sin, sin), axis=axis)
    rotated = pairs * cos + jnp.flip(pairs, axis) * sin
    return jnp.concatenate((rotated.reshape(turned.shape).astype(x.dtype), rest), axis=-1)


def sequence_lengths(positions: jax.Array, prompt_lens: jax.Array, seq_ids: jax.Array) -> jax.Array:
    """i32[T]: the length that each token's sequence had when the token was first computed.

    transformers picks dynamic and longrope frequencies by the longest position of each call, which is the prompt's
    length for a prompt's tokens and position + 1 for a generated one. Taken per token, it no longer depends on
    chunking, preemption or batch mates. (When a generated token takes a sequence past the trained length, `generate` of
    transformers computes longrope's KV again with the long factors; here the tokens before it keep the short ones.)
    """
    return jnp.maximum(prompt_lens[seq_ids], positions + 1)


def inverse_frequencies(config: RopeConfig) -> np.ndarray:
    """float32 [rotary_dim / 2], radians per position."""
    inv_freq = 1.0 / _period_scale(config)
    match config.rope_type:
        case "default" | "dynamic":
            return inv_freq
        case "longrope":
            return _rescaled(config, config.short_factors)
        case "linear":
            return inv_freq / np.float32(config.factor)
        case "llama3":
            return _llama3(config, inv_freq)
        case "yarn":
            return _yarn(config)
    raise ValueError(f"rope_type={config.rope_type!r} is not supported")


def _exponents(config: RopeConfig) -> np.ndarray:
    return np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)


def _period_scale(config: RopeConfig) -> np.ndarray:
    # Rounded once, from float64: numpy's float32 power is an ulp off in a tenth of its results, and far into a context
    # an ulp of a frequency is a visible angle.
    return np.power(config.theta, _exponents(config).astype(np.float64)).astype(np.float32)


def _dynamic_inverse_frequencies(config: RopeConfig, inv_freq: np.ndarray, seq_lens: jax.Array) -> jax.Array:
    """[T, rotary_dim / 2]. NTK-aware scaling: beyond the trained length, the base grows with the sequence."""
    dim, factor = config.rotary_dim, config.factor
    stretch = factor * seq_lens.astype(jnp.float32) / config.max_positions - (factor - 1)
    base = config.theta * jnp.maximum(stretch, 1.0) ** (dim / (dim - 2))
    scaled = 1.0 / base[:, None] ** _exponents(config)[None, :]
    return jnp.where((seq_lens > config.max_positions)[:, None], scaled, inv_freq)


def _rescaled(config: RopeConfig, factors: tuple[float, ...]) -> np.ndarray:
    """LongRoPE (Ding et al. 2024): each dimension's period has a factor of its own, found by search."""
    return 1 / (np.asarray(factors, np.float32) * _period_scale(config))


def _llama3(config: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = np.float32(config.max_positions) * inv_freq / np.float32(2 * math.pi)  # in the length trained with
    smooth = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - smooth) * inv_freq / np.float32(config.factor) + smooth * inv_freq


def _yarn(config: RopeConfig) -> np.ndarray:
    """YaRN (Peng et al. 2023): interpolate dimensions that turn under beta_slow times, keep those over beta_fast."""
    dim = config.rotary_dim

    def dimension_of(rotations: float) -> float:
        return dim * math.log(config.max_positions / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # a step, without dividing by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    keep, periods = 1 - ramp, _period_scale(config)
    return 1 / (np.float32(config.factor) * periods) * (1 - keep) + 1 / periods * keep
