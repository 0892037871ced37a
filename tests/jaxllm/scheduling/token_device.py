"""TokenDevice: an executor without arithmetic, whose pages hold token ids where a real one's hold KV.

Its next token is the sum of all tokens so far, modulo a small vocabulary, read through the page table. So one wrong
page, one token computed twice or too early, changes the output, and what a request must produce is `expected_output`.
"""

from collections.abc import Collection

import numpy as np

from jaxllm.scheduling.plan import IN_FLIGHT, StepPlan
from jaxllm.scheduling.scheduler import SchedulerConfig

VOCABULARY = 11


def expected_output(prompt, max_new_tokens, stop_token_ids=(), min_new_tokens=0) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens:
        tokens.append(sum(tokens) % VOCABULARY)
        if tokens[-1] in stop_token_ids and len(tokens) - len(prompt) >= min_new_tokens:
            break
    return tokens[len(prompt) :]


class TokenDevice:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        max_pages = -(-config.max_model_len // config.page_size)
        self.pages = np.full((config.num_pages, config.page_size), -1)
        self.page_table = np.full((config.max_num_seqs, max_pages), -1)
        self.last_token = np.full(config.max_num_seqs, -1)

    def execute(self, plan: StepPlan) -> np.ndarray:
        """The plan's tokens: i32[S], or i32[num_steps, S]."""
        entries = plan.page_updates[:, :2].tolist()
        assert len({tuple(entry) for entry in entries}) == len(entries)
        assert len(set(plan.slots.tolist())) == len(plan.slots) <= self.config.max_num_seqs
        self.page_table[plan.page_updates[:, 0], plan.page_updates[:, 1]] = plan.page_updates[:, 2]
        if plan.num_steps == 1:
            return self._step(plan)
        result = np.full((plan.num_steps, len(plan.slots)), -1, np.int32)
        for step, single in enumerate(plan.split([1] * plan.num_steps)):
            result[step, : len(single.slots)] = self._step(single, self._ended(plan, step))
        return result

    def _ended(self, plan: StepPlan, step: int) -> set[int]:
        """Slots whose newest token is a stop token, seen by the host or not: a loop does nothing more for them."""
        return {
            slot
            for request, slot, start, token in zip(
                plan.requests, plan.slots.tolist(), plan.starts.tolist(), plan.tokens.tolist(), strict=True
            )
            if (step > 0 or token == IN_FLIGHT)
            and self.last_token[slot] in request.stop_token_ids
            and start + 1 + step - request.prompt_len >= request.min_new_tokens
        }

    def _step(self, plan: StepPlan, ended: Collection[int] = ()) -> np.ndarray:
        size = self.config.page_size
        assert 0 < plan.num_tokens.sum() <= self.config.max_num_batched_tokens and np.all(
            plan.num_tokens >= 1
        )  # I3, I4
        read = 0
        for slot, start, count in zip(plan.slots, plan.starts, plan.num_tokens, strict=True):
            tokens = plan.tokens[read : read + count]
            read += count
            if slot in ended:
                continue
            positions = np.arange(start, start + count)  # all rows' writes come before any read
            row = np.where(tokens == IN_FLIGHT, self.last_token[slot], tokens)
            self.pages[self.page_table[slot, positions // size], positions % size] = row
        result = np.full(len(plan.slots), -1, np.int32)
        for row, (slot, start, count) in enumerate(zip(plan.slots, plan.starts, plan.num_tokens, strict=True)):
            if slot in ended:
                continue
            positions = np.arange(start + count)
            context = self.pages[self.page_table[slot, positions // size], positions % size]
            if plan.samples[row]:
                result[row] = self.last_token[slot] = context.sum() % VOCABULARY
        return result
