"""LLM and generate() on the embedded default model: text in, text out."""

import dataclasses
import signal
import threading
import time

import pytest

import jaxllm
from jaxllm import SamplingParams

PROMPT = "Once upon a time"


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 24} | fields))


def text_of(llm, prompt, params) -> str:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def test_it_writes_english(default_llm):
    output = default_llm.generate(PROMPT, greedy(max_tokens=60, ignore_eos=True), use_tqdm=False)[0]
    words = output.outputs[0].text.lower().split()
    common = {"the", "and", "a", "of", "to", "was", "in", "he", "it", "that", "his", "i", "with", "had", "as", "for"}
    assert sum(word.strip(".,;'\"") in common for word in words) / len(words) > 0.15
    assert output.prompt == PROMPT
    assert output.prompt_token_ids == default_llm.get_tokenizer().encode(PROMPT)


def test_text_and_token_ids_and_dicts_are_the_same_prompt(default_llm):
    ids = default_llm.get_tokenizer().encode(PROMPT)
    texts = {text_of(default_llm, p, greedy()) for p in (PROMPT, ids, {"prompt": PROMPT}, {"prompt_token_ids": ids})}
    assert len(texts) == 1


def test_equal_seeds_give_equal_tokens_whatever_the_batch(default_llm):
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=24)
    alone = text_of(default_llm, PROMPT, params)
    mates = [SamplingParams(temperature=0.1 * i, top_k=i, seed=i, max_tokens=10 + i) for i in range(1, 10)]
    prompts = [f"Chapter {i}. It was" for i in range(9)] + [PROMPT]
    outputs = default_llm.generate(prompts, [*mates, params], use_tqdm=False)
    assert outputs[-1].outputs[0].text == alone
    assert text_of(default_llm, PROMPT, dataclasses.replace(params, seed=12)) != alone


def test_n_answers_differ_and_each_has_its_own_seed(default_llm):
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=16)
    answers = [one.text for one in default_llm.generate(PROMPT, params, use_tqdm=False)[0].outputs]
    assert len(set(answers)) == 3
    assert answers == [one.text for one in default_llm.generate(PROMPT, params, use_tqdm=False)[0].outputs]
    second = dataclasses.replace(params, n=1, seed=4)
    assert text_of(default_llm, PROMPT, second) == answers[1]


def test_stop_string(default_llm):
    whole = text_of(default_llm, PROMPT, greedy(max_tokens=40, ignore_eos=True))
    stop = whole[20:23]
    at = whole.index(stop)
    output = default_llm.generate(PROMPT, greedy(max_tokens=40, stop=stop), use_tqdm=False)[0].outputs[0]
    assert output.text == whole[:at] and (output.finish_reason, output.stop_reason) == ("stop", stop)
    kept = greedy(max_tokens=40, stop=[stop, "no such thing"], include_stop_str_in_output=True)
    assert text_of(default_llm, PROMPT, kept) == whole[: at + len(stop)]


def test_stop_string_waits_for_min_tokens(default_llm):
    whole = text_of(default_llm, PROMPT, greedy(ignore_eos=True))
    stop = whole[1:3]
    output = default_llm.generate(PROMPT, greedy(stop=stop, min_tokens=8, ignore_eos=True), use_tqdm=False)[0].outputs[
        0
    ]
    assert len(output.token_ids) >= 8


def test_a_stream_never_shows_what_it_must_take_back(default_llm):
    whole = text_of(default_llm, PROMPT, greedy(max_tokens=40, ignore_eos=True))
    stop = whole[20:28]
    shown = ""
    for output in default_llm.stream(PROMPT, greedy(max_tokens=40, stop=stop, ignore_eos=True)):
        assert output.outputs[0].text.startswith(shown)
        shown = output.outputs[0].text
    assert shown == whole[: whole.index(stop)]


def test_end_of_turn_token_ends_a_chat_answer(default_llm):
    tokenizer = default_llm.llm_engine.tokenizer
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Where have you been?"}])
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=300)
    output = default_llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    assert output.finish_reason == "stop" and "<|" not in output.text


def test_logprobs_have_text(default_llm):
    output = default_llm.generate(PROMPT, greedy(max_tokens=4, logprobs=2), use_tqdm=False)[0].outputs[0]
    decode = default_llm.get_tokenizer().decode
    for entry in output.logprobs:
        assert all(one.decoded_token == decode([token]) for token, one in entry.items())


def test_default_params_come_from_generation_config(default_llm):
    generation = default_llm.get_default_sampling_params()
    assert generation.temperature != 1.0 or generation.top_p != 1.0


def test_ctrl_c_ends_the_call_and_leaves_the_engine_usable(default_llm):
    expected = text_of(default_llm, PROMPT, greedy())
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        default_llm.generate([PROMPT] * 60, greedy(max_tokens=450, ignore_eos=True), use_tqdm=False)
    assert time.monotonic() - start < 20
    assert not default_llm.llm_engine.has_unfinished_requests()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert text_of(default_llm, PROMPT, greedy()) == expected


def test_nothing_is_computed_if_one_prompt_is_bad(default_llm):
    before = default_llm.llm_engine.scheduler._added
    with pytest.raises(ValueError, match="empty"):
        default_llm.generate([PROMPT, ""], greedy())
    assert default_llm.llm_engine.scheduler._added == before


def test_progress_bar_counts_tokens(default_llm, capsys):
    default_llm.generate([PROMPT] * 3, greedy(max_tokens=3))
    bar = capsys.readouterr().err
    assert "Processed prompts: 100%" in bar and "3/3" in bar and "output: " in bar and "toks/s" in bar


def test_generate_keeps_its_engine(monkeypatch, caplog):
    monkeypatch.setattr(jaxllm.llm, "_kept", None)
    arguments = dict(max_model_len=512, max_num_seqs=16, max_num_batched_tokens=128, use_tqdm_on_load=False)
    first = jaxllm.generate([PROMPT, "The sea"], {"temperature": 0, "max_tokens": 5}, **arguments)
    engine = jaxllm.llm._kept[1]
    second = jaxllm.generate(PROMPT, greedy(max_tokens=5), **arguments)
    assert jaxllm.llm._kept[1] is engine
    assert second[0].outputs[0].text == first[0].outputs[0].text
    assert [record.getMessage() for record in caplog.records].count(jaxllm.loading.DEFAULT_MODEL_NOTICE) == 1
