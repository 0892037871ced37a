"""The device's work of a step, as two jitted functions: one for each shape of the ladder, one for each sampling level.

    packed inputs -> batch -> network -> logits of each row's last token
                                         logits -> sampled token -> last_token of its slot

They are two so that what sampling needs does not multiply the shapes of the network, which take long to compile.
"""

from typing import NamedTuple

import jax

from jaxllm.models.interface import KVPages, Network, Params
from jaxllm.runner.controls import ControlTables, control, count_tokens, take_rows
from jaxllm.runner.inputs import DeviceState, InputLayout, UnpackedRows
from jaxllm.runner.logprobs import Logprobs, log_probabilities
from jaxllm.runner.sampler import Level, sample


class StepOutputs(NamedTuple):
    tokens: jax.Array  # i32[S]; meaningless for rows that don't sample
    logprobs: Logprobs | None  # at a level with controls


def make_forward(network: Network, layout: InputLayout):
    """forward(params, kv, state, packed) -> (kv, state, logits f32[S, V], rows i32[S, row width], hidden [T, D]).

    `kv` and `state` are to be donated; `rows` is for the sampler; `hidden` is for the prompt's own log probabilities,
    and None where no row has more than its last token.
    """

    def forward(params: Params, kv: KVPages, state: DeviceState, packed: jax.Array):
        inputs = layout.unpack(packed, state, num_pages=kv[0].k.shape[0])
        with jax.named_scope("forward"):
            hidden, kv = network.forward(params, kv, inputs.batch)
        with jax.named_scope("logits"):
            decode_only = layout.shape.decode_only
            logits = network.logits(params, hidden if decode_only else hidden[inputs.last_positions])
        return kv, inputs.state, logits, inputs.rows, None if decode_only else hidden

    return forward


def make_sampler(level: Level, max_num_seqs: int):
    """sample_tokens(last_token, logits, rows) -> (last_token, StepOutputs), at a level without controls.

    `last_token` is to be donated.
    """

    def sample_tokens(last_token: jax.Array, logits: jax.Array, rows: jax.Array):
        slots, sampling, _ = UnpackedRows.of(rows, max_num_seqs)
        tokens = sample(logits, sampling, level)
        return last_token.at[slots].set(tokens, mode="drop"), StepOutputs(tokens, None)

    return sample_tokens


def make_controlled_sampler(level: Level, max_num_seqs: int, max_logprobs: int):
    """sample_tokens(last_token, tables, logits, rows, mask i32[S, V/32]) -> (last_token, tables, StepOutputs).

    At a level with controls. `last_token` and `tables` are to be donated. Set bits of `mask` are the tokens that each
    row may sample in this step.
    """

    def sample_tokens(
        last_token: jax.Array, tables: ControlTables, logits: jax.Array, rows: jax.Array, mask: jax.Array
    ):
        slots, sampling, own_slots = UnpackedRows.of(rows, max_num_seqs)
        own = take_rows(tables, own_slots)
        tokens = sample(control(logits, sampling, own, mask), sampling, level)
        logprobs = log_probabilities(logits, tokens, own.wanted_ids, max_logprobs)
        tables = count_tokens(tables, slots, tokens)
        return last_token.at[slots].set(tokens, mode="drop"), tables, StepOutputs(tokens, logprobs)

    return sample_tokens
