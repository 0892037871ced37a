"""Nothing is compiled after warm-up without anybody noticing."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.runner import executables
from jaxllm.runner.executables import Executables, LateCompilation


def doubling(size):
    return jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((size,), jnp.float32))


def test_warm_up_then_use():
    programs = Executables(doubling)
    programs.warm_up([1, 2, 4], progress=False)
    assert len(programs) == 3
    assert programs[2](jnp.ones(2)).tolist() == [2.0, 2.0]


def test_late_compilation(monkeypatch, caplog):
    programs = Executables(doubling)
    programs.warm_up([1], progress=False)
    with pytest.raises(LateCompilation, match="3 was not compiled"):
        programs[3]
    monkeypatch.setattr(executables, "on_late_compilation", "warn")
    assert programs[3](jnp.ones(3)).tolist() == [2.0] * 3
    assert "compiling 3 after warm-up" in caplog.text


def test_before_warm_up_compiling_is_no_event(caplog):
    programs = Executables(doubling)
    assert programs[2](jnp.ones(2)).tolist() == [2.0, 2.0] and not caplog.text


def test_threads_whose_priority_cannot_be_set_compile_too(monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")  # as where the process's own is lower already

    monkeypatch.setattr(executables.os, "setpriority", refuse)
    programs = Executables(doubling)
    programs.warm_up([1, 2], progress=False)
    assert len(programs) == 2
