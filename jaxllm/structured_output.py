"""Structured output: what an answer must be (JSON schema, regex, ...) -> which tokens may follow, by llguidance.

Why llguidance and not xgrammar: it is one wheel without dependencies, while xgrammar installs PyTorch and Triton; it
compiles a schema in milliseconds, and its slowest masks take one or two, where xgrammar takes seconds and tens of them;
and what it cannot express it refuses, naming the keyword. The figures are in docs/structured_output.md.

A parser that knows the vocabulary's bytes is advanced by each token of the answer and says which ones may come next.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from jaxllm.runner.constraints import ThinkingBudget
from jaxllm.runner.controls import bitmask
from jaxllm.sampling_params import StructuredOutputsParams
from jaxllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_COMPILED = 256  # grammars that are kept compiled
# Of llguidance's parser, whose own limits end an answer in its middle. An object of N optional properties has 4 N items
# in a row, a rule of N alternatives N: its 2000 are few. A step may have 50,000 in all, so that more would not help.
_MAX_ITEMS_IN_ROW = 50_000
_MIN_LEXER_STATES = 250_000  # its own limit


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the latest.

    Args:
      tokenizer: whose tokens' bytes the grammars are about; None: every request is refused.
      vocab_size: the model's, V.
      eos_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, tuple(eos_token_ids)
        self._compiled = functools.lru_cache(_MAX_COMPILED)(self._compile)

    def check(self, params: StructuredOutputsParams) -> None:
        """Compiles the grammar. Raises what `matcher` does."""
        self.matcher(params)

    def constraint(
        self, params: StructuredOutputsParams, min_tokens: int, stop_token_ids: Iterable[int]
    ) -> GrammarConstraint:
        """A constraint for one answer, at its beginning.

        Args:
          min_tokens: before so many tokens none of `stop_token_ids` is allowed, where anything else is.
          stop_token_ids: what ends the request. A special token among them ends the answer as an end of sequence does.
        """
        assert self._tokenizer is not None
        stops = frozenset(stop_token_ids)
        ends = {*self._eos_token_ids, *(stops & self._tokenizer.special_ids)}
        return GrammarConstraint(self.matcher(params), ends, stops, min_tokens, self._vocab_size)

    def matcher(self, params: StructuredOutputsParams) -> Any:
        """A llguidance matcher of its own, at the beginning of an answer.

        Raises: ValueError naming the field, for a grammar that is wrong or cannot be met, or if the tokenizer will not
          do; ImportError naming the extra without llguidance.
        """
        kind = params.kind
        try:
            return self._compiled(grammar_of(params)).deep_copy()
        except (ValueError, TypeError, RecursionError) as error:
            where = f"structured_outputs.{kind}={reprlib.repr(getattr(params, kind))}"
            if params.whitespace_pattern is not None:
                where += f" with whitespace_pattern={params.whitespace_pattern!r:.100}"
            raise ValueError(f"{where}: {error}") from error

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """llguidance's view of the tokenizer. Some hundred milliseconds for a large vocabulary, once."""
        if self._tokenizer is None:
            raise ValueError("it needs a tokenizer, and the engine has none (skip_tokenizer_init)")
        if not self._eos_token_ids:
            raise ValueError("it needs an end-of-sequence token, and the model has none")
        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
        made = _llguidance().LLTokenizer(_llguidance().TokenizerWrapper(vocabulary))
        vocabulary.greedy = made.greedy_tokenize
        return made

    def _compile(self, grammar: str) -> Any:
        matcher = _llguidance().LLMatcher(self._vocabulary, grammar, log_level=0, limits=_limits(grammar))
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out whether there is any text, and fills caches that copies share
        if matcher.is_error():
            raise ValueError(_first_lines(matcher.get_error()))
        for warning in matcher.get_grammar_warnings():
            logger.warning("structured_outputs: %s", warning)
        return matcher


