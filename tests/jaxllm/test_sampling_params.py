"""SamplingParams: vLLM's defaults and checks."""

import dataclasses
import math

import pytest

from jaxllm import SamplingParams
from jaxllm.sampling_params import GuidedDecodingParams, RequestOutputKind, StructuredOutputsParams

# Today's vLLM's, and of 0.4 those that it no longer has. Of lists None is kept as an empty one.
DEFAULTS = dict(
    n=1, best_of=None, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, temperature=1.0, top_p=1.0,
    top_k=0, min_p=0.0, seed=None, use_beam_search=False, length_penalty=1.0, early_stopping=False, stop=[],
    stop_token_ids=[], bad_words=[], allowed_token_ids=None, logit_bias=None, logits_processors=[], ignore_eos=False,
    include_stop_str_in_output=False, max_tokens=16, min_tokens=0, logprobs=None, logprob_token_ids=None,
    prompt_logprobs=None, prompt_logprob_token_ids=None, prompt_logprob_start=None, detokenize=True,
    skip_special_tokens=True, spaces_between_special_tokens=True, truncate_prompt_tokens=None, structured_outputs=None,
    output_kind=RequestOutputKind.CUMULATIVE, extra_args=None, skip_reading_prefix_cache=None,
    thinking_token_budget=None, repetition_detection=None,
)  # fmt: skip


def test_defaults():
    assert vars(SamplingParams()) == DEFAULTS


@pytest.mark.parametrize(
    ("field", "bad", "allowed"),
    [
        ("n", 0, "at least 1"),
        ("n", 1.5, "at least 1"),
        ("temperature", -0.1, "in [0, 2]"),
        ("temperature", 2.1, "in [0, 2]"),
        ("temperature", math.nan, "in [0, 2]"),
        ("temperature", "hot", "in [0, 2]"),
        ("top_p", 0, "in (0, 1]"),
        ("top_p", 1.01, "in (0, 1]"),
        ("top_p", math.nan, "in (0, 1]"),
        ("top_k", -2, "0 or -1 (off)"),
        ("top_k", 2.0, "0 or -1 (off)"),
        ("min_p", -0.1, "in [0, 1]"),
        ("min_p", math.inf, "in [0, 1]"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", True, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("best_of", 0, "at least n=1"),
        ("presence_penalty", 2.1, "in [-2, 2]"),
        ("frequency_penalty", -2.1, "in [-2, 2]"),
        ("frequency_penalty", math.nan, "in [-2, 2]"),
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", math.inf, "above 0"),
        ("logprobs", -2, "at least 0, or -1"),
        ("prompt_logprobs", -2, "at least 0, or -1"),
        ("prompt_logprob_start", -1, "at least 0"),
        ("thinking_token_budget", -2, "at least 0, or -1"),
        ("thinking_token_budget", 1.0, "at least 0, or -1"),
        ("truncate_prompt_tokens", 0, "at least 1, or -1"),
        ("bad_words", [""], "non-empty strings"),
        ("allowed_token_ids", [-3], "at least 0"),
        ("logprob_token_ids", ["x"], "at least 0"),
        ("logits_processors", [3], "functions"),
        ("output_kind", "DELTA", "RequestOutputKind"),
        ("extra_args", 3, "dict"),
        ("ignore_eos", "yes", "True or False"),
        ("skip_reading_prefix_cache", 1, "True or False"),
        ("structured_outputs", "json", "StructuredOutputsParams or a dict"),
        ("repetition_detection", 3, "RepetitionDetectionParams or a dict"),
        ("seed", "x", "integer"),
        ("stop", [""], "non-empty strings"),
        ("stop", [3], "non-empty strings"),
        ("stop_token_ids", [-1], "at least 0"),
    ],
)
def test_bad_values_name_field_value_and_what_is_allowed(field, bad, allowed):
    with pytest.raises(ValueError) as raised:
        SamplingParams(**{field: bad})
    message = str(raised.value)
    assert message.startswith(field) and allowed in message
    assert repr(bad[0] if isinstance(bad, list) else bad) in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(temperature=0, n=2), r"n must be 1 with greedy sampling \(temperature=0\), got 2"),
        (dict(temperature=0, best_of=2), "best_of must be 1 with greedy sampling"),
        (dict(n=3, best_of=2), "best_of must be an integer of at least n=3, got 2"),
        (dict(best_of=2, output_kind=RequestOutputKind.DELTA), "best_of=2 must equal n=1 with output_kind=DELTA"),
        (dict(use_beam_search=True, temperature=0), "best_of must be above 1 with use_beam_search, got 1"),
        (dict(use_beam_search=True, best_of=2), "temperature must be 0 with use_beam_search, got 1.0"),
        (dict(use_beam_search=True, best_of=2, temperature=0, top_p=0.5), "top_p must be 1 with use_beam_search"),
        (dict(use_beam_search=True, best_of=2, temperature=0, top_k=5), "top_k must be 0 with use_beam_search"),
        (dict(use_beam_search=True, best_of=2, temperature=0, early_stopping="soon"), "or \"never\", got 'soon'"),
        (dict(early_stopping=True), "early_stopping must be False without use_beam_search, got True"),
        (
            dict(use_beam_search=True, best_of=2, temperature=0, length_penalty=-2000),
            "length_penalty must be a number from -50 to 50, got -2000",
        ),
        (
            dict(prompt_logprobs=1, skip_reading_prefix_cache=False),
            "skip_reading_prefix_cache must be None or True with prompt_logprobs, got False",
        ),
        (dict(length_penalty=0.9), "length_penalty must be 1.0 without use_beam_search, got 0.9"),
        (dict(stop="x", detokenize=False), r"stop=\['x'\] needs detokenize=True"),
        (dict(allowed_token_ids=[]), "allowed_token_ids must not be empty"),
        (dict(prompt_logprob_token_ids=[1, 1]), "prompt_logprob_token_ids must not hold a token twice"),
        (dict(logprob_token_ids=list(range(129))), "logprob_token_ids must have at most 128 tokens, got 129"),
        (dict(logprob_token_ids=[1, 2], logprobs=3), "logprobs=3 must be None or the number of logprob_token_ids"),
        (dict(logit_bias={"x": 1}), "logit_bias must have token ids for keys, got 'x'"),
        (dict(logit_bias={1: "x"}), r"logit_bias\[1\] must be a number, got 'x'"),
        (dict(logit_bias=[1]), r"logit_bias must be a dict of token ids and numbers, got \[1\]"),
        (dict(structured_outputs={}), r"exactly one of json, .*, got \[\]"),
        (dict(guided_regex="a", guided_choice=["b"]), r"exactly one of json, .*, got \['regex', 'choice'\]"),
        (dict(guided_regex="a", structured_outputs={"regex": "b"}), r"structured_outputs and guided_\* must not both"),
        (dict(guided_regex="a", guided_decoding={"regex": "b"}), r"structured_outputs and guided_\* must not both"),
        (dict(guided_decoding={"regex": "b", "backend": "outlines"}), "backend must be None, got 'outlines'"),
        (dict(structured_outputs={"json_object": False}), r"exactly one of json, .*, got \[\]"),
        (dict(repetition_detection={"max_pattern_size": 3}), "min_count must be an integer of at least 2, got 0"),
        (dict(repetition_detection={"min_pattern_size": 3}), "min_pattern_size=3 must not exceed max_pattern_size=0"),
    ],
    ids=str,
)
def test_rules_between_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_beam_search_of_vllm_0_4():
    params = SamplingParams(n=2, best_of=4, temperature=0, use_beam_search=True, early_stopping="never")
    assert (params.num_sequences, params.length_penalty) == (4, 1.0)
    assert SamplingParams(n=2, temperature=0, use_beam_search=True, length_penalty=0.5).length_penalty == 0.5


