"""The whole suite runs strictly: a compilation after warm-up is an error, and programs compiled once are shared."""

import os
import tempfile

import hypothesis
import pytest

# The same examples each time, lest a change fail by another's bad luck. --hypothesis-profile default looks afresh.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")

os.environ.setdefault("JAX_PLATFORMS", "cpu" if os.environ.get("JAXLLM_TEST_GPU") is None else "")
os.environ.setdefault("JAXLLM_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"jaxllm-tests-{os.getuid()}"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NPROC", "8")  # with fewer threads, kernels in interpret mode can wait for one another for ever


@pytest.fixture(autouse=True)
def no_late_compilation(monkeypatch):
    from jaxllm.runner import executables

    monkeypatch.setattr(executables, "on_late_compilation", "raise")


def pytest_collection_modifyitems(config, items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_gpu():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _has_gpu() -> bool:
    import jax

    return any(device.platform == "gpu" for device in jax.devices())
