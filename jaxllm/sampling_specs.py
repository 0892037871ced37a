"""From SamplingParams to the runner's SamplingSpec: checks against the model, bad words and markers as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxllm.config import EngineConfig
from jaxllm.runner.constraints import BadWords, Constraint, FixedTokens, ThinkingBudget
from jaxllm.runner.controls import MAX_BIASED
from jaxllm.runner.sampler import SamplingSpec
from jaxllm.sampling_params import SamplingParams
from jaxllm.structured_output import AfterReasoning, GrammarCompiler
from jaxllm.tokenizer import Tokenizer


class SamplingSpecs:
    """Checks requests' sampling parameters and translates them, for one engine."""

    def __init__(
        self, config: EngineConfig, vocab_size: int, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int] = ()
    ) -> None:
        self._config, self._vocab_size, self._tokenizer = config, vocab_size, tokenizer
        self._eos_token_ids = eos_token_ids
        self._grammars = GrammarCompiler(tokenizer, vocab_size, eos_token_ids)

    def check(self, params: SamplingParams) -> None:
        """Raises ValueError, naming the field, for what this engine or model cannot do."""
        self._check_ids(params)
        self._check_logprobs(params)
        for name in ("stop", "bad_words"):
            if getattr(params, name) and self._tokenizer is None:
                raise ValueError(f"{name} (strings) needs a tokenizer; use stop_token_ids or logit_bias")
        self._check_something_is_left(params)
        if len(params.logit_bias or ()) > MAX_BIASED:
            raise ValueError(f"logit_bias must have at most {MAX_BIASED} tokens, got {len(params.logit_bias or ())}")
        if params.thinking_token_budget is not None and (
            self._tokenizer is None or self._config.reasoning_config is None
        ):
            raise ValueError(
                f"thinking_token_budget={params.thinking_token_budget} needs a tokenizer, and the engine's "
                f"reasoning_config to say how the reasoning begins and ends"
            )
        if params.structured_outputs is not None:
            self._grammars.check(params.structured_outputs)

    def make(
        self, params: SamplingParams, prompt: Sequence[int], index: int, seed: int, stop_ids: Iterable[int]
    ) -> SamplingSpec:
        """The spec of the request's answer number `index`; the first one scores the prompt."""
        words, stop_ids = self._bad_words(params), frozenset(stop_ids)
        banned = tuple(word[0] for word in words if len(word) == 1)
        structured = params.structured_outputs is not None
        scores_prompt = params.prompt_logprobs is not None or bool(params.prompt_logprob_token_ids)
        return SamplingSpec(
            temperature=params.temperature,
            top_k=min(params.top_k, self._vocab_size),
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            num_logprobs=self._num_logprobs(params),
            logprob_ids=tuple(params.logprob_token_ids or ()),
            processed_logprobs=params.use_beam_search,
            min_tokens=min(params.min_tokens, self._config.max_model_len),
            # Where a grammar lets nothing but the end follow, it follows: the constraint heeds min_tokens itself.
            masked_ids=tuple(sorted(stop_ids)) if params.min_tokens and not structured else (),
            allowed_ids=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
            banned_ids=banned,
            bias=tuple((params.logit_bias or {}).items()),
            constraints=tuple(self._constraints(params, prompt, words, stop_ids)),
            logits_processors=tuple(params.logits_processors or ()),
            scores_prompt=scores_prompt and index == 0,
            first_scored=0 if params.prompt_logprobs is not None else params.prompt_logprob_start or 0,
            prompt_logprob_ids=tuple(params.prompt_logprob_token_ids or ()),
        )

    @staticmethod
    def _num_logprobs(params: SamplingParams) -> int:
        """How many the device must return: with logprobs=-1 it returns all that it has."""
        if params.logprobs is not None:
            return max(params.logprobs, 0)
        return 0 if params.logprob_token_ids or params.num_sequences > params.n or params.use_beam_search else -1

    def _constraints(
        self, params: SamplingParams, prompt: Sequence[int], words: list[list[int]], stop_ids: frozenset[int]
    ) -> Iterable[Constraint]:
        size = self._vocab_size
        if sequences := [word for word in words if len(word) > 1]:
            yield BadWords(sequences, size)
        reasoning = self._reasoning(params, prompt)
        if params.structured_outputs is None:
            if reasoning is not None:
                yield reasoning
            return
        structure = self._grammars.constraint(params.structured_outputs, params.min_tokens, stop_ids)
        yield structure if reasoning is None else AfterReasoning(reasoning, structure, size)
        banned = [word[0] for word in words if len(word) == 1]
        # The device heeds these too, but cannot tell that no token is left.
        if params.allowed_token_ids is not None or banned:
            yield FixedTokens(params.allowed_token_ids, banned, size)

    def _reasoning(self, params: SamplingParams, prompt: Sequence[int]) -> ThinkingBudget | None:
        if params.thinking_token_budget is None:
            return None
        config = self._config.reasoning_config
        assert config is not None
        start, end = (self._encode(config[name]) for name in ("reasoning_start_str", "reasoning_end_str"))
        return ThinkingBudget(prompt, start, end, params.thinking_token_budget, self._vocab_size)

    def _encode(self, text: str) -> list[int]:
        assert self._tokenizer is not None
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """The tokens of each bad word, at the beginning of a text and inside of it where that is something else."""
        found = []
        for word in params.bad_words or ():
            plain = self._encode(word.lstrip())
            if not plain:
                raise ValueError(f"bad_words must hold words that have tokens, got {word!r}")
            spaced = self._encode(" " + word.lstrip())
            found += [plain] if spaced == plain else [plain, spaced]
        return found

    def _check_something_is_left(self, params: SamplingParams) -> None:
        """Of the tokens that are allowed, when others forbid some of them."""
        left = set(params.allowed_token_ids or ())
        forbidden = {"bad_words": {word[0] for word in self._bad_words(params) if len(word) == 1}}
        if params.min_tokens and params.structured_outputs is None:
            forbidden["stop_token_ids"] = set(params.stop_token_ids or ())
            forbidden["the end of sequence"] = set(() if params.ignore_eos else self._eos_token_ids)
        for name, tokens in forbidden.items():
            if left and not (left := left - tokens):
                before = f" before min_tokens={params.min_tokens}" if name != "bad_words" else ""
                raise ValueError(
                    f"allowed_token_ids={list(params.allowed_token_ids or ())} allows nothing that {name} does not "
                    f"forbid{before}: allow another token"
                )

    def _check_ids(self, params: SamplingParams) -> None:
        names = (
            "stop_token_ids",
            "allowed_token_ids",
            "logit_bias",
            "logprob_token_ids",
            "prompt_logprob_token_ids",
        )
        for name in names:
            for token in getattr(params, name) or ():
                if token >= self._vocab_size:
                    raise ValueError(
                        f"{name}: {token} is out of range: the vocabulary has ids 0 to {self._vocab_size - 1}"
                    )

    def _check_logprobs(self, params: SamplingParams) -> None:
        allowed = self._config.max_logprobs
        if allowed == -1:
            return
        counts = {
            "logprobs": None if params.logprob_token_ids else params.logprobs,
            "prompt_logprobs": params.prompt_logprobs,
            "prompt_logprob_token_ids": len(params.prompt_logprob_token_ids or ()),
        }
        for name, count in counts.items():
            wanted = self._vocab_size if count == -1 else count or 0
            if wanted > allowed:
                what = f"{name}={count}" if name.endswith("logprobs") else f"the number of {name}, {count},"
                raise ValueError(f"{what} exceeds the engine's max_logprobs={allowed}")
