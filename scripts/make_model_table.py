"""Writes README.md's table of models from the registry, between its two markers.

python scripts/make_model_table.py
"""

import pathlib

from jaxllm.models import model_names

README = pathlib.Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by scripts/make_model_table.py -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """A row a set of names; the architectures that people know by it. A network for tests is no model."""
    architectures: dict[str, list[str]] = {}
    for architecture, known_as in model_names().items():
        architectures.setdefault(known_as, []).append(f"`{architecture}`")
    rows = sorted((known_as, ", ".join(names)) for known_as, names in architectures.items())
    lines = [f"| {known_as} | {names} |" for known_as, names in rows if "ForTesting" not in names]
    return "\n".join(["| models | architecture |", "| --- | --- |", *lines, ""])


def with_table(readme: str) -> str:
    """The text of README.md with the table as it should be."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
