"""Random JSON schemas whose instances are short, for the tests of structured output."""

from __future__ import annotations

import random
from typing import Any

NAMES = [
    "a",
    "name",
    "naïve",
    "日本",
    "emoji 😀",
    'quo"te',
    "back\\slash",
    "with space",
    "x-y",
    "ключ",
    "$id_",
    "items",
]
TEXTS = ["", "red", "grün", "日本語", '"quoted"', "tab\tand\nline", "😀😀", "a\\b", "née", "0"]
PATTERNS = [
    "^[a-c]{2,4}$",
    "^\\d{3}-\\d{2}$",
    "^(foo|bär)[0-9]?$",
    '^[^\\s"]{1,6}$',
    "^[А-Я][а-я]{0,5}$",
    "^(yes|no|日本)$",
    "^.{0,4}$",
]
FORMATS = ["date", "uuid", "ipv4"]


class SchemaGenerator:
    """Schemas of nested objects, arrays, numbers, texts, enums and their combinations, the same ones for each seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self) -> dict[str, Any]:
        schema = self._object(depth=2) if self._random.random() < 0.8 else self._any(depth=2)
        if self._random.random() < 0.2:
            schema = {"$defs": {"shared": self._leaf()}, "type": "object", "additionalProperties": False} | {
                "properties": {"first": {"$ref": "#/$defs/shared"}, "rest": schema},
                "required": ["first"],
            }
        return schema

    def _any(self, depth: int) -> dict[str, Any]:
        if depth == 0 or self._random.random() < 0.5:
            return self._leaf()
        return self._random.choice([self._object, self._array, self._tuple, self._any_of, self._map])(depth - 1)

    def _leaf(self) -> dict[str, Any]:
        kinds = [self._text, self._pattern, self._integer, self._number, self._enum, self._const, self._simple]
        return self._random.choice(kinds)()

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(NAMES, self._random.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._random.random() < 0.6],
            "additionalProperties": False,
        }

    def _map(self, depth: int) -> dict[str, Any]:
        return {
            "type": "object",
            "patternProperties": {"^[a-zé]{1,3}$": self._any(depth)},
            "additionalProperties": False,
            "maxProperties": 2,
        }

    def _array(self, depth: int) -> dict[str, Any]:
        low = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self._any(depth),
            "minItems": low,
            "maxItems": low + self._random.randint(0, 2),
        }

    def _tuple(self, depth: int) -> dict[str, Any]:
        items = [self._any(depth) for _ in range(self._random.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": self._random.randint(0, len(items))}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth) for _ in range(self._random.randint(2, 3))]}

    def _text(self) -> dict[str, Any]:
        low = self._random.randint(0, 5)
        kind = "string" if self._random.random() < 0.7 else ["string", "null"]
        return {"type": kind, "minLength": low, "maxLength": low + self._random.randint(0, 10)}

    def _pattern(self) -> dict[str, Any]:
        if self._random.random() < 0.2:
            return {"type": "string", "format": self._random.choice(FORMATS)}
        return {"type": "string", "pattern": self._random.choice(PATTERNS)}

    def _integer(self) -> dict[str, Any]:
        low = self._random.randint(-200, 200)
        high = low + self._random.randint(1, 1000)
        bounds = [
            {"minimum": low, "maximum": high},
            {"exclusiveMinimum": low, "maximum": high},
            {"minimum": low, "exclusiveMaximum": high},
            {"allOf": [{"minimum": low}, {"maximum": high}]},
        ]
        return {"type": "integer", **self._random.choice(bounds)}

    def _number(self) -> dict[str, Any]:
        low = self._random.randint(-200, 200) / 4
        bounds = {"type": "number", "minimum": low, "maximum": low + self._random.randint(1, 40)}
        # Of the others the tiny model writes decimals without end.
        return bounds | ({"multipleOf": self._random.choice([0.25, 0.5])} if self._random.random() < 0.8 else {})

    def _enum(self) -> dict[str, Any]:
        values = [*self._random.sample(TEXTS, 3), self._random.randint(-9, 9), None, True, 2.5, {"é": ["x"]}]
        return {"enum": self._random.sample(values, self._random.randint(1, 5))}

    def _const(self) -> dict[str, Any]:
        return {"const": self._random.choice([*TEXTS, 7, -1.5, False, None, [1, "ü"], {"k": {"日": []}}])}

    def _simple(self) -> dict[str, Any]:
        return {"type": self._random.choice(["boolean", "null", ["boolean", "null"]])}
