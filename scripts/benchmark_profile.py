"""What the kernels of a GPU take by themselves, by JAX's profiler: for the benchmarks."""

import pathlib
import tempfile
from collections.abc import Callable

import jax


def kernel_durations(run: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, seconds) of every kernel and copy that a GPU does for `run`, one after the other.

    The profiler has kernels run one by one and not as a captured graph, so that what the host needs for launching them
    is in none of the durations. `run` waits for its results.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        return [
            (event.name, event.duration_ns / 1e9)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
