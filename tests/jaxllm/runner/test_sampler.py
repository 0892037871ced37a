"""The sampler against numpy: distributions by chi-squared, draws that depend on seed and position alone."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxllm.runner.sampler import Level, SamplingRows, SamplingSpec, SamplingTable, _ordered_bits, _search, sample

V = 12
LOGITS = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)
_jitted = jax.jit(sample, static_argnums=2)


def _sample(logits, batch, level=Level.FULL):
    return _jitted(logits, batch, level)


def rows(specs, kv_lens=None, prompt_len=4) -> SamplingRows:
    table = SamplingTable(len(specs))
    for slot, spec in enumerate(specs):
        table.fill(slot, spec, prompt_len)
    kv_lens = jnp.full(len(specs), 10, jnp.int32) if kv_lens is None else jnp.asarray(kv_lens, jnp.int32)
    return SamplingRows.unpack(jnp.asarray(table.rows), kv_lens, jnp.asarray(table.prompt_len))


def draw(spec: dict, count=4000, logits=LOGITS) -> np.ndarray:
    """`count` draws, each of another seed."""
    batch = rows([SamplingSpec(seed=seed, **spec) for seed in range(count)])
    return np.asarray(_sample(jnp.tile(logits, (count, 1)), batch))


def expected_probabilities(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    p = special.softmax(LOGITS.astype(np.float64) / temperature)
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    enough = np.searchsorted(np.cumsum(p[order]), top_p) + 1  # the smallest set that reaches top_p
    p[order[enough:]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "spec",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=1.7),
        dict(temperature=1.0, top_k=3),
        dict(temperature=1.0, top_k=V + 5),
        dict(temperature=1.0, top_p=0.7),
        dict(temperature=1.0, top_p=0.01),
        dict(temperature=1.3, min_p=0.2),
        dict(temperature=1.2, top_k=6, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)
def test_distribution(spec):
    expected = expected_probabilities(**spec)
    counts = np.bincount(draw(spec), minlength=V)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], expected[kept] * counts.sum()).pvalue > 1e-4
    else:
        assert counts[kept] == counts.sum()


def test_greedy_rows_and_their_sampling_neighbours():
    batch = rows([SamplingSpec(), SamplingSpec(temperature=1.0, seed=3), SamplingSpec()])
    tokens = np.asarray(_sample(jnp.tile(LOGITS, (3, 1)), batch))
    assert tokens[0] == tokens[2] == LOGITS.argmax()


def test_a_draw_depends_on_seed_and_position_alone():
    spec = SamplingSpec(temperature=1.5, seed=2**63 + 17, top_p=0.95)
    alone = np.asarray(_sample(jnp.asarray(LOGITS)[None], rows([spec])))[0]
    mates = [SamplingSpec(temperature=0.7, seed=i, top_k=i, min_p=0.1) for i in range(6)]
    for place in range(7):
        batch = rows([*mates[:place], spec, *mates[place:]])
        assert np.asarray(_sample(jnp.tile(LOGITS, (7, 1)), batch))[place] == alone
    many = [SamplingSpec(temperature=1.5, seed=5)] * 200
    by_position = np.asarray(_sample(jnp.tile(LOGITS, (200, 1)), rows(many, np.arange(1, 201))))
    assert len(set(by_position.tolist())) > 4
    assert len(set(np.asarray(_sample(jnp.tile(LOGITS, (200, 1)), rows(many))).tolist())) == 1


def test_ties_at_the_kth_place_stay():
    logits = np.zeros(V, np.float32)
    logits[:4] = 5.0
    assert set(draw(dict(temperature=1.0, top_k=2), 200, logits).tolist()) == {0, 1, 2, 3}


def test_the_likeliest_is_kept_however_small_top_p():
    assert set(draw(dict(temperature=1.0, top_p=1e-300, min_p=1e-300), 50).tolist()) == {int(LOGITS.argmax())}


def test_extreme_logits():
    logits = np.array([1e30, -1e30, 0, -np.inf, 1e30, *[-5.0] * 7], np.float32)
    assert set(draw(dict(temperature=1.0, top_k=5, top_p=0.9), 200, logits).tolist()) == {0, 4}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_large_rows_are_not_sorted(platform):
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows([SamplingSpec()] * 2))
    logits = jax.ShapeDtypeStruct((2, 152_064), jnp.float32)
    text = _jitted.trace(logits, batch, Level.FULL).lower(lowering_platforms=(platform,)).as_text()
    assert not re.search(r"stablehlo\.sort|top_k", text)
    sums = max(line.count(" init:") for line in text.splitlines() if "stablehlo.reduce(" in line)
    assert sums == {"cpu": 2, "cuda": 15}[platform]  # of a pass of the search; an argmax has 2


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", ["count", "probability"])
def test_the_threshold_is_that_of_a_sort_however_many_bits_a_pass_finds(bits, kind):
    """Weights are multiples of 2**-12, so that their sums are exact in whatever order they are added."""
    random = np.random.default_rng(bits)
    if kind == "count":
        x = random.normal(0, 3, (40, 300)).round(1).astype(np.float32) + 0.0  # with ties, without -0.0
        x[:4, ::3], x[4:8] = -np.inf, x[4:8] - 1e30
        weigh, weights, target = jnp.ones_like, np.ones_like(x), np.arange(1, 41)
    else:
        x = (random.integers(0, 64, (40, 300)) / 4096).astype(np.float32)
        weigh, weights = (lambda one: one), x
        target = np.floor(x.sum(1) * random.uniform(0, 1, 40) * 4096).clip(1) / 4096
    target[-1] = weights[-1].sum()
    keys = _ordered_bits(jnp.asarray(x))
    found = np.asarray(jax.jit(partial(_search, weigh=weigh, bits=bits))(keys, target.astype("f4")))
    for row in range(40):
        order = np.argsort(-x[row], kind="stable")
        last = order[np.searchsorted(np.cumsum(weights[row][order]), target[row])]  # with it the target is reached
        np.testing.assert_array_equal(np.asarray(keys[row]) >= found[row], x[row] >= x[row][last])


def test_padding_rows_are_greedy():
    batch = rows([SamplingSpec(temperature=1.0)], kv_lens=[0])
    assert float(batch.temperature[0]) == 0


def test_a_step_has_the_level_of_all_of_its_rows():
    drawing = SamplingSpec(temperature=1.0)
    specs = [SamplingSpec(), drawing, SamplingSpec(temperature=1.0, top_k=1), SamplingSpec(num_logprobs=0)]
    table = SamplingTable(len(specs))
    for slot, spec in enumerate(specs):
        table.fill(slot, spec, 1)
    levels = [table.level(np.array(slots, np.int64)) for slots in ([], [0], [0, 1], [1, 2], [0, 3], [2, 3])]
    assert levels == [Level.GREEDY, Level.GREEDY, Level.DRAW, Level.FILTER, Level.CONTROL, Level.FULL]


@pytest.mark.parametrize(
    ("spec", "level"),
    [
        (SamplingSpec(), Level.GREEDY),
        (SamplingSpec(top_k=3, top_p=0.5), Level.GREEDY),
        (SamplingSpec(temperature=1.0, seed=9), Level.DRAW),
        (SamplingSpec(temperature=1.0, seed=9, top_k=3), Level.FILTER),
        (SamplingSpec(temperature=1.0, seed=9, top_p=0.6), Level.FILTER),
        (SamplingSpec(temperature=1.0, seed=9, min_p=0.1), Level.FILTER),
        (SamplingSpec(num_logprobs=0), Level.CONTROL),
        (SamplingSpec(min_tokens=1, masked_ids=(1,)), Level.CONTROL),
        (SamplingSpec(temperature=1.0, seed=9, presence_penalty=0.1), Level.CONTROL),
        (SamplingSpec(temperature=1.0, seed=9, logits_processors=(abs,)), Level.CONTROL),
        (SamplingSpec(temperature=1.0, seed=9, top_k=3, bias=((1, 1.0),)), Level.FULL),
    ],
    ids=str,
)
def test_the_level_that_a_row_needs_is_enough_and_higher_ones_change_nothing(spec, level):
    assert spec.level == level
    batch = rows([spec] * 50, np.arange(5, 55))
    expected = np.asarray(_sample(jnp.tile(LOGITS, (50, 1)), batch, level))
    for higher in Level:
        if higher & level == level:
            np.testing.assert_array_equal(_sample(jnp.tile(LOGITS, (50, 1)), batch, higher), expected)
