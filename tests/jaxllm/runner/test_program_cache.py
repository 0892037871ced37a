"""Programs come back from disk without being traced, and nothing that is stale or broken does."""

import errno
import os
import tempfile

import jax
import jax.numpy as jnp
import pytest

from jaxllm.runner.executables import Executables
from jaxllm.runner.program_cache import ProgramCache

# A CPU's program that came from JAX's own cache cannot be written again: these are in nobody's.
UNIT = float(1 + int.from_bytes(os.urandom(2)))


class Lowering:
    """Lowers x * key * UNIT, and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, key):
        self.count += 1
        return jax.jit(lambda x: {"times": x * (key * UNIT)}).lower(jnp.zeros(3))


def programs(folder, lowering, ingredients="a", classes=()):
    return Executables(lowering, ProgramCache(folder, ingredients, classes))


def test_a_second_process_traces_nothing(tmp_path):
    lowering = Lowering()
    first, second = programs(tmp_path, lowering), programs(tmp_path, lowering)
    first.warm_up([2, 3], progress=False)
    assert lowering.count == 2 and len(list(tmp_path.iterdir())) == 2
    second.warm_up([2, 3], progress=False)
    assert lowering.count == 2 and len(second) == 2
    assert second[3](jnp.ones(3))["times"].tolist() == [3 * UNIT] * 3


def test_other_ingredients_are_other_programs(tmp_path):
    lowering = Lowering()
    programs(tmp_path, lowering)[2]
    programs(tmp_path, lowering, ingredients="b")[2]
    programs(tmp_path, lowering, classes=[Lowering])[2]
    assert lowering.count == 3


def test_another_environment_has_other_programs(tmp_path, monkeypatch):
    lowering = Lowering()
    programs(tmp_path, lowering)[2]
    monkeypatch.setenv("PALLAS_KERNELS_BACKEND", "reference")
    programs(tmp_path, lowering)[2]
    assert lowering.count == 2


def test_a_broken_file_is_made_again(tmp_path, caplog):
    lowering = Lowering()
    programs(tmp_path, lowering)[2]
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert programs(tmp_path, lowering)[2](jnp.ones(3))["times"].tolist() == [2 * UNIT] * 3
    assert lowering.count == 2 and "cannot be read" in caplog.text
    programs(tmp_path, lowering)[2]
    assert lowering.count == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert programs(tmp_path / "file", Lowering())[2](jnp.ones(3))["times"].tolist() == [2 * UNIT] * 3
    assert "was not kept" in caplog.text


def test_an_entry_that_cannot_be_touched_is_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError("another user's file")

    lowering = Lowering()
    programs(tmp_path, lowering)[11]
    monkeypatch.setattr(os, "utime", refuse)
    assert programs(tmp_path, lowering)[11](jnp.ones(3))["times"].tolist() == [11 * UNIT] * 3
    assert lowering.count == 1 and "cannot be read" not in caplog.text


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, caplog, failing):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def make(real=tempfile.NamedTemporaryFile, **options):
        file = real(**options)
        if failing == "write":
            file.write = fail
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", make)
    if failing == "replace":
        monkeypatch.setattr(os, "replace", fail)
    assert programs(tmp_path / "c", Lowering())[2](jnp.ones(3))["times"].tolist() == [2 * UNIT] * 3
    assert "was not kept" in caplog.text and "No space left" in caplog.text
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("days", [29, 31])
def test_what_nobody_used_for_a_month_goes(tmp_path, days):
    import time

    old = tmp_path / "old"
    old.write_bytes(b"")
    os.utime(old, (time.time() - days * 86400,) * 2)
    programs(tmp_path, Lowering())[2]
    assert old.exists() == (days < 30)
