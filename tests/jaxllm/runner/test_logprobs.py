"""Log probabilities against numpy, and the top k of large rows against a whole sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxllm.runner.logprobs import WHOLE_VOCABULARY, log_probabilities, top_k

LOGITS = np.random.default_rng(0).normal(0, 3, (3, 1000)).astype(np.float32)
TOKENS = np.array([5, 999, 0], np.int32)
WANTED = np.array([[3, 7, -1], [0, 999, 500], [-1, -1, -1]], np.int32)


def test_values_and_ranks():
    got = log_probabilities(LOGITS, TOKENS, WANTED, 5)
    expected = special.log_softmax(LOGITS.astype(np.float64), axis=-1)
    order = np.argsort(-expected, axis=-1)
    rows = np.arange(3)
    np.testing.assert_allclose(got.token, expected[rows, TOKENS], atol=1e-4)
    assert np.asarray(got.rank).tolist() == [order[row].tolist().index(TOKENS[row]) + 1 for row in rows]
    np.testing.assert_array_equal(got.top_ids, order[:, :5])
    np.testing.assert_allclose(got.top, np.take_along_axis(expected, order[:, :5], -1), atol=1e-4)
    np.testing.assert_allclose(got.wanted[1], expected[1, WANTED[1]], atol=1e-4)
    np.testing.assert_allclose(got.wanted[0, :2], expected[0, WANTED[0, :2]], atol=1e-4)


def test_the_whole_vocabulary_is_in_the_order_of_the_ids():
    got = log_probabilities(LOGITS, TOKENS, WANTED, WHOLE_VOCABULARY)
    assert got.top_ids is None
    np.testing.assert_allclose(got.top, special.log_softmax(LOGITS, axis=-1), atol=1e-4)


@pytest.mark.parametrize("k", [0, 1, 3, 20])
@pytest.mark.parametrize("size", [5000, 4096, 4097, 100])
def test_top_k_is_that_of_a_whole_sort_ties_included(k, size):
    values = np.random.default_rng(k).integers(0, 40, (4, size)).astype(np.float32)
    values[0] = 0  # nothing but ties
    values[1, size // 2 :] = -np.inf
    top, ids = jax.jit(top_k, static_argnums=1)(jnp.asarray(values), k)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(top, np.take_along_axis(values, order, -1))


def test_large_rows_are_not_sorted_whole():
    text = jax.jit(top_k, static_argnums=1).lower(jax.ShapeDtypeStruct((2, 152_064), jnp.float32), 20).as_text()
    sorted_sizes = [line for line in text.splitlines() if "top_k" in line or "stablehlo.sort" in line]
    assert sorted_sizes and not any("152064" in line or "152064" in line for line in sorted_sizes)
