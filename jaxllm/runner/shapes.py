"""The ladder of shapes: every shape that a step may ever have, so that all of them can be compiled beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass

_FEW = 16


@dataclass(frozen=True, order=True)
class StepShape:
    """T tokens and S rows of a step, padding included. A decode-only step has one token a row, so T == S.

    num_steps: how many decode steps the device does in a row, each fed with the tokens of the one before.
    level: at which level of sampling work (sampler.Level) it does them; a single step finds the likeliest tokens.
    """

    num_tokens: int
    num_rows: int
    decode_only: bool
    num_steps: int = 1
    level: int = 0

    def __str__(self) -> str:
        if not self.decode_only:
            return f"mixed {self.num_tokens}"
        loop = f", {self.num_steps} steps at level {int(self.level)}" if self.num_steps > 1 else ""
        return f"decode {self.num_rows}{loop}"


@dataclass(frozen=True)
class SampleShape:
    """The sampler's program for S rows at a level of sampling work (sampler.Level)."""

    num_rows: int
    level: int

    def __str__(self) -> str:
        return f"sample {self.num_rows} at level {int(self.level)}"


@dataclass(frozen=True)
class ShapeLadder:
    """Decode-only shapes by rows and mixed shapes by tokens, each growing by a factor from smallest to largest.

    `loops` are the decode-only shapes once more for each level that loops sample at, the lowest first, for several
    steps in a row; beyond the lowest level those of few rows alone.
    """

    decode: tuple[StepShape, ...]
    mixed: tuple[StepShape, ...]
    loops: tuple[StepShape, ...] = ()

    @classmethod
    def of(
        cls,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        few_rows_growth: int = 2,
        smallest_mixed: int = 32,
        mixed_growth: int = 2,
        midway_rows: int | None = None,
        midway_tokens: int | None = None,
        loop_steps: int = 1,
        loop_levels: Sequence[int] = (0,),
        max_sampled_loop_rows: int = 128,
    ) -> "ShapeLadder":
        """`few_rows_growth`: how decode shapes grow up to _FEW rows; from there on they double.

        `midway_rows`, `midway_tokens`: from there on decode or mixed shapes have another one midway to each next.
        `max_sampled_loop_rows`: of loops beyond the lowest level.
        """
        most = min(max_num_seqs, max_num_batched_tokens)
        few = min(_FEW, most)
        rows = steps(1, few, few_rows_growth)[:-1] + steps(few, most, 2, midway_rows)
        tokens = steps(min(smallest_mixed, max_num_batched_tokens), max_num_batched_tokens, mixed_growth, midway_tokens)
        return cls(
            tuple(StepShape(s, s, True) for s in rows),
            tuple(StepShape(t, min(t, max_num_seqs), False) for t in tokens),
            tuple(
                StepShape(s, s, True, loop_steps, level)
                for level in loop_levels
                for s in rows
                if loop_steps > 1 and (level == loop_levels[0] or s <= max_sampled_loop_rows)
            ),
        )

    @property
    def loop_steps(self) -> int:
        """Decode steps in a program that does several; 1 if none does."""
        return self.loops[0].num_steps if self.loops else 1

    @property
    def all(self) -> tuple[StepShape, ...]:
        return self.loops + self.decode + self.mixed

    def fit(self, num_tokens: int, num_rows: int, decode_only: bool) -> StepShape:
        """The smallest shape of the ladder that holds a step. Raises ValueError if none does."""
        for shape in self.decode if decode_only else self.mixed:
            if shape.num_tokens >= num_tokens and shape.num_rows >= num_rows:
                return shape
        raise ValueError(f"a step of {num_tokens} tokens in {num_rows} rows exceeds the largest shape, {self.all[-1]}")

    def fit_loop(self, num_rows: int, level: int) -> StepShape | None:
        """The same for a loop of decode steps, of the lowest level that does `level`'s work; None if none does."""
        return next((shape for shape in self.loops if shape.level >= level and shape.num_rows >= num_rows), None)


def steps(first: int, last: int, growth: int, midway_from: int | None = None) -> list[int]:
    """first, growth * first, growth**2 * first, ... and last; from `midway_from` on also what is midway between two."""
    values = []
    while first < last:
        values.append(first)
        midway = (1 + growth) * first // 2
        if midway_from is not None and midway_from <= first and midway < last:
            values.append(midway)
        first *= growth
    return [*values, last]
