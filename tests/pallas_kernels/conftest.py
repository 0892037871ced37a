import functools

import jax
import pytest

from pallas_kernels import mosaic


@pytest.fixture
def detecting_races(monkeypatch):
    """Kernels in interpret mode look for races, and print those that they find."""
    params = functools.partial(mosaic.plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(mosaic.plgpu, "InterpretGPUParams", params)
    jax.clear_caches()  # what was traced without