class GrammarConstraint:
    """A constraint (runner.constraints.Constraint): the tokens that a matcher allows, and the end where it may end.

    After an end token that does not end the request (ignore_eos, min_tokens) only end tokens follow: the text stays as
    it is.

    Attributes:
      not_ends: i32[V/32], the bits of all tokens but those that end an answer.
    """

    def __init__(
        self, matcher: Any, ends: Iterable[int], stops: Iterable[int], min_tokens: int, vocab_size: int
    ) -> None:
        self._matcher, self._ends, self._min_tokens = matcher, frozenset(ends), min_tokens
        self._end_bits, self._stop_bits = bitmask(ends, vocab_size), bitmask(stops, vocab_size)
        self.not_ends = ~self._end_bits
        self._read = 0  # tokens of the answer that the matcher has taken in
        self._ended = False

    def fork(self) -> Self:
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def begin_after(self, count: int) -> None:
        """Leaves the answer's first `count` tokens out of the structure. Before any have been taken in."""
        self._read = count

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        """i32[V/32]. Raises ValueError for a token that was not allowed, or when the parser's limits are exceeded."""
        for token in tokens[self._read :]:
            self._take(token)
        self._read = len(tokens)
        allowed = self._end_bits if self._ended else self._matched()
        if self._read < self._min_tokens and (later := allowed & ~self._stop_bits).any():
            return later
        return allowed

    def _take(self, token: int) -> None:
        self._ended = self._ended or token in self._ends
        if not self._ended and not self._matcher.consume_token(token):
            raise ValueError(f"structured_outputs: token {token}: {_first_lines(self._matcher.get_error())}")

    def _matched(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(self._end_bits)]
        if self._matcher.is_error():
            raise ValueError(f"structured_outputs: {_first_lines(self._matcher.get_error())}")
        return bits | self._end_bits if self._matcher.is_accepting() else bits & self.not_ends


class AfterReasoning:
    """A constraint: reasoning within a budget, then a structure.

    The reasoning is what the prompt has begun, or what follows an opening marker at the answer's beginning. (Where the
    structure too may begin with the marker's first token, the token is the structure's.) The answer cannot end in it.
    """

    def __init__(self, reasoning: ThinkingBudget, structure: GrammarConstraint, vocab_size: int) -> None:
        self._reasoning, self._structure, self._vocab_size = reasoning, structure, vocab_size
        self._over = False  # or there was none

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        if not self._over:
            allowed = self._reasoning.mask(tokens)
            if not self._reasoning.closed:
                if self._reasoning.thinking:
                    return self._structure.not_ends if allowed is None else allowed
                if (allowed := self._opening_mask(tokens)) is not None:
                    return allowed
            self._over = True
            self._structure.begin_after(self._reasoning.closed)
        return self._structure.mask(tokens)

    def fork(self) -> Self:
        other = copy.copy(self)
        other._reasoning, other._structure = self._reasoning.fork(), self._structure.fork()
        return other

    def _opening_mask(self, tokens: Sequence[int]) -> np.ndarray | None:
        """What may follow while the answer may still begin with the opening marker; None: it does not."""
        opening, allowed = self._reasoning.start, self._structure.mask([])
        first = bitmask(opening[:1], self._vocab_size)
        if list(tokens) != opening[: len(tokens)] or (allowed & first).any():
            return None
        return bitmask([opening[len(tokens)]], self._vocab_size) if tokens else allowed | first


class _Vocabulary:
    """What llguidance wants to know of a tokenizer: the bytes of V tokens, those that are no text, and an encoder.

    Where only one text can follow, llguidance allows only the token that the encoder begins it with: the model sees its
    own tokenization. So the encoder must give tokens whose bytes are the text.

    Attributes:
      greedy: the encoder for where the tokenizer's own does not: the longest token first.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.tokens = tokenizer.token_bytes(vocab_size)
        self.special_token_ids = sorted(i for i in tokenizer.special_ids.union(eos_token_ids) if i < vocab_size)
        self.eos_token_id, self.bos_token_id = eos_token_ids[0], None
        self.greedy: Callable[[str], list[int]] = lambda text: []
        self._tokenizer, self._special_ids = tokenizer, frozenset(self.special_token_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode()
        for before in ("", "\n"):  # sentencepiece puts a space before a text
            ids = self._encode(before + plain)
            for start in range(3):
                if self._spell(ids[start:], plain):
                    return ids[start:]
        return self.greedy(plain)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except ValueError:  # the text has the name of a special token that is beyond the model's vocabulary
            return []

    def _spell(self, ids: list[int], text: str) -> bool:
        return b"".join(self.tokens[i] for i in ids) == text.encode() and self._special_ids.isdisjoint(ids)


# --- from parameters to llguidance's grammars, which are text


def grammar_of(params: StructuredOutputsParams) -> str:
    """llguidance's grammar. Raises ValueError or TypeError for what is none."""
    matcher = _llguidance().LLMatcher
    match params.kind:
        case "json":
            return matcher.grammar_from_json_schema(_schema(params.json, params), overrides=_json_options(params))
        case "json_object":
            return matcher.grammar_from_json_schema('{"type": "object"}', overrides=_json_options(params))
        case "regex":
            return matcher.grammar_from_regex(_text(params.regex))
        case "choice":
            return matcher.grammar_from_regex(_choices(params.choice))
        case "grammar":
            return matcher.grammar_from_lark(_lark(_text(params.grammar)))
        case _:
            return _structural_tag(_parsed(params.structural_tag), params)


