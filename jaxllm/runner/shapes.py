"""The ladder of shapes: every shape that a step may ever have, so that all of them can be compiled beforehand."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class StepShape:
    """T tokens and S rows of a step, padding included. A decode-only step has one token a row, so T == S."""

    num_tokens: int
    num_rows: int
    decode_only: bool

    def __str__(self) -> str:
        return f"decode {self.num_rows}" if self.decode_only else f"mixed {self.num_tokens}"


@dataclass(frozen=True)
class ShapeLadder:
    """Decode-only shapes by rows and mixed shapes by tokens, each doubling from its smallest to its largest."""

    decode: tuple[StepShape, ...]
    mixed: tuple[StepShape, ...]

    @classmethod
    def of(cls, max_num_seqs: int, max_num_batched_tokens: int, smallest_mixed: int = 32) -> "ShapeLadder":
        rows = doubling(1, min(max_num_seqs, max_num_batched_tokens))
        tokens = doubling(min(smallest_mixed, max_num_batched_tokens), max_num_batched_tokens)
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


def doubling(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... and last."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, last]
