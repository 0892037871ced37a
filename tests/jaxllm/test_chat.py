"""LLM.chat: what the model is given is what the chat template says, token for token."""

import dataclasses

import pytest

from jaxllm import SamplingParams
from tests.jaxllm.conftest import make_sum_llm

GREEDY = SamplingParams(temperature=0, max_tokens=4)
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def chat(llm, messages, params=GREEDY, **options):
    return llm.chat(messages, params, False, **{"chat_template": TEMPLATE, **options})


def test_the_template_writes_the_prompt(default_llm):
    (output,) = chat(default_llm, CONVERSATION)
    assert output.prompt == "<system>Be brief.<user>Who are you?<a>"
    tokenizer = default_llm.get_tokenizer()
    assert output.prompt_token_ids == tokenizer.encode(output.prompt, add_special_tokens=False)
    same = default_llm.generate({"prompt_token_ids": output.prompt_token_ids}, GREEDY, use_tqdm=False)[0]
    assert same.outputs[0].text == output.outputs[0].text


def test_the_engine_s_own_template(default_llm, monkeypatch):
    config = dataclasses.replace(default_llm.config, chat_template="{{ messages[0].content }}")
    monkeypatch.setattr(default_llm, "config", config)
    assert chat(default_llm, CONVERSATION, chat_template=None)[0].prompt == "Be brief."
    assert chat(default_llm, CONVERSATION)[0].prompt.endswith("<a>")
    default_llm.enqueue_chat([CONVERSATION, CONVERSATION], GREEDY, chat_template=TEMPLATE)
    outputs = default_llm.wait_for_completion(use_tqdm=False)
    assert [output.prompt for output in outputs] == [chat(default_llm, CONVERSATION)[0].prompt] * 2


def test_options_reach_the_template(default_llm):
    (output,) = chat(default_llm, CONVERSATION, add_generation_prompt=False)
    assert output.prompt == "<system>Be brief.<user>Who are you?"
    open_end = [*CONVERSATION, {"role": "assistant", "content": "I am"}]
    (output,) = chat(default_llm, open_end, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt.endswith("<assistant>I am")
    tools = [{"type": "function", "function": {"name": "clock"}}]
    template = "{{ tools[0].function.name }} {{ mood }}"
    (output,) = chat(default_llm, CONVERSATION, chat_template=template, tools=tools, chat_template_kwargs={"mood": "x"})
    assert output.prompt == "clock x"
    (output,) = chat(default_llm, CONVERSATION, chat_template_kwargs={"add_generation_prompt": False})
    assert output.prompt == "<system>Be brief.<user>Who are you?"
    with pytest.raises(ValueError, match="chat_template_kwargs must not hold 'tokenize'"):
        chat(default_llm, CONVERSATION, chat_template_kwargs={"tokenize": True})
    with pytest.raises(TypeError, match="chat_template_kwargs must be a dict of variables for the template, got 'x'"):
        chat(default_llm, CONVERSATION, chat_template_kwargs="x")


def test_many_conversations_and_parts(default_llm):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    outputs = chat(default_llm, [CONVERSATION, parts], [GREEDY, SamplingParams(temperature=0, max_tokens=2)])
    assert outputs[1].prompt == "<user>Hello<a>"
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 2]


def test_without_a_tokenizer_or_template_it_says_so(default_llm):
    with pytest.raises(ValueError, match="no tokenizer"):
        make_sum_llm(enforce_eager=True).chat(CONVERSATION)
    with pytest.raises(ValueError, match="type 'image_url'"):
        default_llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    with pytest.raises(ValueError, match="chat template"):
        chat(default_llm, CONVERSATION, chat_template="{{ raise_exception('no system') }}")


def test_prompts_in_the_forms_of_old_versions(default_llm):
    ids = default_llm.get_tokenizer().encode("Once upon a time")
    expected = default_llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0]
    for output in (
        *default_llm.generate(None, GREEDY, [ids, ids], use_tqdm=False),
        *default_llm.generate(prompt_token_ids=ids, sampling_params=GREEDY, use_tqdm=False),
        *default_llm.generate(["Once upon a time"], GREEDY, [ids], False),
    ):
        assert output.outputs[0].text == expected.outputs[0].text
        assert output.prompt_token_ids == ids
    assert output.prompt == "Once upon a time"


def test_images_are_refused_by_name(default_llm):
    with pytest.raises(ValueError, match=r"multi_modal_data has \['image'\]"):
        default_llm.generate({"prompt": "x", "multi_modal_data": {"image": object()}})
    with pytest.raises(ValueError, match="multi_modal_data must be None"):
        default_llm.generate("x", multi_modal_data={"image": object()})
    default_llm.generate({"prompt": "x", "multi_modal_data": None}, GREEDY, use_tqdm=False)
