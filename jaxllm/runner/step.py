"""The device's work of a step, as jitted functions: one for each shape of the ladder, and samplers.

    packed inputs -> batch -> network -> logits of each row's last token -> likeliest token -> last_token of its slot
                                                            logits -> sampled token -> last_token of its slot

A step whose rows all want the likeliest token is one program. Whatever else sampling needs is a program of its own that
runs after it, so that it does not multiply the shapes of the network, which take long to compile. Only several decode
steps in a row are one program with their sampling in it, at one of two levels: a loop has no room for a second program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models.interface import KVPages, Network, Params
from jaxllm.runner.controls import ControlTables, control, count_tokens, take_rows
from jaxllm.runner.inputs import DeviceState, InputLayout, UnpackedRows, UnpackedStep
from jaxllm.runner.logprobs import Logprobs, log_probabilities
from jaxllm.runner.sampler import Level, sample


class StepOutputs(NamedTuple):
    tokens: jax.Array  # i32[num_steps, S]; meaningless where a row does not sample
    logprobs: Logprobs | None  # at a level with controls


def make_forward(network: Network, layout: InputLayout):
    """forward(params, kv, state, packed) -> (kv, state, StepOutputs of the likeliest tokens, logits, rows, hidden).

    `kv` and `state` are to be donated; `logits` f32[S, V] and `rows` i32[S, row width] are for the sampler; `hidden`
    [T, D] is for prompts that are to be scored or pooled.
    """

    def forward(params: Params, kv: KVPages, state: DeviceState, packed: jax.Array):
        step = layout.unpack(packed, state, num_pages=kv[0].k.shape[0])
        kv, logits, hidden = _forward(network, layout, params, kv, step)
        state, tokens = _sample(layout, step, logits, Level.GREEDY)
        return kv, state, StepOutputs(tokens[None], None), logits, step.rows, hidden

    return forward


def make_decode_loop(network: Network, layout: InputLayout):
    """decode(params, kv, state, packed) -> (kv, state, StepOutputs): layout.shape's decode steps, at its level.

    The number of steps is part of the program: were it not, the host would wait for each step to see if it is the last.
    So a row that ends before only takes no part in the others (InputLayout.unpack_decode).
    """
    level = Level(layout.shape.level)

    def decode(params: Params, kv: KVPages, state: DeviceState, packed: jax.Array):
        num_pages, num_steps = kv[0].k.shape[0], layout.shape.num_steps
        state = layout.update_page_table(packed, state)

        def one_step(i, carry):
            kv, state, tokens = carry
            step = layout.unpack_decode(packed, state, num_pages, i)
            kv, logits, _ = _forward(network, layout, params, kv, step)
            state, new = _sample(layout, step, logits, level)
            return kv, state, tokens.at[i].set(new)

        tokens = jnp.zeros((num_steps, layout.shape.num_rows), jnp.int32)
        kv, state, tokens = jax.lax.fori_loop(0, num_steps, one_step, (kv, state, tokens))
        return kv, state, StepOutputs(tokens, None)

    return decode


def _forward(network: Network, layout: InputLayout, params: Params, kv: KVPages, step: UnpackedStep):
    """(kv, logits f32[S, V] of each row's last token, hidden [T, D])."""
    with jax.named_scope("forward"):
        hidden, kv = network.forward(params, kv, step.batch)
    with jax.named_scope("logits"):
        decode_only = layout.shape.decode_only
        logits = network.logits(params, hidden if decode_only else hidden[step.last_positions])
    return kv, logits, hidden


def _sample(layout: InputLayout, step: UnpackedStep, logits: jax.Array, level: Level) -> tuple[DeviceState, jax.Array]:
    """(state with the rows' new tokens, those tokens i32[S]), at a level without controls."""
    rows = UnpackedRows.of(step.rows, layout.max_num_seqs, step.batch.kv_lens)
    tokens = sample(logits, rows.sampling, level)
    return step.state.with_last_tokens(rows.slots, tokens), tokens


def make_sampler(level: Level, max_num_seqs: int):
    """sample_tokens(last_token, logits, rows) -> (last_token, StepOutputs), at a level without controls.

    `last_token` is to be donated.
    """

    def sample_tokens(last_token: jax.Array, logits: jax.Array, rows: jax.Array):
        slots, sampling, _ = UnpackedRows.of(rows, max_num_seqs)
        tokens = sample(logits, sampling, level)
        return last_token.at[slots].set(tokens, mode="drop"), StepOutputs(tokens[None], None)

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
        controlled = control(logits, sampling, own, mask)
        tokens = sample(controlled, sampling, level)
        tempered = controlled / jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None]
        scored = jnp.where(sampling.processed_logprobs[:, None], tempered, logits)
        logprobs = log_probabilities(scored, tokens, own.wanted_ids, max_logprobs)
        tables = count_tokens(tables, slots, tokens)
        return last_token.at[slots].set(tokens, mode="drop"), tables, StepOutputs(tokens[None], logprobs)

    return sample_tokens
