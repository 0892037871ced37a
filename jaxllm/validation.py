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


_ONE_PROCESS = "there is one process and no workers: LLM.apply_model calls a function with the weights"
_FIXED_WEIGHTS = "an engine's weights are not replaced"
REFUSED_METHODS = {
    "collective_rpc": _ONE_PROCESS,
    "set_tokenizer": "the tokenizer is given at the start, LLM(tokenizer=...)",
    "release_kv_cache_memory": "sleep() frees it and wake_up() restores it",
    "init_weight_transfer_engine": _FIXED_WEIGHTS,
    "shutdown_weight_transfer_engine": _FIXED_WEIGHTS,
    "start_weight_update": _FIXED_WEIGHTS,
    "start_draft_weight_update": _FIXED_WEIGHTS,
    "update_weights": _FIXED_WEIGHTS,
    "finish_weight_update": _FIXED_WEIGHTS,
    "update_weight_version": _FIXED_WEIGHTS,
    "get_weight_version": _FIXED_WEIGHTS,
}
"""Methods of vLLM's engines that there are none of here, and why."""


def missing_attribute(owner: object, name: str) -> AttributeError:
    """The error for an attribute that an engine lacks; for one of vLLM's methods it says why."""
    why = f": vLLM's is not supported; {REFUSED_METHODS[name]}" if name in REFUSED_METHODS else ""
    return AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}{why}", name=name, obj=owner)
