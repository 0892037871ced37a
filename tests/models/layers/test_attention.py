"""paged_attention's division of a step between the two kernels, against attention written out in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import LayerKV, StepBatch
from jaxllm.models.layers.attention import paged_attention

N, K, H, PAGE, PAGES = 4, 2, 8, 4, 16
SCALE = 0.3


def dense(q, k, v):
    """The last len(q) queries of a sequence: q [T, N, H], k and v [L, K, H] -> [T, N, H]."""
    k, v = np.repeat(k, N // K, axis=1), np.repeat(v, N // K, axis=1)
    scores = SCALE * np.einsum("tnh,lnh->ntl", q, k)
    scores[:, np.arange(len(k))[None, :] > np.arange(len(k) - len(q), len(k))[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ntl,lnh->tnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (0, 3), (2, 2)], ids=lambda p: f"T+{p[0]},S+{p[1]}")
def test_mixed_step(padding):
    """Two decode rows, then a prefill row with a cached prefix and one without; more rows than tokens or fewer."""
    random = np.random.default_rng(0)
    new, lengths = [1, 1, 3, 2], [6, 1, 8, 2]
    num_tokens, num_rows = sum(new) + padding[0], len(new) + padding[1]
    pages = random.permutation(PAGES)[:8].reshape(4, 2)
    keys, values = ([random.standard_normal((length, K, H)) for length in lengths] for _ in range(2))
    queries = random.standard_normal((num_tokens, N, H)).astype(np.float32)
    kv = np.full((2, PAGES, K, PAGE, H), 7.0, np.float32)
    k, v = (random.standard_normal((num_tokens, K, H)).astype(np.float32) for _ in range(2))
    slots = np.full(num_tokens, PAGES * PAGE, np.int32)
    starts = np.concatenate([[0], np.cumsum(new)])
    for row in range(4):
        for position in range(lengths[row]):
            page, offset = pages[row, position // PAGE], position % PAGE
            token = starts[row] + position - (lengths[row] - new[row])
            if position < lengths[row] - new[row]:
                kv[0, page, :, offset], kv[1, page, :, offset] = keys[row][position], values[row][position]
            else:
                k[token], v[token] = keys[row][position], values[row][position]
                slots[token] = page * PAGE + offset
    page_table = np.full((num_rows, 2), 99, np.int32)
    page_table[:4] = pages
    unused = np.zeros(num_tokens, np.int32)
    fields = dict(
        token_ids=unused,
        positions=unused,
        seq_ids=unused,
        slots=slots,
        page_table=page_table,
        kv_lens=np.asarray(lengths + [0] * padding[1], np.int32),
        query_starts=np.concatenate([starts, np.full(padding[1], starts[-1])]).astype(np.int32),
        prompt_lens=np.zeros(num_rows, np.int32),
        num_decodes=np.int32(2),
    )
    batch = StepBatch(**{name: jnp.asarray(value) for name, value in fields.items()})
    out, written = paged_attention(
        *map(jnp.asarray, (queries, k, v)), LayerKV(*map(jnp.asarray, kv)), batch, scale=SCALE
    )
    for row in range(4):
        here = slice(starts[row], starts[row + 1])
        np.testing.assert_allclose(out[here], dense(queries[here], keys[row], values[row]), atol=1e-5)
        np.testing.assert_array_equal(
            written.k[pages[row, 0], :, 0], np.asarray(keys[row][0], np.float32), err_msg="the first key of a row"
        )
    np.testing.assert_array_equal(out[starts[-1] :], 0)
    touched = np.isin(np.arange(PAGES), pages)
    np.testing.assert_array_equal(written.v[~touched], 7.0)


def test_more_rows_than_tokens_of_decode_alone():
    """A mixed step's shape with S > T: the rows that have no token are unused."""
    batch = StepBatch(
        token_ids=jnp.zeros(2, jnp.int32),
        positions=jnp.zeros(2, jnp.int32),
        seq_ids=jnp.arange(2, dtype=jnp.int32),
        slots=jnp.asarray([0, PAGE], jnp.int32),
        page_table=jnp.asarray([[0], [1], [99], [99]], jnp.int32),
        kv_lens=jnp.asarray([1, 1, 0, 0], jnp.int32),
        query_starts=jnp.asarray([0, 1, 2, 2, 2], jnp.int32),
        prompt_lens=jnp.zeros(4, jnp.int32),
        num_decodes=jnp.int32(2),
    )
    v = jnp.arange(2 * K * H, dtype=jnp.float32).reshape(2, K, H)
    kv = LayerKV(*(jnp.zeros((2, K, PAGE, H)) for _ in range(2)))
    out, _ = paged_attention(jnp.ones((2, N, H)), v, v, kv, batch, scale=1.0)
    np.testing.assert_allclose(out, np.repeat(v, N // K, axis=1), atol=1e-6)  # one key each: its value
