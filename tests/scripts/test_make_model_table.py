"""README.md lists what the registry has."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("make_model_table", ROOT / "scripts" / "make_model_table.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_readme_is_up_to_date():
    readme = script.README.read_text()
    assert readme == script.with_table(readme), "run scripts/make_model_table.py"


def test_every_family_has_names():
    assert all(script.model_names().values())
