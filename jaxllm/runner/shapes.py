"""The ladder of shapes: every shape that a step may ever have, so that all of them can be compiled beforehand."""

from dataclasses import dataclass

_SMALLEST_MIXED = 32  # tokens


@dataclass(frozen=True, order=True)
class StepShape:
    """T tokens and S rows of a step, padding included. A decode-only step has one token a row, so T == S."""

    num_tokens: int
    num_rows: int
    decode_only: bool

    def __str__(self) -> str:
        return f"decode {self.num_rows}" if self.decode_only else f"mixed {self.num_tokens}"


@dataclass(frozen=True)
class SampleShape:
    """The sampler's program for S rows at a level of sampling work (sampler.Level)."""

    num_rows: int
    level: int

    def __str__(self) -> str:
        return f"sample {self.num_rows} at level {int(self.level)}"


@dataclass(frozen=True)
class ShapeLadder:
    """Decode-only shapes by rows and mixed shapes by tokens, each growing by a factor from smallest to largest."""

    decode: tuple[StepShape, ...]
    mixed: tuple[StepShape, ...]

    @classmethod
    def of(cls, max_num_seqs: int, max_num_batched_tokens: int, mixed_growth: int = 2) -> "ShapeLadder":
        rows = steps(1, min(max_num_seqs, max_num_batched_tokens), 2)
        tokens = steps(min(_SMALLEST_MIXED, max_num_batched_tokens), max_num_batched_tokens, mixed_growth)
        return cls(
            tuple(StepShape(s, s, True) for s in rows),
            tuple(StepShape(t, min(t, max_num_seqs), False) for t in tokens),
        )

    @property
    def all(self) -> tuple[StepShape, ...]:
        return self.decode + self.mixed

    def fit(self, num_tokens: int, num_rows: int, decode_only: bool) -> StepShape:
        """The smallest shape of the ladder that holds a step. Raises ValueError if none does."""
        for shape in self.decode if decode_only else self.mixed:
            if shape.num_tokens >= num_tokens and shape.num_rows >= num_rows:
                return shape
        raise ValueError(f"a step of {num_tokens} tokens in {num_rows} rows exceeds the largest shape, {self.all[-1]}")


def steps(first: int, last: int, growth: int) -> list[int]:
    """first, growth * first, growth**2 * first, ... and last."""
    values = []
    while first < last:
        values.append(first)
        first *= growth
    return [*values, last]
