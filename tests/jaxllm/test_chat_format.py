"""The published chat formats, each against the literal text, and which model gets which."""

import pytest
from transformers import PreTrainedTokenizerFast

from jaxllm.chat_format import CHAT_FORMATS
from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer_formats.sentencepiece_file import CHATGLM_SPECIAL
from jaxllm.tokenizer_formats.tiktoken_file import GLM4_SPECIAL, QWEN_SPECIAL
from tests.tokenizer_folders import byte_level_bpe

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Who are you?"},
]
TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "时间", "parameters": {"type": "object"}},
}
CLOCK_JSON = (
    '{\n    "name": "clock",\n    "description": "时间",\n    "parameters": {\n        "type": "object"\n    }\n}'
)

# name: (config.json, name of the model, special tokens)
MODELS = {
    "glm-4": ({"model_type": "chatglm"}, "glm-4-9b-chat", GLM4_SPECIAL),
    "chatglm3": ({"model_type": "chatglm"}, "chatglm3-6b", CHATGLM_SPECIAL),
    "qwen": ({"model_type": "qwen"}, "Qwen-7B-Chat", QWEN_SPECIAL),
    "yi": ({"model_type": "llama"}, "Yi-6B-Chat", ("<|im_start|>", "<|im_end|>")),
    "baichuan2": ({"model_type": "baichuan", "vocab_size": 125696}, "mine", ()),
    "chinese-alpaca-2": ({"model_type": "llama"}, "chinese-alpaca-2-7b", ()),
    "llama-2": ({"model_type": "llama"}, "Llama-2-13b-chat-hf", ()),
    "vicuna": ({"model_type": "llama"}, "vicuna-7b-v1.5", ()),
}

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# name: the prompt for TURNS, and for SYSTEM before them
EXPECTED = {
    "glm-4": (
        "[gMASK]<sop><|user|>\nHi<|assistant|>\nHello!<|user|>\nWho are you?<|assistant|>",
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\nHello!<|user|>\nWho are you?<|assistant|>",
    ),
    "chatglm3": (
        "[gMASK]sop<|user|>\n Hi<|assistant|>\n Hello!<|user|>\n Who are you?<|assistant|>",
        "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>\n Hello!<|user|>\n Who are you?<|assistant|>",
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "yi": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
        "<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "baichuan2": (
        "<reserved_106>Hi<reserved_107>Hello!<reserved_106>Who are you?<reserved_107>",
        "Be brief.<reserved_106>Hi<reserved_107>Hello!<reserved_106>Who are you?<reserved_107>",
    ),
    "chinese-alpaca-2": (
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\nHi [/INST] Hello! </s>"
        "<s>[INST] Who are you? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Who are you? [/INST]",
    ),
    "llama-2": (
        "<s>[INST] Hi [/INST] Hello! </s><s>[INST] Who are you? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Who are you? [/INST]",
    ),
    "vicuna": (
        f"<s>{VICUNA} USER: Hi ASSISTANT: Hello!</s>USER: Who are you? ASSISTANT:",
        "<s>Be brief. USER: Hi ASSISTANT: Hello!</s>USER: Who are you? ASSISTANT:",
    ),
}


def tokenizer_of(config, name, special=()) -> Tokenizer:
    backend = byte_level_bpe()
    backend.add_special_tokens(["<s>", "</s>", *special])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return Tokenizer(hf, config, name)


def test_every_format_is_tested():
    assert MODELS.keys() == EXPECTED.keys() == CHAT_FORMATS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_prompts(name):
    tokenizer = tokenizer_of(*MODELS[name])
    plain, with_system = EXPECTED[name]
    assert tokenizer.apply_chat_template(TURNS) == plain
    assert tokenizer.apply_chat_template([SYSTEM, *TURNS]) == with_system
    other = tokenizer_of({}, "mine")  # asked for by name
    assert other.apply_chat_template(TURNS, chat_template=name) == plain


@pytest.mark.parametrize("name", MODELS)
def test_without_a_generation_prompt_and_going_on(name):
    tokenizer = tokenizer_of(*MODELS[name])
    finished = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=False)
    assert tokenizer.apply_chat_template(TURNS).startswith(finished)  # what is cached of a conversation stays good
    going_on = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=False, continue_final_message=True)
    assert going_on.endswith("Hello!") and finished.startswith(going_on)


