"""Checked reads from a checkpoint's quantization_config. An error names the key, its value and what is allowed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REQUIRED = object()


class Settings:
    """A dict whose keys are read one by one. A key whose value is null counts as absent."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}={values!r} must be an object")
        self.values, self.where = values, where

    def choice(self, key: str, allowed: tuple, default: Any = _REQUIRED) -> Any:
        """The value of a key, which must be one of `allowed`; true and false are no numbers."""
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where}.{key} is missing; allowed: {_listed(allowed)}")
            return default
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"{self.where}.{key}={value!r} is not supported; allowed: {_listed(allowed)}")
        return value

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        return self.choice(key, (True, False), default)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if the key is absent."""
        value = self.values.get(key) or []
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{self.where}.{key}={value!r} must be a list of names")
        return tuple(value)

    def section(self, key: str) -> "Settings | None":
        """An object within this one."""
        value = self.values.get(key)
        return None if value is None else Settings(value, f"{self.where}.{key}")


@dataclass(frozen=True)
class Modules:
    """A list of layers: each entry a layer's name, the beginning, end or middle of one between dots, or "re:" and a
    regular expression that matches the beginning of one."""

    entries: tuple[str, ...]

    def __contains__(self, name: object) -> bool:
        return any(_matches(entry, str(name)) for entry in self.entries)


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return f".{entry.strip('.')}." in f".{name}."


def _listed(values: tuple) -> str:
    return ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
