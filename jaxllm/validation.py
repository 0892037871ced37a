"""Errors that help: an unknown name is answered with the nearest known one."""

import difflib
from collections.abc import Iterable


def check_known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises TypeError for the first of `given` that is not in `known`, suggesting the nearest known name."""
    known = list(known)
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {nearest[0]!r}?" if nearest else ""
            raise TypeError(f"{what} has no field {name!r}{hint or '.'} Known: {', '.join(sorted(known))}")
