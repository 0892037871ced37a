"""The device's work of a step, as two jitted functions: one for each shape of the ladder, one for each sampling level.

    packed inputs -> batch -> network -> logits of each row's last token
                                         logits -> sampled token -> last_token of its slot

They are two so that what sampling needs does not multiply the shapes of the network, which take long to compile.
"""

from typing import NamedTuple

import jax

from jaxllm.models.interface import KVPages, Network, Params
from jaxllm.runner.inputs import DeviceState, InputLayout, UnpackedRows
from jaxllm.runner.sampler import Level, Logprobs, sample


class StepOutputs(NamedTuple):
    tokens: jax.Array  # i32[S]; meaningless for rows that don't sample
    logprobs: Logprobs | None


def make_forward(network: Network, layout: InputLayout):
    """forward(params, kv, state, packed) -> (kv, state, logits f32[S, V], rows i32[S, row width]).

    `kv` and `state` are to be donated; `rows` is for the sampler.
    """

    def forward(params: Params, kv: KVPages, state: DeviceState, packed: jax.Array):
        inputs = layout.unpack(packed, state, num_pages=kv[0].k.shape[0])
        with jax.named_scope("forward"):
            hidden, kv = network.forward(params, kv, inputs.batch)
        with jax.named_scope("logits"):
            if not layout.shape.decode_only:
                hidden = hidden[inputs.last_positions]
            logits = network.logits(params, hidden)
        return kv, inputs.state, logits, inputs.rows

    return forward


def make_sampler(level: Level, max_num_seqs: int, max_logprobs: int):
    """sample_tokens(last_token, logits, rows) -> (last_token, StepOutputs). `last_token` is to be donated."""

    def sample_tokens(last_token: jax.Array, logits: jax.Array, rows: jax.Array):
        slots, sampling = UnpackedRows.of(rows, max_num_seqs)
        tokens, logprobs = sample(logits, sampling, level, max_logprobs)
        return last_token.at[slots].set(tokens, mode="drop"), StepOutputs(tokens, logprobs)

    return sample_tokens
