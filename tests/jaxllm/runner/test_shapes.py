"""The ladder holds every step that the scheduler may plan, and is short."""

import pytest

from jaxllm.runner.shapes import ShapeLadder, StepShape, steps


def test_steps():
    assert steps(1, 8, 2) == [1, 2, 4, 8]
    assert steps(32, 1000, 4) == [32, 128, 512, 1000]
    assert steps(5, 5, 2) == [5]
    assert steps(64, 1024, 2, midway_from=256) == [64, 128, 256, 384, 512, 768, 1024]
    assert steps(64, 384, 2, midway_from=256) == [64, 128, 256, 384]


@pytest.mark.parametrize(("seqs", "tokens"), [(1, 1), (8, 64), (1024, 16384), (48, 100), (64, 16)])
def test_every_step_fits(seqs, tokens):
    ladder = ShapeLadder.of(seqs, tokens)
    for rows in {1, min(seqs, tokens) // 2 or 1, min(seqs, tokens)}:
        shape = ladder.fit(rows, rows, True)
        assert shape.num_rows == shape.num_tokens >= rows and shape.decode_only
        for total in {rows, (rows + tokens) // 2, tokens}:
            shape = ladder.fit(total, rows, False)
            assert shape.num_tokens >= total and shape.num_rows >= rows and not shape.decode_only
    assert len(ladder.all) <= 26


def test_the_smallest_that_fits():
    ladder = ShapeLadder.of(8, 256)
    assert ladder.fit(3, 3, True) == StepShape(4, 4, True)
    assert ladder.fit(33, 2, False) == StepShape(64, 8, False)
    with pytest.raises(ValueError, match="257 tokens in 2 rows"):
        ladder.fit(257, 2, False)


def test_loops_are_the_decode_shapes_once_more():
    ladder = ShapeLadder.of(8, 256, loop_steps=4, loop_levels=(0, 3))
    assert [shape.num_rows for shape in ladder.loops] == 2 * [shape.num_rows for shape in ladder.decode]
    assert ladder.fit_loop(3, 0) == StepShape(4, 4, True, 4)
    assert ladder.fit_loop(3, 1) == ladder.fit_loop(3, 3) == StepShape(4, 4, True, 4, 3)
    assert ladder.fit(3, 3, True) == StepShape(4, 4, True)
    assert ShapeLadder.of(8, 256).loops == ()


def test_loops_that_sample_are_of_few_rows():
    ladder = ShapeLadder.of(8, 256, loop_steps=4, loop_levels=(0, 3), max_sampled_loop_rows=4)
    assert [shape.num_rows for shape in ladder.loops if shape.level == 3] == [1, 2, 4]
    assert ladder.fit_loop(4, 1) == StepShape(4, 4, True, 4, 3)
    assert ladder.fit_loop(5, 1) is None
    assert ladder.fit_loop(5, 0) == StepShape(8, 8, True, 4)


def test_few_rows_may_grow_faster():
    ladder = ShapeLadder.of(128, 256, few_rows_growth=4)
    assert [shape.num_rows for shape in ladder.decode] == [1, 4, 16, 32, 64, 128]
    assert [shape.num_rows for shape in ShapeLadder.of(6, 256, few_rows_growth=4).decode] == [1, 4, 6]


def test_large_shapes_may_lie_closer():
    ladder = ShapeLadder.of(1024, 16384, smallest_mixed=128, midway_rows=256, midway_tokens=2048)
    assert [shape.num_rows for shape in ladder.decode] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024]
    assert [shape.num_tokens for shape in ladder.mixed][-7:] == [2048, 3072, 4096, 6144, 8192, 12288, 16384]
