"""SamplingParams: vLLM's defaults and checks."""

import math

import pytest

from jaxllm import SamplingParams


def test_defaults():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert (params.stop, params.stop_token_ids) == ([], [])
    assert params.skip_special_tokens and not params.ignore_eos and not params.include_stop_str_in_output


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
        ("logprobs", -2, "at least 0"),
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
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_of():
    params = SamplingParams(n=2)
    assert SamplingParams.of(params) is params
    assert SamplingParams.of({"n": 2}) == params
    assert SamplingParams.of(None) == SamplingParams()
    with pytest.raises(TypeError, match="got 5"):
        SamplingParams.of(5)
