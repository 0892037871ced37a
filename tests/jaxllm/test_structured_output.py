"""Structured output: what an answer that ended by itself is, whatever the model would rather have said."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

import jaxllm
from jaxllm import SamplingParams
from jaxllm.sampling_params import GuidedDecodingParams, StructuredOutputsParams
from jaxllm.tokenizer import Tokenizer
from tests.jaxllm.random_schemas import SchemaGenerator
from tests.tokenizer_folders import sentencepiece_folder, sentencepiece_model

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from jaxllm import structured_output  # noqa: E402
from jaxllm.structured_output import GrammarCompiler, closed_schema  # noqa: E402

PROMPT = "Once upon a time"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def answers(llm, prompts=PROMPT, **fields):
    params = SamplingParams(**dict(max_tokens=100, seed=3) | fields)
    return [one for output in llm.generate(prompts, params, use_tqdm=False) for one in output.outputs]


def validate(text: str, schema) -> None:
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))


# --- random schemas


def schema_params(i: int, schema) -> SamplingParams:
    whitespace = [dict(disable_any_whitespace=True), dict(whitespace_pattern="[ \n]?")][i % 3 == 0]
    # A tiny model falls into endless digits; the penalty gets it out of them.
    drawn = dict(temperature=0) if i % 2 else dict(temperature=1.0, seed=i)
    return SamplingParams(
        **drawn, max_tokens=380, frequency_penalty=1.0, structured_outputs=dict(json=schema, **whitespace)
    )


def check_random_schemas(llm, schemas) -> None:
    """In one batch with free requests, which must say what they say alone."""
    free = SamplingParams(temperature=0, max_tokens=30)
    params = [schema_params(i, schema) for i, schema in enumerate(schemas)]
    mixed = [
        one for i, constrained in enumerate(params) for one in ([constrained, free] if i % 4 == 0 else [constrained])
    ]
    outputs = [output.outputs[0] for output in llm.generate([PROMPT] * len(mixed), mixed, use_tqdm=False)]
    alone = llm.generate(PROMPT, free, use_tqdm=False)[0].outputs[0]
    assert {output.text for output, one in zip(outputs, mixed, strict=True) if one is free} == {alone.text}
    constrained = [output for output, one in zip(outputs, mixed, strict=True) if one is not free]
    for output, schema in zip(constrained, schemas, strict=True):
        assert output.finish_reason == "stop", (schema, output.text)
        validate(output.text, schema)


def test_answers_to_20_random_schemas_are_valid(default_llm):
    check_random_schemas(default_llm, [SchemaGenerator(seed).schema() for seed in range(20)])


@pytest.mark.slow
def test_answers_to_200_random_schemas_are_valid(default_llm):
    check_random_schemas(default_llm, [SchemaGenerator(seed).schema() for seed in range(100, 300)])


# --- the other kinds


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "regex",
    [r"\d{3}-\d{4}", "(red|grün|日本)( [a-z]{1,4}){2}", r"^\w{2,8}@[a-z]{1,9}\.(com|org)$", 'a/b|"c"\n', "", "😀{2}"],
)
def test_regex(default_llm, regex, temperature):
    (answer,) = answers(default_llm, temperature=temperature, structured_outputs=dict(regex=regex))
    assert answer.finish_reason == "stop" and re.fullmatch(regex, answer.text)


def test_choice(default_llm):
    choices = ["yes", "yesterday", "no way", 'é "😀"\n', "\\d"]
    got = answers(default_llm, n=60, temperature=2.0, structured_outputs=dict(choice=choices))
    assert {answer.finish_reason for answer in got} == {"stop"}
    assert len({answer.text for answer in got}) > 2 and {answer.text for answer in got} <= set(choices)
    for choice in choices:
        (answer,) = answers(default_llm, structured_outputs=dict(choice=[choice]))
        assert (answer.text, answer.finish_reason) == (choice, "stop")


ODD_CHOICES = ["", "\x7f", "a\x7fb", "\0", "a.c", "(?i)a", "[^a]$", "a|b", "a&~b", "# -<%/>", "\r\n\t\v", "'\"", "é😀"]


def test_any_text_can_be_a_choice(compiler):
    vocabulary = compiler._vocabulary
    matcher = compiler.matcher(StructuredOutputsParams(choice=ODD_CHOICES))
    for choice in ODD_CHOICES:
        for one in (matcher, compiler.matcher(StructuredOutputsParams(choice=[choice]))):
            copy = one.deep_copy()
            assert copy.consume_tokens(vocabulary.tokenize_str(choice)) and copy.is_accepting(), repr(choice)
    for text in ("abc", "A", "b", "[", "a", "a\n"):
        copy = matcher.deep_copy()
        assert not (copy.consume_tokens(vocabulary.tokenize_str(text)) and copy.is_accepting()), text


def walk(constraint, tokens) -> set[int]:
    """What may follow the tokens, each of which must be allowed."""
    for count, token in enumerate(tokens):
        assert token in bits(constraint.mask(tokens[:count]))
    return bits(constraint.mask(tokens))


def test_5000_choices(default_llm, compiler):
    choices = [f"the {i % 7} item (number {i})*" for i in range(4999)] + ["the"]
    got = answers(default_llm, n=8, temperature=2.0, structured_outputs=dict(choice=choices))
    assert {answer.finish_reason for answer in got} == {"stop"} and {answer.text for answer in got} <= set(choices)
    tokenizer, ends = default_llm.llm_engine.tokenizer, set(default_llm.llm_engine.eos_token_ids)
    for choice in [*choices[::500], "the"]:
        tokens = tokenizer.encode(choice, add_special_tokens=False)
        following = walk(compiler.constraint(StructuredOutputsParams(choice=choices), 0, ends), tokens)
        assert ends <= following if choice == "the" else following == ends


@pytest.mark.slow
def test_answers_to_long_choices_do_not_use_up_the_parser(compiler):
    random = np.random.default_rng(0)
    choices = ["".join(letters) for letters in random.choice(list("abcdefgh "), (2500, 150))]
    matcher = compiler.matcher(StructuredOutputsParams(choice=choices))
    for choice in choices:
        copy = matcher.deep_copy()
        for token in compiler._vocabulary.tokenize_str(choice):
            copy.compute_bitmask()
            assert copy.consume_token(token), copy.get_error()


def test_a_thousand_optional_properties(default_llm, compiler):
    schema = {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(1000)},
        "additionalProperties": False,
    }
    text, ends = '{"p3": 1, "p998": -7}', set(default_llm.llm_engine.eos_token_ids)
    tokens = default_llm.llm_engine.tokenizer.encode(text, add_special_tokens=False)
    assert walk(compiler.constraint(StructuredOutputsParams(json=schema), 0, ends), tokens) == ends


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "SELECT " column (", " column)? " FROM " table\ncolumn ::= "a" | "b" [0-9]\ntable ::= "t" | "ü"',
        '?start: "SELECT " column (", " column)? " FROM " table\ncolumn: "a" | "b" /[0-9]/\ntable: "t" | "ü"',
    ],
    ids=["ebnf", "lark"],
)
def test_grammar(default_llm, grammar):
    for answer in answers(default_llm, n=8, structured_outputs=dict(grammar=grammar)):
        assert answer.finish_reason == "stop"
        assert re.fullmatch("SELECT (a|b[0-9])(, (a|b[0-9]))? FROM (t|ü)", answer.text)


def test_a_recursive_grammar(default_llm):
    grammar = 'root ::= tree\ntree ::= [xy] | "(" tree "+" tree ")"'
    bias = {default_llm.get_tokenizer().encode("(")[0]: 2}
    fields = dict(n=16, max_tokens=150, temperature=2.0, logit_bias=bias)
    got = answers(default_llm, **fields, structured_outputs=dict(grammar=grammar))
    stopped = [answer.text for answer in got if answer.finish_reason == "stop"]
    assert any("(" in text for text in stopped)
    for text in stopped:
        assert not set(text) - set("xy()+") and eval(text, {"x": 1, "y": 100}) == text.count("x") + 100 * text.count(
            "y"
        )


def test_json_object(default_llm):
    bias = {default_llm.get_tokenizer().encode("}")[0]: 12}  # or it goes on and on
    got = answers(default_llm, n=16, logit_bias=bias, guided_json_object=True)
    stopped = [answer.text for answer in got if answer.finish_reason == "stop"]
    assert len(stopped) > 2 and all(isinstance(json.loads(text), dict) for text in stopped)


def test_structural_tag(default_llm):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["x"],
    }
    tag = {"triggers": [" the"], "structures": [{"begin": " the man ", "schema": schema, "end": "!"}]}
    options = dict(disable_any_whitespace=True, disable_additional_properties=True, structural_tag=json.dumps(tag))
    got = answers(default_llm, n=8, temperature=0.7, structured_outputs=options)
    calls = [rest for answer in got for rest in answer.text.split(" the")[1:] if "!" in rest]
    assert calls and all(re.match(r' man \{"x":\d\d?\}!', call) for call in calls)


def test_older_names(default_llm):
    (new,) = answers(default_llm, structured_outputs=dict(regex="[a-z]{9}"))
    (older,) = answers(default_llm, guided_decoding=GuidedDecodingParams(regex="[a-z]{9}"))
    (oldest,) = answers(default_llm, guided_regex="[a-z]{9}")
    assert re.fullmatch("[a-z]{9}", new.text) and new.text == older.text == oldest.text


# --- options of JSON


def test_whitespace(default_llm):
    def texts(**options):
        got = answers(default_llm, n=8, structured_outputs=dict(json=PERSON, **options))
        return [answer.text for answer in got if answer.finish_reason == "stop"]

    assert all(re.match(r'\{"name":".*","age":\d+\}$', text) for text in texts(disable_any_whitespace=True))
    patterned = texts(whitespace_pattern=" ?")
    assert any(re.match(r'\{ ?"name"', text) for text in patterned)
    for text in patterned:
        validate(text, PERSON)
        assert "\n" not in text


def test_a_pydantic_model_is_its_schema():
    class Model:
        @classmethod
        def model_json_schema(cls):
            return PERSON

    assert StructuredOutputsParams(json=Model).json == PERSON


def test_closed_schema():
    inner = {"properties": {"additionalProperties": {"properties": {}}}}
    closed = {"properties": {"additionalProperties": {"properties": {}, "additionalProperties": False}}}
    closed["additionalProperties"] = False
    assert closed_schema(inner) == closed
    kept = {"type": "object", "const": {"properties": {}}, "items": [True, {"enum": [{"properties": 1}]}]}
    assert closed_schema(kept) == kept
    said = {"properties": {"a": {}}, "additionalProperties": True}
    assert closed_schema(said) == said
    assert closed_schema({"anyOf": [inner], "$defs": {"x": inner}}) == {"anyOf": [closed], "$defs": {"x": closed}}


# --- how an answer ends


@pytest.fixture
def compiler(default_llm):
    engine = default_llm.llm_engine
    return GrammarCompiler(engine.tokenizer, engine.runner.network.config.vocab_size, engine.eos_token_ids)


def bits(mask) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("pattern", ["a{2,4}", "(a|ab)?c*", "x*"])
def test_the_end_is_allowed_exactly_where_the_text_is_complete(compiler, default_llm, pattern):
    tokenizer, ends = default_llm.llm_engine.tokenizer, set(default_llm.llm_engine.eos_token_ids)
    characters = [tokenizer.encode(character, add_special_tokens=False)[0] for character in "abcx"]
    stack, seen = [[]], 0
    while stack:
        tokens = stack.pop()
        constraint = compiler.constraint(StructuredOutputsParams(regex=pattern), 0, ends)
        allowed = bits(constraint.mask(tokens))
        complete = re.fullmatch(pattern, "".join("abcx"[characters.index(token)] for token in tokens))
        assert allowed & ends == (ends if complete else set())
        assert not (allowed - ends) & tokenizer.special_ids
        seen += 1
        stack += [[*tokens, token] for token in characters if token in allowed and len(tokens) < 6]
    assert seen > 3


def test_a_mask_may_be_asked_for_twice_and_tokens_come_several_at_once(compiler, default_llm):
    tokens = default_llm.llm_engine.tokenizer.encode('{"name":"abc","age":7}', add_special_tokens=False)
    one, other = (compiler.constraint(StructuredOutputsParams(json=PERSON), 0, [0]) for _ in range(2))
    for count in range(len(tokens) + 1):
        mask = one.mask(tokens[:count])
        assert (mask == one.mask(tokens[:count])).all()
        if count % 3 == 0 or count == len(tokens):
            assert (mask == other.mask(tokens[:count])).all()
    assert bits(mask) == set(default_llm.llm_engine.eos_token_ids)
    with pytest.raises(ValueError, match="structured_outputs: token"):
        compiler.constraint(StructuredOutputsParams(regex="a"), 0, [0]).mask(tokens)


def test_min_tokens(default_llm):
    (answer,) = answers(default_llm, min_tokens=8, structured_outputs=dict(regex="(ab ){1,9}"))
    assert answer.finish_reason == "stop" and len(answer.token_ids) > 8 and re.fullmatch("(ab ){1,9}", answer.text)
    (answer,) = answers(default_llm, min_tokens=8, structured_outputs=dict(regex="ab"))
    assert (answer.text, answer.finish_reason) == ("ab", "stop")


def test_ignore_eos_leaves_the_text_as_it_is(default_llm):
    (answer,) = answers(default_llm, ignore_eos=True, max_tokens=12, structured_outputs=dict(regex="ab"))
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("ab", "length", 12)


def test_stops_of_the_request(default_llm):
    (answer,) = answers(default_llm, stop="bbb", structured_outputs=dict(regex="ab{10}c"))
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("a", "stop", "bbb")
    tokenizer = default_llm.llm_engine.tokenizer
    role = next(i for i in sorted(tokenizer.special_ids) if i not in default_llm.llm_engine.eos_token_ids)
    bias = {role: 100}
    fields = dict(temperature=0, stop_token_ids=[role], logit_bias=bias, structured_outputs=dict(regex="ab"))
    (answer,) = answers(default_llm, **fields)
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("ab", "stop", role)


# --- tokenizers of other kinds


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """Spaces before words, bytes for rare characters: as Llama 2 has it."""
    return Tokenizer.load(sentencepiece_folder(tmp_path_factory.mktemp("sp"), sentencepiece_model()))


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        (dict(choice=["the scheduler", "the token 🙂", "</s>"]), "the scheduler|the token 🙂|</s>"),
        (dict(regex=" ?好{2}ß?"), " ?好{2}ß?"),
        (dict(json={"const": "hands out </s> <s>"}), '"hands out </s> <s>"'),
        (dict(json=PERSON, disable_any_whitespace=True), r'\{"name":"(?s:.)*","age":\d\d?\}'),
    ],
    ids=str,
)
def test_random_walks_in_a_sentencepiece_vocabulary(sentencepiece, params, pattern):
    size, end = len(sentencepiece.hf) + 7, sentencepiece.eos_token_id  # a model's vocabulary may be padded
    compiler, spelled = GrammarCompiler(sentencepiece, size, [end]), sentencepiece.token_bytes(size)
    random = np.random.default_rng(0)
    for _ in range(20):
        constraint, tokens = compiler.constraint(StructuredOutputsParams(**params), 0, [end]), []
        while (token := int(random.choice(sorted(bits(constraint.mask(tokens)))))) != end:
            assert spelled[token] and token not in sentencepiece.special_ids
            tokens.append(token)
        assert re.fullmatch(pattern, b"".join(spelled[token] for token in tokens).decode())


def test_forced_text_has_the_tokenizer_s_own_tokens(sentencepiece, default_llm):
    for tokenizer in (sentencepiece, default_llm.llm_engine.tokenizer):
        compiler = GrammarCompiler(tokenizer, len(tokenizer.hf), [tokenizer.eos_token_id])
        constraint, tokens = compiler.constraint(StructuredOutputsParams(choice=[" the tokens come back"]), 0, []), []
        while (following := bits(constraint.mask(tokens))) != {tokenizer.eos_token_id}:
            assert len(following) == 1
            tokens += following
        own = " the tokens come back" if tokenizer is not sentencepiece else "the tokens come back"
        assert tokens == tokenizer.encode(own, add_special_tokens=False)


def test_the_name_of_a_special_token_beyond_the_vocabulary_is_text(tmp_path):
    tokenizer = Tokenizer.load(sentencepiece_folder(tmp_path / "sp", sentencepiece_model()))
    tokenizer.hf.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer = Tokenizer(tokenizer.hf)
    tokenizer.fit_vocabulary(size := len(tokenizer.hf) - 1)
    constraint = GrammarCompiler(tokenizer, size, [2]).constraint(StructuredOutputsParams(choice=["an <image>"]), 0, [])
    tokens, spelled = [], tokenizer.token_bytes(size)
    while (following := bits(constraint.mask(tokens))) != {2}:
        tokens.append(max(following, key=lambda token: len(spelled[token])))
    assert b"".join(spelled[token] for token in tokens) == b"an <image>"


def test_a_vocabulary_that_cannot_spell_the_text(tmp_path):
    model = sentencepiece_model(byte_fallback=False, vocab_size=380)
    tokenizer = Tokenizer.load(sentencepiece_folder(tmp_path / "sp", model))
    with pytest.raises(ValueError, match=r"choice=.*no text meets it"):
        GrammarCompiler(tokenizer, len(tokenizer.hf), [2]).check(StructuredOutputsParams(choice=["🇩🇪"]))


# --- batches


def test_n_answers_have_states_of_their_own(default_llm):
    many = answers(default_llm, n=4, structured_outputs=dict(regex="[a-z]{3,12}!"))
    assert len({answer.text for answer in many}) == 4
    assert all(re.fullmatch("[a-z]{3,12}!", answer.text) and answer.finish_reason == "stop" for answer in many)
    for i in range(4):
        (one,) = answers(default_llm, seed=3 + i, structured_outputs=dict(regex="[a-z]{3,12}!"))
        assert one.text == many[i].text


@pytest.mark.slow
def test_preemption_and_the_prefix_cache_change_nothing(default_llm):
    tight = jaxllm.LLM(
        max_model_len=128,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        block_size=4,
        num_gpu_blocks_override=40,
        enforce_eager=True,
        use_tqdm_on_load=False,
    )
    requests, add = [], tight.llm_engine.scheduler.add
    tight.llm_engine.scheduler.add = lambda request, now: (requests.append(request), add(request, now))
    params = [
        SamplingParams(max_tokens=90, seed=i, structured_outputs=dict(regex="([a-z]{2,5}, ){12,14}[0-9]{3}"))
        for i in range(6)
    ]
    got = [output.outputs[0] for output in tight.generate([PROMPT] * 6, params, use_tqdm=False)]
    want = [output.outputs[0] for output in default_llm.generate([PROMPT] * 6, params, use_tqdm=False)]
    assert sum(request.preemptions for request in requests) > 0
    assert [one.text for one in got] == [one.text for one in want]
    assert all(re.fullmatch("([a-z]{2,5}, ){12,14}[0-9]{3}", one.text) for one in got if one.finish_reason == "stop")


def test_a_request_that_nothing_is_left_for_ends_alone(default_llm):
    tokens = [default_llm.get_tokenizer().encode(text)[0] for text in "ab"]
    params = [
        SamplingParams(allowed_token_ids=tokens, structured_outputs=dict(regex="[ab]{5}c")),
        SamplingParams(allowed_token_ids=[*tokens, *default_llm.llm_engine.eos_token_ids], guided_regex="[abc]{2}"),
        SamplingParams(bad_words=["b"], guided_regex="[bx]{3}[b]", temperature=0),
        SamplingParams(guided_regex="abc"),
    ]
    outputs = [output.outputs[0] for output in default_llm.generate([PROMPT] * 4, params, use_tqdm=False)]
    assert [one.finish_reason for one in outputs] == ["error", "stop", "error", "stop"]
    assert outputs[1].text in ("ab", "ba", "aa", "bb") and outputs[3].text == "abc"


# --- beam search


def beams(llm, width=4, **fields):
    fields = dict(use_beam_search=True, n=width, temperature=0, max_tokens=40) | fields
    return llm.generate(PROMPT, SamplingParams(**fields), use_tqdm=False)[0].outputs


def test_beams_are_the_likeliest_texts_of_a_small_grammar(default_llm):
    """All texts of a grammar, scored by hand from the model's own log probabilities."""
    a, b = (default_llm.get_tokenizer().encode(letter)[0] for letter in "ab")
    end, ids = default_llm.llm_engine.eos_token_ids[0], default_llm.llm_engine.tokenizer.encode(PROMPT)

    def following(tokens, allowed):
        params = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=allowed)
        entry = default_llm.generate([ids + tokens], params, use_tqdm=False)[0].outputs[0].logprobs[0]
        total = np.logaddexp.reduce([entry[token].logprob for token in allowed])
        return {token: entry[token].logprob - total for token in allowed}

    scores = {}
    for one, first in following([], [a, b]).items():  # (a|b)(a|b)?, and then the end
        for two, second in following([one], [a, b, end]).items():
            scores[(one, two) if two == end else (one, two, end)] = first + second
    expected = sorted(scores.items(), key=lambda item: item[1] / len(item[0]), reverse=True)
    got = beams(default_llm, 6, allowed_token_ids=[a, b, end], structured_outputs=dict(regex="(a|b)(a|b)?"))
    assert [tuple(one.token_ids) for one in got] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([one.cumulative_logprob for one in got], [value for _, value in expected], atol=1e-4)
    assert {one.finish_reason for one in got} == {"stop"}


