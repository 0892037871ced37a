"""No field of SamplingParams is ignored: each one changes what comes back, or is refused by its name."""

import dataclasses

import pytest

from jaxllm import SamplingParams
from jaxllm.sampling_params import GuidedDecodingParams, RequestOutputKind, known_fields
from tests.jaxllm.conftest import make_sum_llm

PROMPT = "Once upon a time"
SAMPLED = dict(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
GREEDY = SAMPLED | dict(temperature=0)


def forbid_the_likeliest(tokens, logits):
    logits[logits.argmax()] = -1e9
    return logits


# The base, and the value that must make a difference to it.
HONOURED = {
    "n": (SAMPLED, 3),
    "best_of": (SAMPLED, 4),
    "presence_penalty": (GREEDY | dict(max_tokens=60), 2.0),
    "frequency_penalty": (GREEDY | dict(max_tokens=60), 2.0),
    "repetition_penalty": (GREEDY | dict(max_tokens=60), 1.8),
    "temperature": (SAMPLED, 0),
    "top_p": (SAMPLED, 0.05),
    "top_k": (SAMPLED, 1),
    "min_p": (SAMPLED, 0.9),
    "seed": (SAMPLED, 6),
    "stop": (GREEDY, " "),
    "stop_token_ids": (GREEDY, "the third token"),
    "bad_words": (GREEDY, "the second word"),
    "allowed_token_ids": (GREEDY, [10, 11]),
    "logit_bias": (GREEDY, {7: 100}),
    "logits_processors": (GREEDY, [forbid_the_likeliest]),
    "ignore_eos": (GREEDY | dict(logit_bias="ends at once"), False),
    "include_stop_str_in_output": (GREEDY | dict(stop=" "), True),
    "max_tokens": (GREEDY, 5),
    "min_tokens": (GREEDY | dict(ignore_eos=False, logit_bias="ends at once"), 3),
    "logprobs": (GREEDY, 2),
    "logprob_token_ids": (GREEDY | dict(logprobs=2), [3, 4]),
    "prompt_logprobs": (GREEDY, 1),
    "prompt_logprob_token_ids": (GREEDY, [3, 4]),
    "prompt_logprob_start": (GREEDY | dict(prompt_logprob_token_ids=[3]), 1),
    "detokenize": (GREEDY, False),
    "skip_special_tokens": (GREEDY | dict(logit_bias="ends at once"), False),
    "truncate_prompt_tokens": (GREEDY, 2),
    "output_kind": (GREEDY, RequestOutputKind.FINAL_ONLY),
    "skip_reading_prefix_cache": (GREEDY, True),
    "thinking_token_budget": (GREEDY, 3),
    "structured_outputs": (GREEDY, {"regex": "[0-9]+"}),
    "guided_decoding": (GREEDY, GuidedDecodingParams(regex="[0-9]+")),
    "guided_json": (GREEDY, {"type": "integer"}),
    "guided_regex": (GREEDY, "[0-9]+"),
    "guided_choice": (GREEDY, ["7", "8"]),
    "guided_grammar": (GREEDY, 'root ::= [0-9] "a"'),
    "guided_json_object": (GREEDY, True),
    "guided_whitespace_pattern": (GREEDY | dict(guided_json={"type": "object"}), "~"),
    "repetition_detection": (GREEDY | dict(logit_bias={7: 100}), {"max_pattern_size": 1, "min_count": 3}),
}

REFUSED = {
    "early_stopping": dict(early_stopping=True),
    "length_penalty": dict(length_penalty=2.0),
    "guided_decoding_backend": dict(guided_decoding_backend="x"),
    "watermarking": dict(watermarking={"key": 1}),
    "flat_logprobs": dict(flat_logprobs=True),
    "stream_interval": dict(stream_interval=4),
    "routed_experts_prompt_start": dict(routed_experts_prompt_start=2),
    "trace_decode_token_ids": dict(trace_decode_token_ids=[1]),
}

TEXTS = {"guided_regex", "guided_grammar", "guided_whitespace_pattern"}  # values that are not to be filled in

# test_sampling.py, test_detokenizer.py, test_beam_search.py
ELSEWHERE = {"extra_args", "spaces_between_special_tokens", "use_beam_search"}


@pytest.fixture(scope="module")
def llm():
    import jaxllm

    return jaxllm.LLM(
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        use_tqdm_on_load=False,
        block_size=2,
        reasoning_config={"reasoning_start_str": "Once", "reasoning_end_str": "!"},
    )


def observed(llm, fields) -> list:
    """All that a stream of this request shows."""
    outputs = list(llm.stream(PROMPT, SamplingParams(**fields)))
    return [
        repr(dataclasses.replace(output, metrics=None))
        for output in (outputs if fields.get("output_kind") else [outputs[0], outputs[-1]])
    ]


def filled_in(llm, value):
    """The values that depend on the model."""
    if value == "ends at once":
        return {llm.llm_engine.eos_token_ids[0]: 100}
    output = llm.generate(PROMPT, SamplingParams(**GREEDY), use_tqdm=False)[0].outputs[0]
    return {"the third token": [output.token_ids[2]], "the second word": output.text.split()[1:2]}[value]


@pytest.mark.parametrize("field", sorted(HONOURED))
def test_honoured(llm, field):
    base, value = HONOURED[field]
    base = base | {name: filled_in(llm, it) for name, it in base.items() if isinstance(it, str) and name != "stop"}
    value = filled_in(llm, value) if isinstance(value, str) and field not in ("stop", *TEXTS) else value
    first = observed(llm, base)  # the prompt is in the prefix cache from here on
    again = observed(llm, base)
    assert again == observed(llm, base) and first[-1].split("num_cached")[0] == again[-1].split("num_cached")[0]
    assert observed(llm, base | {field: value}) != again


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_refused(llm, field):
    with pytest.raises(ValueError, match=field):
        llm.generate(PROMPT, SamplingParams(**REFUSED[field]), use_tqdm=False)


def test_the_table_is_complete():
    assert set(HONOURED) | set(REFUSED) | ELSEWHERE == set(known_fields())


# --- what needs a tokenizer


def text_of(llm, **fields):
    return llm.generate(PROMPT, SamplingParams(**GREEDY | fields), use_tqdm=False)[0].outputs[0]


def test_bad_words_do_not_appear(llm):
    plain = text_of(llm, max_tokens=40)
    words = plain.text.split()
    words = [" ".join(words[2:4]), " ".join(words[6:9]), words[11]]
    tokens = [llm.llm_engine.tokenizer.encode(" " + word, add_special_tokens=False) for word in words]
    assert 1 < len(tokens[0]) < len(tokens[1])

    def places(sequence):
        return [i for word in tokens for i in range(len(sequence)) if sequence[i : i + len(word)] == word]

    assert len(places(plain.token_ids)) >= 3
    assert not places(text_of(llm, max_tokens=40, bad_words=words).token_ids)


def test_thinking_token_budget(llm):
    """The prompt begins with what stands for the opening marker here, so that the answer is reasoning."""
    end = llm.llm_engine.tokenizer.encode("!", add_special_tokens=False)
    prompt_tokens = len(llm.llm_engine.tokenizer.encode(PROMPT)) - len(
        llm.llm_engine.tokenizer.encode("Once", add_special_tokens=False)
    )
    budget = prompt_tokens + 4
    free, bounded = text_of(llm).token_ids, text_of(llm, thinking_token_budget=budget).token_ids
    assert bounded[:4] == free[:4] and bounded[4 : 4 + len(end)] == end
    assert text_of(llm, thinking_token_budget=budget + 100).token_ids == free


def test_without_text(llm):
    output = text_of(llm, detokenize=False, logprobs=1)
    assert output.text == "" and output.token_ids == text_of(llm).token_ids
    assert all(one.decoded_token is None for entry in output.logprobs for one in entry.values())


def test_prompt_logprobs_have_text(llm):
    output = llm.generate(PROMPT, SamplingParams(**GREEDY, prompt_logprobs=1), use_tqdm=False)[0]
    decode = llm.get_tokenizer().decode
    for token, entry in list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[1:]:
        assert token in entry and all(one.decoded_token == decode([other]) for other, one in entry.items())


def test_an_engine_without_reasoning_config():
    llm = make_sum_llm(enforce_eager=True)
    with pytest.raises(ValueError, match="thinking_token_budget=3 needs"):
        llm.generate([1], SamplingParams(thinking_token_budget=3), use_tqdm=False)