def _json_options(params: StructuredOutputsParams) -> dict[str, Any]:
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = _text(params.whitespace_pattern)
    return options


def _schema(schema: Any, params: StructuredOutputsParams) -> str:
    parsed = _parsed(schema)
    return json.dumps(closed_schema(parsed) if params.disable_additional_properties else parsed)


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"it must be text, not {type(value).__name__}")
    return value


def _choices(choices: Any) -> str:
    """The choices as a regex: a rule with an alternative a choice would have as many items in a row of the parser."""
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise TypeError("it must be a list of texts, at least one")
    return "|".join(re.escape(_text(choice)) for choice in choices)


def _lark(grammar: str) -> str:
    """Lark from EBNF as llama.cpp's GBNF and xgrammar have it (`root ::= ...`), which is all that has "::="."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except GbnfToLarkError as error:
        raise ValueError(str(error)) from error


def _structural_tag(tags: Any, params: StructuredOutputsParams) -> str:
    """Free text in which each trigger must go on as one of the structures: begin, JSON of a schema, end."""
    if not isinstance(tags, Mapping) or set(tags) - {"type"} != {"triggers", "structures"}:
        raise ValueError('it must have "triggers" and "structures"')
    made = []
    for one in tags["structures"]:
        if not isinstance(one, Mapping) or set(one) != {"begin", "schema", "end"}:
            raise ValueError(f'each of "structures" must have begin, schema and end, got {one!r}')
        begin, end = _text(one["begin"]), _text(one["end"])
        trigger = next((text for text in tags["triggers"] if text and begin.startswith(text)), None)
        if trigger is None:
            raise ValueError(f"begin={begin!r} begins with none of the triggers {tags['triggers']!r}")
        schema = {**json.loads(_schema(one["schema"], params)), "x-guidance": _json_options(params)}
        made.append(_llguidance().StructTag(trigger=trigger, begin=begin, grammar=schema, end=end))
    if not made:
        raise ValueError("structures must not be empty")
    return _llguidance().StructTag.to_grammar(made, assume_special=False)


_SCHEMAS_BY_NAME = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)
_DATA = frozenset({"const", "enum", "default", "examples"})  # values, which are no schemas


def closed_schema(schema: Any) -> Any:
    """A copy of a JSON schema whose objects have no properties but those that are named, unless it says otherwise."""
    if isinstance(schema, list):
        return [closed_schema(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {}
    for key, value in schema.items():
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            closed[key] = {name: closed_schema(one) for name, one in value.items()}
        else:
            closed[key] = value if key in _DATA else closed_schema(value)
    if "properties" in closed or "patternProperties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def _limits(grammar: str) -> Any:
    """llguidance's limits for a grammar.

    All answers share the lexer's states. Those of literal texts are no more than their bytes, so that the limit grows
    with these: no number of answers to a long list of choices reaches it.
    """
    states = _MIN_LEXER_STATES + len(grammar.encode())
    return _llguidance().LLParserLimits(max_items_in_row=_MAX_ITEMS_IN_ROW, max_lexer_states=states)


def _first_lines(message: str) -> str:
    """llguidance's message without the dump of its parser's state."""
    text = message.split("<state>")[0].strip()
    return "no text meets it" if text.startswith("NoExtension") else text


@functools.cache
def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            'structured_outputs needs the llguidance library: pip install "jaxllm[structured]"'
        ) from error
    return llguidance