def test_every_beam_meets_the_structure(default_llm):
    options = dict(json=PERSON, disable_any_whitespace=True)
    free = beams(default_llm)
    got = beams(default_llm, structured_outputs=options, prompt_logprobs=1)
    for one in got:
        assert one.finish_reason == "stop"
        validate(one.text, PERSON)
    assert len({one.text for one in got}) == 4
    assert beams(default_llm) == free  # nothing is left behind
    params = jaxllm.BeamSearchParams(beam_width=4, max_tokens=40, structured_outputs=options)
    sequences = default_llm.beam_search(PROMPT, params)[0].sequences
    assert {one.text.removeprefix(PROMPT) for one in sequences} & {one.text for one in got}


def test_fewer_texts_than_beams_and_beams_that_nothing_may_follow(default_llm):
    got = beams(default_llm, structured_outputs=dict(choice=["yes", "no"]))  # in whatever tokens
    assert {one.text for one in got} == {"yes", "no"} and len({tuple(one.token_ids) for one in got}) == len(got)
    tokens = [default_llm.get_tokenizer().encode(letter)[0] for letter in "ab"]
    tokens += default_llm.llm_engine.eos_token_ids[:1]
    fields = dict(allowed_token_ids=tokens, structured_outputs=dict(regex="a(b|a(c|bb))"))
    assert sorted(one.text for one in beams(default_llm, **fields)) == ["aabb", "ab"]
    stuck = beams(default_llm, allowed_token_ids=tokens, structured_outputs=dict(regex="aac"))
    assert {one.finish_reason for one in stuck} == {"error"}


