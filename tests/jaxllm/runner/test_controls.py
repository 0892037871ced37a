"""Penalties, bias and masks: against numpy, against transformers' logits processors, and independent of batch mates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from jaxllm.runner.controls import (
    abstract_tables,
    bitmask,
    control,
    count_tokens,
    neutral_row,
    num_words,
    own_columns,
    take_rows,
    unpack_bits,
    write_row,
)
from jaxllm.runner.sampler import Level, SamplingRows, SamplingSpec, SamplingTable, sample
from jaxllm.scheduling import Request

V, SEQS = 50, 6
LOGITS = np.random.default_rng(0).normal(0, 2, V).astype(np.float32)
PROMPT = [3, 4, 4, 9, 31, 32, 49]
ANSWER = [4, 7, 7, 7, 40]

_write_row, _control, _count = jax.jit(write_row), jax.jit(control), jax.jit(count_tokens)
_take, _sample = jax.jit(take_rows), jax.jit(sample, static_argnums=2)


def request_of(spec, prompt=PROMPT, answer=ANSWER) -> Request:
    request = Request("r", np.array(prompt, np.int32), 100, sampling=spec)
    request.output_token_ids = list(answer)
    return request


def table_row(request, vocab_size):
    return neutral_row(vocab_size)._replace(**own_columns(request, vocab_size))


def empty_tables():
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_tables(SEQS, V))


def filled(requests, slots=None):
    """(SamplingRows, the rows' control tables) of these requests, each with its answer so far."""
    slots = list(range(len(requests))) if slots is None else slots
    host, tables = SamplingTable(SEQS), empty_tables()
    for slot, request in zip(slots, requests, strict=True):
        host.fill(slot, request.sampling, request.prompt_len)
        if request.sampling.controlled:
            tables = _write_row(tables, np.int32(slot), table_row(request, V))
    lengths = jnp.array([request.num_tokens for request in requests], jnp.int32)
    rows = SamplingRows.unpack(jnp.asarray(host.rows[slots]), lengths, jnp.asarray(host.prompt_len[slots]))
    return rows, _take(tables, jnp.array(slots))


def controlled(*requests, logits=LOGITS, mask=None):
    rows, tables = filled(requests)
    mask = np.full((len(requests), num_words(V)), -1, np.int32) if mask is None else mask
    return np.asarray(_control(jnp.tile(logits, (len(requests), 1)), rows, tables, mask))


def by_numpy(spec: SamplingSpec, prompt=PROMPT, answer=ANSWER) -> np.ndarray:
    logits = LOGITS.astype(np.float64)
    for token, value in spec.bias:
        logits[token] += value
    counts = np.bincount(answer, minlength=V)
    seen = (counts > 0) | np.isin(np.arange(V), prompt)
    r = spec.repetition_penalty
    logits = np.where(seen, np.where(logits > 0, logits / r, logits * r), logits)
    logits -= spec.frequency_penalty * counts + spec.presence_penalty * (counts > 0)
    banned = set(spec.banned_ids) | (set(spec.masked_ids) if len(answer) < spec.min_tokens else set())
    if spec.allowed_ids is not None:
        banned |= set(range(V)) - set(spec.allowed_ids)
    logits[list(banned)] = -np.inf
    return logits


specs = st.builds(
    SamplingSpec,
    presence_penalty=st.sampled_from([0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 1.3, -0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.5]),
    min_tokens=st.sampled_from([0, 5, 6]),
    masked_ids=st.sampled_from([(), (1, 49), tuple(range(40))]),
    allowed_ids=st.sampled_from([None, (0,), tuple(range(0, V, 2))]),
    banned_ids=st.sampled_from([(), (0, 2)]),
    bias=st.sampled_from([(), ((3, 5.0), (49, -100.0)), tuple((i, i / 7) for i in range(V))]),
)


@given(st.lists(specs, min_size=1, max_size=SEQS))
@settings(max_examples=60)
def test_every_row_is_what_numpy_says_whatever_its_batch_mates(batch):
    got = controlled(*map(request_of, batch))
    for row, spec in enumerate(batch):
        np.testing.assert_allclose(got[row], by_numpy(spec), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got[row], controlled(request_of(spec))[0])  # to the bit


def test_a_request_without_controls_is_not_touched_by_its_slots_last_owner():
    tables = _write_row(empty_tables(), np.int32(0), table_row(request_of(SamplingSpec(allowed_ids=(1,))), V))
    host = SamplingTable(SEQS)
    host.fill(0, SamplingSpec(num_logprobs=1), 4)
    rows = SamplingRows.unpack(jnp.asarray(host.rows[:1]), jnp.array([9]), jnp.asarray(host.prompt_len[:1]))
    mask = np.full((1, num_words(V)), -1, np.int32)
    got = _control(jnp.asarray(LOGITS)[None], rows, _take(tables, jnp.array([0])), mask)
    np.testing.assert_array_equal(got[0], LOGITS)


def test_counting_on_the_device_is_counting_on_the_host():
    """The answer grows on the device; a request that comes back into another slot brings its answer along."""
    spec = SamplingSpec(frequency_penalty=1.0, repetition_penalty=1.1)
    tables = _write_row(empty_tables(), np.int32(2), table_row(request_of(spec, answer=[]), V))
    for token in ANSWER:
        tables = _count(tables, jnp.array([2, SEQS]), jnp.array([token, 11]))  # the second row does not sample
    again = _write_row(tables, np.int32(4), table_row(request_of(spec), V))
    for one, other in zip(_take(tables, jnp.array([2])), _take(again, jnp.array([4])), strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(tables.counts.astype(jnp.int32).sum()) == len(ANSWER)


def test_counts_do_not_wrap_around():
    tables = empty_tables()
    tables = tables._replace(counts=tables.counts.at[0, 5].set(65534))
    for _ in range(3):
        tables = _count(tables, jnp.array([0]), jnp.array([5]))
    assert int(tables.counts[0, 5]) == 65535


@pytest.mark.parametrize("size", [1, 31, 32, 33, 50, 96])
def test_bits(size):
    ids = list(range(0, size, 3))
    words = bitmask(ids, size)
    assert words.shape == (num_words(size),) and words.dtype == np.int32
    assert np.flatnonzero(np.asarray(unpack_bits(jnp.asarray(words)[None], size))[0]).tolist() == ids
    assert np.asarray(unpack_bits(~jnp.asarray(bitmask([], size))[None], size)).all()


def test_a_mask_of_the_step():
    mask = np.stack([bitmask([5, 49], V), ~bitmask([], V)])
    got = controlled(request_of(SamplingSpec()), request_of(SamplingSpec()), mask=mask)
    assert np.flatnonzero(np.isfinite(got[0])).tolist() == [5, 49]
    np.testing.assert_array_equal(got[1], LOGITS)


def test_a_row_that_may_sample_nothing_still_gives_a_token():
    rows, tables = filled([request_of(SamplingSpec(temperature=1.0, top_p=0.5, allowed_ids=(1,), banned_ids=(1,)))])
    mask = np.full((1, num_words(V)), -1, np.int32)
    token = int(_sample(_control(jnp.asarray(LOGITS)[None], rows, tables, mask), rows, Level.FULL)[0])
    assert 0 <= token < V


def test_distribution():
    """Draws with everything at once, against the same distribution by numpy."""
    spec = SamplingSpec(
        temperature=1.3, top_k=30, top_p=0.95, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2,
        bias=((2, 1.5), (7, 3.0)), allowed_ids=(*range(0, V, 2), 7),
    )  # fmt: skip
    p = special.softmax(by_numpy(spec) / spec.temperature)
    p[np.argsort(-p)[30:]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    p[order[np.searchsorted(np.cumsum(p[order]), 0.95) + 1 :]] = 0
    p /= p.sum()
    count = 4000
    rows, tables = filled([request_of(spec)])
    mask = np.full((1, num_words(V)), -1, np.int32)
    logits = jnp.tile(_control(jnp.asarray(LOGITS)[None], rows, tables, mask), (count, 1))
    rows = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), rows)
    rows = rows._replace(seed=jnp.stack([jnp.arange(count, dtype=jnp.uint32)] * 2, axis=1))
    drawn = np.bincount(np.asarray(_sample(logits, rows, Level.FULL)), minlength=V)
    kept = p > 0
    assert drawn[~kept].sum() == 0 and kept.sum() > 5
    assert stats.chisquare(drawn[kept], p[kept] * count).pvalue > 1e-4


# --- against transformers


def by_transformers(processor) -> np.ndarray:
    torch = pytest.importorskip("torch")
    return processor(torch.tensor([PROMPT + ANSWER]), torch.tensor(LOGITS)[None].clone())[0].numpy()


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_transformers(penalty):
    processors = pytest.importorskip("transformers.generation.logits_process")
    pytest.importorskip("torch")
    expected = by_transformers(processors.RepetitionPenaltyLogitsProcessor(penalty))
    np.testing.assert_allclose(controlled(request_of(SamplingSpec(repetition_penalty=penalty)))[0], expected, rtol=1e-6)


def test_bias_and_masks_are_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    pytest.importorskip("torch")
    bias = by_transformers(processors.SequenceBiasLogitsProcessor({(3,): 1.5, (8,): -2.0}))
    np.testing.assert_allclose(controlled(request_of(SamplingSpec(bias=((3, 1.5), (8, -2.0)))))[0], bias, rtol=1e-6)
    banned = by_transformers(processors.SuppressTokensLogitsProcessor([1, 40], device="cpu"))
    np.testing.assert_array_equal(controlled(request_of(SamplingSpec(banned_ids=(1, 40))))[0], banned)
    for least in (len(ANSWER), len(ANSWER) + 1):
        processor = processors.MinNewTokensLengthLogitsProcessor(len(PROMPT), least, [2, 9], device="cpu")
        spec = SamplingSpec(min_tokens=least, masked_ids=(2, 9))
        np.testing.assert_array_equal(controlled(request_of(spec))[0], by_transformers(processor))


@pytest.mark.parametrize(
    ("spec", "warper"),
    [
        (dict(top_k=7), ("TopKLogitsWarper", 7)),
        (dict(top_p=0.8), ("TopPLogitsWarper", 0.8)),
        (dict(min_p=0.1), ("MinPLogitsWarper", 0.1)),
    ],
    ids=str,
)
def test_filters_keep_what_transformers_keeps(spec, warper):
    processors = pytest.importorskip("transformers.generation.logits_process")
    pytest.importorskip("torch")
    kept = np.flatnonzero(np.isfinite(by_transformers(getattr(processors, warper[0])(warper[1]))))
    many = [dataclasses.replace(SamplingSpec(temperature=1.0, **spec), seed=seed) for seed in range(3000)]
    host = SamplingTable(len(many))
    for slot, one in enumerate(many):
        host.fill(slot, one, 4)
    rows = SamplingRows.unpack(jnp.asarray(host.rows), jnp.full(len(many), 9), jnp.asarray(host.prompt_len))
    drawn = np.unique(np.asarray(_sample(jnp.tile(LOGITS, (len(many), 1)), rows, Level.FILTER)))
    assert set(drawn) <= set(kept.tolist())
    expected = special.softmax(LOGITS[kept])
    assert set(kept[expected > 0.005].tolist()) <= set(drawn.tolist())
