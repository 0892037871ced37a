"""The forms in which prompts and messages come."""

import pytest

from jaxllm.prompts import as_conversations, as_prompts, refuse, with_token_ids

HELLO = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], "b", {"prompt": "c"}], [[1, 2], "b", {"prompt": "c"}]),
        ({"prompt_token_ids": [1]}, [{"prompt_token_ids": [1]}]),
        ([], []),
    ],
)
def test_one_prompt_or_many(given, prompts):
    assert as_prompts(given) == prompts


def test_token_ids_beside_texts():
    assert with_token_ids(None, [1, 2]) == [{"prompt": None, "prompt_token_ids": [1, 2]}]
    assert with_token_ids(["a", "b"], [[1], [2]]) == [
        {"prompt": "a", "prompt_token_ids": [1]},
        {"prompt": "b", "prompt_token_ids": [2]},
    ]
    with pytest.raises(ValueError, match="1 entries for 2 prompts"):
        with_token_ids(["a", "b"], [[1]])
    with pytest.raises(ValueError, match="must be given"):
        with_token_ids(None, None)
    with pytest.raises(TypeError, match="use_tqdm must be given by name"):
        with_token_ids("a", False)
    with pytest.raises(TypeError, match="beside prompt_token_ids must be text"):
        with_token_ids([{"prompt": "a"}], [[1]])


def test_conversations_have_text():
    parts = {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]}
    assert as_conversations([HELLO]) == [[HELLO]]
    assert as_conversations([[HELLO], [HELLO, parts]]) == [
        [HELLO],
        [HELLO, {"role": "user", "content": "Hello\nthere"}],
    ]


def test_arguments_of_tool_calls_are_dicts_for_the_template():
    """OpenAI's messages have them as JSON; templates write what they get as JSON."""

    def message(*arguments):
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": one}} for one in arguments]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    for given, expected in (('{"a": [1]}', {"a": [1]}), ("", {}), ({"b": 2}, {"b": 2})):
        assert as_conversations([message(given)]) == [[message(expected)]]
    assert as_conversations([message()]) == [[{"role": "assistant", "content": None}]]
    with pytest.raises(ValueError, match=r"tool_calls\[...\].function.arguments must be JSON, got '\{'"):
        as_conversations([message("{")])


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ("Hello", TypeError, "messages must be"),
        ([], TypeError, "messages must be"),
        ([[]], TypeError, "non-empty"),
        ([{"content": "x"}], TypeError, '"role"'),
        ([{"role": "user", "content": 5}], TypeError, "content must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], ValueError, "'image_url'"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, error, match):
    with pytest.raises(error, match=match):
        as_conversations(messages)


def test_refused_arguments_are_named():
    refuse(lora_request=None, multi_modal_data=None)
    with pytest.raises(ValueError, match="lora_request must be None, got 'adapter'"):
        refuse(lora_request="adapter")