# --- behind reasoning


@pytest.fixture
def reasoning_llm(default_llm, monkeypatch):
    """For which reasoning stands between "Once" and "!"."""
    specs, markers = default_llm.llm_engine._specs, {"reasoning_start_str": "Once", "reasoning_end_str": "!"}
    monkeypatch.setattr(specs, "_config", dataclasses.replace(default_llm.llm_engine.config, reasoning_config=markers))
    return default_llm


@pytest.mark.parametrize("min_tokens", [0, 14])
def test_the_structure_begins_behind_the_reasoning(reasoning_llm, min_tokens):
    encode = reasoning_llm.llm_engine.tokenizer.encode
    in_prompt = len(encode(PROMPT)) - len(encode("Once"))
    bias = {reasoning_llm.llm_engine.eos_token_ids[0]: 100}  # wherever it may, the answer ends
    fields = dict(temperature=0, min_tokens=min_tokens, structured_outputs=dict(regex="a{3}b*"))
    (free,) = answers(reasoning_llm, temperature=0, max_tokens=8, ignore_eos=True)
    (answer,) = answers(reasoning_llm, thinking_token_budget=in_prompt + 8, logit_bias=bias, **fields)
    assert re.fullmatch(re.escape(free.text) + "!aaab*", answer.text) and answer.finish_reason == "stop"
    assert len(answer.token_ids) > min_tokens
    (answer,) = answers(reasoning_llm, structured_outputs=dict(regex="a{3}"))
    assert answer.text == "aaa"  # without a budget the structure is of all of it
    for one in beams(reasoning_llm, thinking_token_budget=in_prompt + 2, structured_outputs=dict(regex="a{3}")):
        assert one.text.endswith("!aaa")


