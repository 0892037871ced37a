"""Packers of the published checkpoint formats, written from their descriptions, apart from jaxllm's code.

Each takes a random generator and a layer's shape, and gives the layer's tensors as a checkpoint would hold them, with
the values, float32 [out, in], that these tensors mean.
"""

import ml_dtypes
import numpy as np

SPREAD = 0.1  # of the weights, about


def pack_words(codes, bits, order=None):
    """[..., n] codes -> i32[..., n * bits / 32]; `order[i]` is the code that goes to the i-th place of a word."""
    per_word = 32 // bits
    grouped = codes.astype(np.uint64).reshape(*codes.shape[:-1], -1, per_word)
    words = np.zeros(grouped.shape[:-1], np.uint64)
    for place in range(per_word):
        words |= grouped[..., order[place] if order else place] << np.uint64(bits * place)
    return words.astype(np.uint32).view(np.int32)


def random_codes(rng, out, in_, groups, bits, symmetric):
    """(codes [out, in], zeros [out, groups], float16 scales [out, groups])."""
    codes = rng.integers(0, 2**bits, (out, in_))
    zeros = np.full((out, groups), 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, (out, groups))
    scales = (SPREAD / 2 ** (bits - 2) * rng.uniform(0.5, 1.5, (out, groups))).astype(np.float16)
    return codes, zeros, scales


def values_of(codes, zeros, scales, group_of):
    """(code - zero) * scale, each input by its group."""
    out, in_ = codes.shape
    values = np.empty((out, in_), np.float32)
    for i in range(in_):
        g = group_of[i]
        values[:, i] = (codes[:, i] - zeros[:, g]) * scales[:, g].astype(np.float32)
    return values


def gptq(rng, out, in_, *, bits=4, group_size=32, sym=True, desc_act=False, v2=False, **_):
    size = in_ if group_size == -1 else group_size
    codes, zeros, scales = random_codes(rng, out, in_, in_ // size, bits, sym)
    group_of = np.arange(in_) // size
    if desc_act:
        rng.shuffle(group_of)
    tensors = {
        "qweight": pack_words(codes, bits).T.copy(),
        "qzeros": pack_words((zeros if v2 else zeros - 1).T, bits),
        "scales": scales.T.copy(),
        "g_idx": group_of.astype(np.int32),
    }
    return tensors, values_of(codes, zeros, scales, group_of)


def awq(rng, out, in_, *, group_size=32, **_):
    codes, zeros, scales = random_codes(rng, out, in_, in_ // group_size, 4, symmetric=False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "qweight": pack_words(codes.T, 4, order),
        "qzeros": pack_words(zeros.T, 4, order),
        "scales": scales.T.copy(),
    }
    return tensors, values_of(codes, zeros, scales, np.arange(in_) // group_size)


def fp8_tensor(rng, out, in_, **_):
    codes = rng.normal(0, 30, (out, in_)).astype(ml_dtypes.float8_e4m3fn)
    scale = np.float32(SPREAD / 30 * rng.uniform(0.5, 1.5))
    tensors = {"weight": codes, "weight_scale": np.asarray(scale), "input_scale": np.asarray(np.float32(0.1))}
    return tensors, codes.astype(np.float32) * scale


def fp8_block(rng, out, in_, **_):
    codes = rng.normal(0, 30, (out, in_)).astype(ml_dtypes.float8_e4m3fn)
    scales = (SPREAD / 30 * rng.uniform(0.5, 1.5, (-(-out // 128), -(-in_ // 128)))).astype(np.float32)
    values = codes.astype(np.float32)
    for i in range(out):
        for j in range(in_):
            values[i, j] *= scales[i // 128, j // 128]
    return {"weight": codes, "weight_scale_inv": scales}, values


def ct_int8(rng, out, in_, *, strategy="channel", **_):
    codes = rng.integers(-127, 128, (out, in_)).astype(np.int8)
    scales = (SPREAD / 74 * rng.uniform(0.5, 1.5, (out, 1) if strategy == "channel" else (1,))).astype(np.float32)
    scales = scales.astype(ml_dtypes.bfloat16)
    return {"weight": codes, "weight_scale": scales}, codes * scales.astype(np.float32)


def ct_fp8(rng, out, in_, **_):
    codes = rng.normal(0, 30, (out, in_)).astype(ml_dtypes.float8_e4m3fn)
    scales = (SPREAD / 30 * rng.uniform(0.5, 1.5, (out, 1))).astype(np.float32)
    return {"weight": codes, "weight_scale": scales}, codes.astype(np.float32) * scales


def ct_packed(rng, out, in_, *, bits=4, group_size=32, sym=True, actorder=None, **_):
    """Codes are signed and stored with an offset of 2^(bits - 1)."""
    size = in_ if group_size == -1 else group_size
    codes, zeros, scales = random_codes(rng, out, in_, in_ // size, bits, sym)
    group_of = np.arange(in_) // size
    if actorder == "group":
        rng.shuffle(group_of)
    tensors = {
        "weight_packed": pack_words(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.asarray([out, in_], np.int64),
    }
    if not sym:
        tensors["weight_zero_point"] = pack_words(zeros.T, bits).T.copy()
    if actorder == "group":
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    return tensors, values_of(codes, zeros, scales, group_of)
