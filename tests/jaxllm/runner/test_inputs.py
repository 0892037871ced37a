"""What the device unpacks is what the plan says: against plain loops over the rows of a real scheduler's plans."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.runner.inputs import DeviceState, InputLayout, UnpackedRows, page_table_entries
from jaxllm.runner.sampler import SamplingSpec, SamplingTable
from jaxllm.runner.shapes import ShapeLadder
from jaxllm.scheduling import Request, Scheduler, SchedulerConfig

PAGES, SIZE, SEQS, MAX_PAGES = 40, 4, 6, 16


def plans_of(lengths, new=6):
    scheduler = Scheduler(SchedulerConfig(PAGES, SIZE, SEQS, 24, MAX_PAGES * SIZE))
    for i, length in enumerate(lengths):
        scheduler.add(Request(f"r{i}", np.arange(length, dtype=np.int32) + 100 * i, new, sampling=SamplingSpec(seed=i)))
    while scheduler.has_unfinished:
        plan = scheduler.schedule(0.0)
        yield plan
        scheduler.update(plan, np.arange(len(plan.slots), dtype=np.int32) + 7)


@pytest.mark.parametrize("lengths", [[1], [5, 1, 30], [9, 9, 9, 9, 9, 9, 9]])
def test_round_trip(lengths):
    ladder = ShapeLadder.of(SEQS, 24)
    state = DeviceState(jnp.zeros((SEQS, MAX_PAGES), jnp.int32), jnp.arange(SEQS, dtype=jnp.int32) + 50)
    table, sampling = np.zeros((SEQS, MAX_PAGES), np.int64), SamplingTable(SEQS)
    seen_mixed = seen_decode = False
    for plan in plans_of(lengths):
        decode_only = plan.num_decodes == len(plan.slots)
        seen_mixed, seen_decode = seen_mixed or not decode_only, seen_decode or decode_only
        layout = InputLayout(ladder.fit(len(plan.tokens), len(plan.slots), decode_only), SIZE, SEQS, MAX_PAGES)
        for request in plan.requests:
            sampling.fill(request.slot, request.sampling, request.prompt_len)
        for slot, column, page in plan.page_updates.tolist():
            table[slot, column] = page
        packed = layout.pack(plan, sampling, page_table_entries(plan, MAX_PAGES))
        assert packed.shape == (layout.size,) and packed.dtype == np.int32
        step = layout.unpack(jnp.asarray(packed), state, PAGES)
        state = step.state
        np.testing.assert_array_equal(np.asarray(state.page_table), table)
        check_rows(step, plan, table)
    assert seen_decode and (seen_mixed or lengths == [1])  # a single token is a decode row's work


def check_rows(step, plan, table):
    batch, token = step.batch, 0
    slots, sampling, own_slots = UnpackedRows.of(step.rows, SEQS)
    assert int(batch.num_decodes) == plan.num_decodes
    for row, (slot, start, count) in enumerate(zip(plan.slots, plan.starts, plan.num_tokens, strict=True)):
        assert int(slots[row]) == (slot if plan.samples[row] else SEQS) and int(batch.kv_lens[row]) == start + count
        assert int(batch.query_starts[row]) == token and int(batch.query_starts[row + 1]) == token + count
        assert int(step.last_positions[row]) == token + count - 1
        assert int(sampling.positions[row]) == start + count and int(own_slots[row]) == slot
        assert int(batch.prompt_lens[row]) == plan.requests[row].prompt_len
        np.testing.assert_array_equal(np.asarray(batch.page_table[row]), table[slot])
        for position in range(start, start + count):
            planned = plan.tokens[token]
            assert int(batch.token_ids[token]) == (planned if planned >= 0 else slot + 50)
            assert int(batch.positions[token]) == position and int(batch.seq_ids[token]) == row
            assert int(batch.slots[token]) == table[slot, position // SIZE] * SIZE + position % SIZE
            token += 1
    assert np.all(np.asarray(batch.slots[token:]) >= PAGES * SIZE)
    assert np.all(np.asarray(batch.kv_lens[len(plan.slots) :]) == 0)
    assert np.all(np.asarray(slots[len(plan.slots) :]) == SEQS)
