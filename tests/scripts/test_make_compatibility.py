"""docs/compatibility.md says what the code does."""

import importlib.util
import pathlib

from jaxllm import LLM
from jaxllm.config import NOT_HONOURED
from jaxllm.sampling_params import known_fields
from jaxllm.validation import REFUSED_METHODS

ROOT = pathlib.Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("make_compatibility", ROOT / "scripts" / "make_compatibility.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_the_file_is_up_to_date():
    assert script.FILE.read_text() == script.document(), "run scripts/make_compatibility.py"


def test_every_known_name_is_in_it():
    assert set(known_fields()) <= set(script.SAMPLING_FIELDS)
    assert set(NOT_HONOURED) <= set(script.ENGINE_ARGUMENTS)


def test_states():
    assert script.sampling_state("temperature") == "honoured"
    assert script.sampling_state("watermarking").startswith("refused unless `None`")
    assert script.sampling_state("no_such_field") == script.engine_state("no_such_field") == "refused"
    assert script.engine_state("swap_space").startswith("refused unless `0` or `4`")
    assert script.method_state("generate").startswith("Answers all prompts")
    assert script.method_state("collective_rpc").startswith("refused: there is one process")


def test_every_method_of_vllm_s_is_there_or_refused_by_name():
    for name in script.LLM_METHODS:
        assert hasattr(LLM, name) != (name in REFUSED_METHODS), name
    assert set(REFUSED_METHODS) <= set(script.LLM_METHODS)
