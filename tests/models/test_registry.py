import sys
from importlib.metadata import EntryPoint

import pytest

from jaxllm.models import ModelConfig, build, read_config, register_model, registry, supported_architectures, testing


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))


def config(architecture):
    return ModelConfig.from_hf(testing.config_dict(architectures=[architecture]))


def test_unknown_architecture_lists_the_supported_and_the_nearest():
    with pytest.raises(ValueError) as error:
        build(config("LLamaForCausalLm"))
    message = str(error.value)
    assert "'LLamaForCausalLm'" in message and "nearest is LlamaForCausalLM" in message
    assert all(name in message for name in supported_architectures())


def test_unknown_dtype():
    with pytest.raises(ValueError, match=r"dtype='int8'.*float32, bfloat16, float16"):
        build(config(testing.ARCHITECTURE), "int8")


def test_registered_class_and_path_are_built():
    register_model("Mine", testing.RunningSumForTesting)
    register_model("Theirs", "jaxllm.models.testing:RunningSumForTesting")
    assert build(config("Mine")).abstract_params == build(config("Theirs")).abstract_params
    assert {"Mine", "Theirs"} <= set(supported_architectures())


def test_a_path_is_not_imported_before_it_is_built():
    register_model("Broken", "no_such_module_of_anyone:Model")
    assert "no_such_module_of_anyone" not in sys.modules
    with pytest.raises(ImportError, match="'Broken' is registered as 'no_such_module_of_anyone:Model'"):
        build(config("Broken"))


def test_missing_class_is_named():
    register_model("Broken", "jaxllm.models.testing:NoSuchModel")
    with pytest.raises(ImportError, match="NoSuchModel"):
        build(config("Broken"))


def test_a_name_is_taken_once():
    register_model("LlamaForCausalLM", "jaxllm.models.llama:LlamaForCausalLM")  # the same again is no conflict
    with pytest.raises(ValueError, match=r"'LlamaForCausalLM' is registered already.*replace=True"):
        register_model("LlamaForCausalLM", testing.RunningSumForTesting)
    register_model("LlamaForCausalLM", testing.RunningSumForTesting, replace=True)
    assert "embed" in build(config("LlamaForCausalLM")).abstract_params


@pytest.mark.parametrize("target", ["jaxllm.models.testing", "a:b:c", ":Model", "module:"])
def test_malformed_target(target):
    with pytest.raises(ValueError, match="'module:Class'"):
        register_model("Mine", target)


def test_entry_points_of_other_packages_are_in_the_table(monkeypatch):
    point = EntryPoint("Plugin", "jaxllm.models.testing:RunningSumForTesting", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "jaxllm.models" else [])
    assert "Plugin" in supported_architectures()
    assert build(config("Plugin")).config.architecture == "Plugin"


@pytest.mark.parametrize("architecture", ["Llama4ForConditionalGeneration", "Qwen3NextForCausalLM", "GemmaForCausalLM"])
def test_a_name_that_is_near_a_supported_one_is_not_taken_for_it(architecture):
    with pytest.raises(ValueError, match=rf"'{architecture}' is not supported; the nearest is"):
        read_config(testing.config_dict(architectures=[architecture]))
