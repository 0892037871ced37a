"""What every benchmark writes beside its figures: hardware, versions, date, command."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys


def environment() -> dict:
    """Where and how this run was made."""
    packages = ("jax", "jaxlib", "flax", "numpy", "transformers", "torch")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *without_output_path(sys.argv)]),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def without_output_path(argv: list[str]) -> list[str]:
    """The arguments but for where the results go, which says nothing about them."""
    kept, skip = [], False
    for argument in argv:
        if not skip and argument not in ("--output-json", "--out"):
            kept.append(argument)
        skip = argument in ("--output-json", "--out")
    return kept


def hardware() -> str:
    """The accelerator's name, or the processor's with the number of cores."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def write(path: str | pathlib.Path, figures: dict | list) -> None:
    """Writes `figures` and the environment as JSON."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "results": figures}, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
