"""What the host says may follow: against transformers' bad words, and by hand for the reasoning budget."""

import numpy as np
import pytest

from jaxllm.runner.constraints import BadWords, FixedTokens, ThinkingBudget, combined_mask, run_processors, takes_prompt
from jaxllm.runner.controls import bitmask
from jaxllm.runner.sampler import SamplingSpec
from jaxllm.scheduling import Request

V = 40


def allowed(mask) -> list[int]:
    """The tokens whose bits are set."""
    if mask is None:
        return list(range(V))
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:V]).tolist()


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [2, 1], [5, 1, 2], [9, 9]])
def test_bad_words_are_transformers(tokens):
    words = [[1, 2, 3], [2, 4], [1, 5], [9, 9]]
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import NoBadWordsLogitsProcessor

    scores = NoBadWordsLogitsProcessor(words)(torch.tensor([tokens], dtype=torch.long), torch.zeros(1, V))
    expected = np.flatnonzero(np.isfinite(scores[0].numpy())).tolist() if tokens else list(range(V))
    assert allowed(BadWords(words, V).mask(tokens)) == expected


START, END = [10, 11], [20, 21]


def think(prompt, budget, preferred, steps=12):
    """What is sampled if the model prefers these tokens, one after the other, and the budget allows them."""
    constraint, tokens = ThinkingBudget(prompt, START, END, budget, V), []
    for step in range(steps):
        choices = allowed(constraint.mask(tokens))
        wanted = preferred[step] if step < len(preferred) else 1
        tokens.append(wanted if wanted in choices else choices[0])
    return tokens


def test_the_budget_forces_the_end_of_the_reasoning():
    assert think([*START], 3, [5, 6, 7, 8, 9]) == [5, 6, 7, 20, 21, *[1] * 7]
    assert think([3], 2, [*START, 5, 6, 7]) == [*START, 5, 6, 20, 21, *[1] * 6]
    assert think([*START], 0, [5]) == [20, 21, *[1] * 10]
    assert think([*START, 4, 4], 3, [5, 6]) == [5, 20, 21, *[1] * 9]  # the prompt's own reasoning counts


def test_reasoning_that_ends_in_time_and_begins_again():
    preferred = [5, 20, 21, 7, 7, *START, 8, 8, 8]
    assert think([*START], 2 + 2, preferred) == [5, 20, 21, 7, 7, *START, 8, 8, 8, 1, 20]
    assert think([*START, *END], 1, [5] * 12) == [5] * 12
    assert think([2], 1, [5] * 12) == [5] * 12


def test_a_fork_goes_its_own_way():
    budget = ThinkingBudget(START, START, END, 2, V)
    budget.mask([5])
    fork = budget.fork()
    assert allowed(budget.mask([5, 6])) == [20] and budget.mask([5, 6, 20, 21]) is None and budget.closed == 4
    assert fork.thinking and not fork.closed and allowed(fork.mask([5, 7])) == [20]


def test_masks_are_combined():
    class Only:
        def __init__(self, ids):
            self.ids = ids

        def mask(self, tokens):
            return bitmask(self.ids, V)

    assert combined_mask([], []) is None
    assert allowed(combined_mask([FixedTokens([1, 2], [2], V), Only([1, 2])], [])) == [1]
    assert allowed(combined_mask([FixedTokens(None, [2], V), Only([1, 2])], [])) == [1]
    with pytest.raises(ValueError, match=r"after 1 tokens the request's constraints \(FixedTokens, Only\) leave no"):
        combined_mask([FixedTokens([2], [], V), Only([1])], [5])
    assert allowed(combined_mask([FixedTokens([2], [], V), Only([1])], [5], may_be_empty=True)) == []
    assert allowed(combined_mask([Only([1, 2, 3]), Only([2, 3, 4]), BadWords([[7, 3]], V)], [7])) == [2]


def request_with(*processors):
    request = Request("r", np.array([1, 2], np.int32), 5, sampling=SamplingSpec(logits_processors=processors))
    request.output_token_ids = [3, 4]
    return request


def test_processors_of_both_signatures_run_in_turn():
    seen = []

    def two(tokens, logits):
        seen.append(tokens)
        logits[0] = 9
        return logits

    def three(prompt, tokens, logits):
        seen.append((prompt, tokens))
        return [value + 1 for value in logits]

    assert not takes_prompt(two) and takes_prompt(three) and not takes_prompt(max)
    assert run_processors(request_with(two, three), np.zeros(3, np.float32)).tolist() == [10, 1, 1]
    assert seen == [[3, 4], ([1, 2], [3, 4])]


def test_a_processor_that_returns_something_else():
    with pytest.raises(ValueError, match=r"logits_processors: .* returned shape \(2,\) for logits \(3,\)"):
        run_processors(request_with(lambda tokens, logits: logits[:2]), np.zeros(3, np.float32))
