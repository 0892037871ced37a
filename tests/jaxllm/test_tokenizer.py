"""The tokenizer as the engine uses it: encoding, the model's vocabulary, chat prompts."""

import pytest
from transformers import PreTrainedTokenizerFast

from jaxllm.loading import DEFAULT_MODEL
from jaxllm.tokenizer import Tokenizer
from tests.tokenizer_folders import byte_level_bpe

TOKENIZER = Tokenizer.load(DEFAULT_MODEL)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def plain() -> Tokenizer:
    """A tokenizer with <s> before every text, <pad> as its last token, and no chat template."""
    from tokenizers.processors import TemplateProcessing

    backend = byte_level_bpe()
    backend.add_special_tokens(["<s>", "<pad>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>"))


def test_token_text_shows_special_tokens():
    assert TOKENIZER.token_text(0) == "<|endoftext|>" and TOKENIZER.eos_token_id == 0


def test_the_bytes_of_tokens(plain):
    size = len(plain.hf)
    spelled = plain.token_bytes(size + 2)
    text = "naïve 好 🙂\n"
    assert b"".join(spelled[i] for i in plain.encode(text, add_special_tokens=False)) == text.encode()
    assert spelled[size:] == [b"", b""] and {spelled[i] for i in plain.special_ids} == {b"<s>", b"<pad>"}


def test_tokens_without_bytes_of_their_own():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="have no bytes of their own"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend)).token_bytes(3)


def test_special_tokens_are_added_or_not(plain):
    start = plain.hf.bos_token_id
    bare = plain.encode("the token", add_special_tokens=False)
    assert start not in bare and plain.encode("the token") == [start, *bare]
    assert plain.encode_all(["the token", ""]) == [[start, *bare], [start]]
    assert plain.encode_all(["the token"], add_special_tokens=False) == [bare]
    assert plain.encode_all([]) == []


def test_special_tokens_in_a_text_are_read_as_such(plain):
    assert plain.encode("<pad>", add_special_tokens=False) == [plain.hf.convert_tokens_to_ids("<pad>")]


# --- the model's vocabulary


def test_a_model_with_a_larger_vocabulary(plain):
    for size in (len(plain.hf), len(plain.hf) + 100):
        plain.fit_vocabulary(size)
        assert plain.encode("<pad>", add_special_tokens=False) == [len(plain.hf) - 1]


def test_a_model_with_a_smaller_vocabulary(plain):
    size = len(plain.hf) - 5  # three ordinary tokens and two special ones are beyond it
    with pytest.raises(
        ValueError, match=rf"tokenizer: 3 of its tokens .*\(vocab_size={size}\).*id {size}: .*tokenizer="
    ):
        plain.fit_vocabulary(size)


def test_a_special_token_beyond_the_vocabulary_is_an_error_in_a_prompt(plain):
    last = len(plain.hf) - 1
    plain.fit_vocabulary(last)
    assert plain.encode("the token")
    for encode in (plain.encode, lambda text: plain.encode_all(["fine", text])):
        with pytest.raises(ValueError, match=rf"special token '<pad>' \(id {last}\).*vocabulary of {last} tokens"):
            encode("the <pad> token")


# --- chat prompts


def test_the_tokenizer_s_own_template():
    prompt = TOKENIZER.apply_chat_template(HELLO)
    assert prompt == TOKENIZER.hf.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.apply_chat_template(HELLO, add_generation_prompt=False) in prompt


def test_a_template_of_the_user_s(tmp_path, plain):
    text = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ mark }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(text, encoding="utf-8")
    for template in (text, tmp_path / "mine.jinja", str(tmp_path / "mine.jinja")):
        for tokenizer, start in ((plain, "<s>"), (TOKENIZER, "<|endoftext|>")):
            assert tokenizer.apply_chat_template(HELLO, chat_template=template, mark="!") == f"{start}user: Hello!"


def test_one_of_several_templates(plain):
    plain.hf.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].name }}", "loud": "!"}
    assert plain.apply_chat_template(HELLO) == "Hello"
    assert plain.apply_chat_template(HELLO, chat_template="loud") == "!"
    assert plain.apply_chat_template(HELLO, tools=[{"name": "clock"}]) == "clock"


def test_a_message_to_go_on_with():
    messages = [*HELLO, {"role": "assistant", "content": "Good day,"}]
    prompt = TOKENIZER.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith("Good day,")
    with pytest.raises(ValueError, match="add_generation_prompt"):
        TOKENIZER.apply_chat_template(messages, continue_final_message=True)


def test_no_template(plain):
    with pytest.raises(ValueError, match=r"no chat template.*Pass chat_template=: Jinja text, a file.*glm-4.*vicuna"):
        plain.apply_chat_template(HELLO)
    with pytest.raises(ValueError, match=r"chat_template='missing.jinja' is neither .* \(No such file.*nor one of glm"):
        plain.apply_chat_template(HELLO, chat_template="missing.jinja")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no such role') }}", "{{ messages[0].content + 1 }}", "{% if"]
)
def test_a_template_that_fails(plain, template):
    with pytest.raises(ValueError, match="messages do not fit the chat template"):
        plain.apply_chat_template(HELLO, chat_template=template)
