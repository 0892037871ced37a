"""The step: one jitted function that does all of a step's device work, for one shape of the ladder.

packed inputs -> batch -> network -> logits of each row's last token -> sampled token -> last_token of its slot
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models.interface import KVPages, Network, Params
from jaxllm.runner.inputs import DeviceState, InputLayout
from jaxllm.runner.sampler import Logprobs, sample


class StepOutputs(NamedTuple):
    tokens: jax.Array  # i32[S]; meaningless for rows that don't sample
    logprobs: Logprobs


def make_step(network: Network, layout: InputLayout, max_logprobs: int):
    """step(params, kv, state, packed) -> (kv, state, StepOutputs). `kv` and `state` are to be donated."""

    def step(params: Params, kv: KVPages, state: DeviceState, packed: jax.Array):
        inputs = layout.unpack(packed, state, num_pages=kv[0].k.shape[0])
        with jax.named_scope("forward"):
            hidden, kv = network.forward(params, kv, inputs.batch)
        with jax.named_scope("logits"):
            if not layout.shape.decode_only:
                hidden = hidden[inputs.last_positions]
            logits = network.logits(params, hidden)
        with jax.named_scope("sample"):
            tokens, logprobs = sample(logits, inputs.sampling, max_logprobs)
        sampling_slots = jnp.where(inputs.samples, inputs.slots, layout.max_num_seqs)
        last_token = inputs.state.last_token.at[sampling_slots].set(tokens, mode="drop")
        return kv, DeviceState(inputs.state.page_table, last_token), StepOutputs(tokens, logprobs)

    return step


def write_page_table(state: DeviceState, entries: jax.Array) -> DeviceState:
    """Writes entries i32[U, 2] of (flat index, page) ahead of a step that has more of them than it can carry."""
    table = state.page_table.reshape(-1).at[entries[:, 0]].set(entries[:, 1], mode="drop")
    return DeviceState(table.reshape(state.page_table.shape), state.last_token)