@pytest.mark.parametrize("name", ["llama-2", "vicuna", "baichuan2"])
def test_a_role_that_the_format_lacks(name):
    for messages in ([*TURNS, SYSTEM], [{"role": "tool", "content": "12:00"}]):
        with pytest.raises(ValueError, match=r"has the roles user and assistant, and system for the first message"):
            tokenizer_of(*MODELS[name]).apply_chat_template(messages)


def test_tools_of_glm_4():
    tokenizer = tokenizer_of(*MODELS["glm-4"])
    prompt = tokenizer.apply_chat_template(TURNS[:1], tools=[TOOL])
    assert prompt == (
        "[gMASK]<sop><|system|>\n你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具\n\n## clock\n\n" + CLOCK_JSON + "\n"
        "在调用上述函数时，请使用 Json 格式表示调用的参数。<|user|>\nHi<|assistant|>"
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {"city": "北京"}}}]}
    answer = {"role": "tool", "content": "12:00"}
    prompt = tokenizer.apply_chat_template([*TURNS[:1], call, answer])
    assert prompt == ('[gMASK]<sop><|user|>\nHi<|assistant|>clock\n{"city": "北京"}<|observation|>\n12:00<|assistant|>')


def test_tools_of_chatglm3():
    prompt = tokenizer_of(*MODELS["chatglm3"]).apply_chat_template(TURNS[:1], tools=[TOOL["function"]])
    described = "\n".join("    " + line for line in CLOCK_JSON.split("\n"))
    assert prompt == (
        "[gMASK]sop<|system|>\n Answer the following questions as best as you can. You have access to the following "
        f"tools:\n[\n{described}\n]<|user|>\n Hi<|assistant|>"
    )


def test_tools_where_the_format_has_none():
    for name in ("qwen", "yi", "baichuan2", "llama-2", "chinese-alpaca-2", "vicuna"):
        with pytest.raises(ValueError, match="tools: the model's chat format has no place for them"):
            tokenizer_of(*MODELS[name]).apply_chat_template(TURNS, tools=[TOOL])


@pytest.mark.parametrize(
    ("config", "name", "special"),
    [
        ({"model_type": "chatglm"}, "chatglm2-6b", CHATGLM_SPECIAL),  # another format
        ({"model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b"}, "mine", CHATGLM_SPECIAL),
        ({"model_type": "llama"}, "Llama-2-13b-hf", ()),  # no chat model
        ({"model_type": "llama"}, "Yi-6B", ("<|im_start|>",)),
        ({"model_type": "baichuan", "vocab_size": 64000}, "Baichuan-13B-Chat", ()),  # other reserved tokens
        ({"model_type": "gpt2"}, "gpt2", ()),
        ({}, "", ()),
    ],
)
def test_models_of_no_known_format(config, name, special):
    tokenizer = tokenizer_of(config, name, special)
    assert tokenizer.end_of_turn_ids == []
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(TURNS)


def test_the_name_may_be_in_the_config():
    for name in ("lmsys/vicuna-7b-v1.3", "/models/Vicuna-7B"):
        tokenizer = tokenizer_of({"model_type": "llama", "_name_or_path": name}, "mine")
        assert tokenizer.apply_chat_template(TURNS) == EXPECTED["vicuna"][0]


def test_the_tokenizer_s_own_template_goes_first():
    tokenizer = tokenizer_of(*MODELS["vicuna"])
    tokenizer.hf.chat_template = "{{ messages[0].content }}"
    assert tokenizer.apply_chat_template(TURNS) == "Hi"
    assert tokenizer.apply_chat_template(TURNS, chat_template="vicuna") == EXPECTED["vicuna"][0]


def test_what_ends_an_answer():
    for name, ends in {"glm-4": ["<|user|>", "<|observation|>"], "qwen": ["<|im_end|>"], "llama-2": []}.items():
        tokenizer = tokenizer_of(*MODELS[name])
        assert [tokenizer.token_text(i) for i in tokenizer.end_of_turn_ids] == ends