def test_an_answer_may_begin_with_reasoning(reasoning_llm):
    once = reasoning_llm.get_tokenizer().encode("Once")
    fields = dict(temperature=0, thinking_token_budget=3, prompts="The end.")
    (answer,) = answers(reasoning_llm, structured_outputs=dict(regex="[0-9]{2}"), logit_bias={once[0]: 100}, **fields)
    assert re.fullmatch("Once.*![0-9]{2}", answer.text, re.DOTALL)
    (answer,) = answers(reasoning_llm, structured_outputs=dict(regex="[0-9]{2}"), **fields)
    assert re.fullmatch("[0-9]{2}", answer.text)
    # What the structure may begin with itself is the structure's.
    (answer,) = answers(reasoning_llm, structured_outputs=dict(regex="Once [0-9]!"), **fields)
    assert re.fullmatch("Once [0-9]!", answer.text)


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(json={"type": "strin"}), r"json=\{'type': 'strin'\}: Invalid type: strin"),
        (dict(json="{"), "json='{': it is no JSON"),
        (dict(json={"type": "array", "uniqueItems": True}), "json=.*uniqueItems"),
        (dict(json={"type": "integer", "minimum": 3, "maximum": 2}), "json=.*Unsatisfiable"),
        (dict(json={"x": {1}}), "json=.*not JSON serializable"),
        (dict(json={}, whitespace_pattern="("), r"json=.* with whitespace_pattern='\(': .*unclosed group"),
        (dict(json="[" * 100_000), "json=.*recursion"),
        (dict(regex="("), r"regex='\(':.*unclosed group"),
        (dict(regex=r"(a)\1"), "regex=.*backreferences are not supported"),
        (dict(regex=r"a[^\s\S]"), "regex=.*no text meets it"),
        (dict(regex=5), "regex=5: it must be text, not int"),
        (dict(choice=[]), r"choice=\[\]: it must be a list of texts"),
        (dict(choice="ab"), "choice='ab': it must be a list of texts"),
        (dict(choice=[1]), r"choice=\[1\]: it must be text, not int"),
        (dict(grammar="start: b"), "grammar='start: b':.*unknown name"),
        (dict(grammar="root = b ::= x"), "grammar=.*Expected ::="),
        (dict(structural_tag="{}"), 'structural_tag=.*it must have "triggers" and "structures"'),
        (
            dict(structural_tag='{"triggers": ["<"], "structures": [{"begin": "a"}]}'),
            "structural_tag=.*must have begin, schema and end",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_before_anything_is_queued(default_llm, fields, message):
    with pytest.raises(ValueError, match=re.compile(r"^structured_outputs\." + message, re.DOTALL)):
        answers(default_llm, [PROMPT] * 2, structured_outputs=fields)
    assert not default_llm.llm_engine.has_unfinished_requests()


def test_it_needs_a_tokenizer_and_an_end(default_llm):
    regex = StructuredOutputsParams(regex="a")
    with pytest.raises(ValueError, match=r"structured_outputs\.regex='a': it needs a tokenizer"):
        GrammarCompiler(None, 32, [0]).check(regex)
    with pytest.raises(ValueError, match=r"structured_outputs\.regex='a': it needs an end-of-sequence token"):
        GrammarCompiler(default_llm.llm_engine.tokenizer, 4096, []).check(regex)


def test_the_extra_is_named_when_the_library_is_absent(compiler, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    structured_output._llguidance.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "jaxllm\[structured\]"'):
        compiler.check(StructuredOutputsParams(regex="a"))


def test_grammars_are_compiled_once(compiler):
    for options in ({}, {}, {"disable_any_whitespace": True}, {}):
        compiler.check(StructuredOutputsParams(json=PERSON, **options))
        compiler.check(StructuredOutputsParams(json=json.dumps(PERSON), **options))
    assert compiler._compiled.cache_info().misses == 2