def test_guided_names_are_structured_outputs():
    assert SamplingParams(guided_json={"type": "null"}).structured_outputs == StructuredOutputsParams(
        json={"type": "null"}
    )
    assert SamplingParams(guided_json=None, guided_json_object=False).structured_outputs is None
    decoding = GuidedDecodingParams.from_optional(json={"type": "null"}, whitespace_pattern=" ")
    assert SamplingParams(guided_decoding=decoding).structured_outputs.whitespace_pattern == " "
    assert GuidedDecodingParams.from_optional(json=None, whitespace_pattern=" ") is None
    assert SamplingParams(structured_outputs={"choice": ["a"]}).structured_outputs.choice == ["a"]


def test_refused_fields_are_named_and_their_defaults_accepted():
    assert SamplingParams(watermarking=None, flat_logprobs=False, routed_experts_prompt_start=0) == SamplingParams()
    with pytest.raises(ValueError, match="routed_experts_prompt_start must be 0, got 3: the experts"):
        SamplingParams(routed_experts_prompt_start=3)


def test_min_tokens_must_not_exceed_max_tokens():
    with pytest.raises(ValueError, match="min_tokens=5 must not exceed max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_unknown_field():
    with pytest.raises(TypeError, match="SamplingParams has no field 'max_token': did you mean 'max_tokens'"):
        SamplingParams(max_token=5)


@pytest.mark.parametrize(("given", "kept"), [(0, 0), (1e-6, 0), (1e-4, 1e-2), (1e-2, 1e-2), (0.5, 0.5), (2, 2)])
def test_small_temperatures(given, kept):
    assert SamplingParams(temperature=given).temperature == kept


def test_spellings():
    assert SamplingParams(stop="x").stop == ["x"]
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(thinking_token_budget=-1).thinking_token_budget is None
    assert SamplingParams(logprobs=True, prompt_logprobs=True).prompt_logprobs == 1
    assert SamplingParams(stop_token_ids=[3, 3, 1]).stop_token_ids == [3, 1]
    assert SamplingParams(logit_bias={"3": 150, 4: -1}).logit_bias == {3: 100.0, 4: -1.0}
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_replacing_a_field_keeps_the_others():
    params = SamplingParams(guided_regex="a", logit_bias={1: 2}, stop="x", repetition_detection={}, temperature=0.5)
    assert dataclasses.replace(params, temperature=0.5) == params


def test_skipping_the_prefix_cache():
    assert not SamplingParams().skips_prefix_cache and SamplingParams(prompt_logprobs=0).skips_prefix_cache
    assert SamplingParams(prompt_logprobs=0, skip_reading_prefix_cache=True).skips_prefix_cache


def test_of():
    params = SamplingParams(n=2)
    assert SamplingParams.of(params) is params
    assert SamplingParams.of({"n": 2}) == params
    assert SamplingParams.of(None) == SamplingParams()
    with pytest.raises(TypeError, match="got 5"):
        SamplingParams.of(5)
